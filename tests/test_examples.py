"""The examples, run small: what they print and write is right, not only there."""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import pushforward as pf
from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.linear import PROCESSES as KNOWN
from pushforward.linear import VP, Gaussian
from pushforward.maps.code import GaussianStream
from pushforward.maps.storage import load_codes
from pushforward.model import Model, Network
from pushforward.plan import SOLVERS, ddim, plan_of
from support.helpers import DETERMINISTIC, FIELD, PROCESSES, mixture_denoiser, normal

EXAMPLES = Path(__file__).parents[1] / "examples"
SOLVER_PROCESSES = [name for name in PROCESSES if name != "discrete"]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder to write in, one thread, and the library's lists as they were when the example is done."""
    monkeypatch.chdir(tmp_path)
    solvers, processes, threads = dict(SOLVERS), dict(KNOWN), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for known, before in ((SOLVERS, solvers), (KNOWN, processes)):
        known.clear()
        known.update(before)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def losses(folder: str) -> list[float]:
    lines = (Path(folder) / "training" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def size(picture: str) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


# -- train on your folder ---------------------------------------------------------------------------------------------


def test_training_on_drawn_pictures_learns_and_draws(example):
    """60 steps: the loss starts at 1, the residual's variance, and falls; means over 20 steps scatter by some 2%."""
    report, images = example("train_on_your_folder").main(steps=60, size=8, network="tiny")
    assert report.steps == 60
    first, *_, last = losses("my-model")
    assert last < 0.92 * first
    model = pf.load("my-model")
    assert model.process.name == "langevin"
    assert model.classes == ("disc", "square")
    assert images.shape == (32, 3, 8, 8)
    assert images.std() > 0.1
    assert size("samples.png") == (8 * 96, 4 * 96)


def test_training_on_a_folder_of_your_own_by_command(tmp_path, monkeypatch, capsys):
    """Two sizes, no sub-folders (so no classes), one broken file; the command goes on where it stopped."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for k in range(6):
        Image.fromarray(np.full((8 + k % 2, 12), 40 * k, np.uint8)).save(folder / f"{k}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    for steps in ("2", "3"):
        command = f"x {folder} --steps {steps} --size 8 --network tiny --model m --out s.webp".split()
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(EXAMPLES / "train_on_your_folder.py"), run_name="__main__")
    state = torch.load("m/training/checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert state["data"] == [6, 1, 8, 8]
    assert pf.load("m").classes == ()
    assert Path("s.webp").is_file()
    assert "The model is m/" in capsys.readouterr().out


# -- compare samplers -------------------------------------------------------------------------------------------------


def test_errors_are_those_to_the_exact_flow(example):
    """Gaussian data, where the code z becomes `m + s z`: `auto` is exact, DDIM's errors are the true ones.

    Tolerance 2%: the converged result is `auto` at 64 calls in float32, exact up to its last step.
    """
    process, data = VP(), Gaussian(0.25, mean=0.1)

    def denoise(u, t):
        time = torch.tensor(t, dtype=torch.float64)
        psi = process.transition(time, torch.zeros_like(time))
        mean = torch.full_like(u, 0.1)
        return mean + data.response(process, time)(u - psi(mean))

    model = Model("gaussian", process, Function(denoise), (1, 4, 4), reference=data)
    module = example("compare_samplers")
    found = module.compare(model, (4, 8), count=3, many=64)
    truth = 0.1 + 0.5 * GaussianStream(0, range(3), (1, 4, 4)).draw()
    true_errors = module.distances(found.images["ddim", 8], truth)
    torch.testing.assert_close(found.errors["ddim", 8], true_errors, rtol=0.02, atol=0)
    assert module.distances(found.converged, truth).max() < 1e-3
    assert found.errors["auto", 8].max() < 0.1 * found.errors["ddim", 8].min()
    assert found.doubt < found.errors["ddim", 8].min()


def test_comparison_of_an_embedded_model(example, capsys):
    module = example("compare_samplers")
    found = module.main(calls=(4, 10), count=3, many=24)
    assert {name for name, _ in found.errors} == set(module.SAMPLERS)
    assert all(3 <= nfe <= 10 for _, nfe in found.errors)
    for name in module.SAMPLERS:
        few, many = (
            found.errors[name, n].quantile(0.5) for n in sorted(n for other, n in found.errors if other == name)
        )
        assert many < few, name
    assert found.errors["auto", 10].median() < 0.7 * found.errors["ddim", 10].median()
    printed = capsys.readouterr().out
    assert "auto          10" in printed
    assert "3 of 3 images" in printed
    width, height = size("samplers-images.png")
    assert width > 3 * 84
    assert height > 7 * 84
    assert size("samplers.png") == (840, 600)


# -- your own process -------------------------------------------------------------------------------------------------


def test_the_process_is_the_papers_and_every_solver_converges_on_it(example):
    """First order at least on the way from 20 to 40 steps, down to what the last step leaves (3.6e-4, see there).

    The last step's floor: sigma(t_min)^2 / 2s times the greatest of 16384 normals, (.0087^2) * 4.1 / 1 = 3.1e-4.
    """
    module = example("your_own_process")
    process = module.SubVP()
    assert module.diffusion_error(process) < 1e-12
    few, many = (module.solver_errors(process, n) for n in (20, 40))
    assert set(few) == set(many) == set(SOLVERS) - {"sscs"}  # which needs an equilibrium
    for name in few:
        stochastic = name not in (*DETERMINISTIC, "collocation")
        noise = 0.5 / 128 if stochastic else 0.0  # of a deviation over 16384 values, generously
        assert many[name] < max(0.6 * few[name], 3.6e-4) + noise, (name, few[name], many[name])
        assert many[name] < 0.1, name


def test_training_a_process_of_your_own_learns_and_loads(example):
    module = example("your_own_process")
    report, images = module.learn("mine", 60)
    first, *_, last = losses("mine")
    assert last < 0.8 * first
    assert report.steps == 60
    assert images.shape == (16, 1, 16, 16)
    assert pf.load("mine").process == module.SubVP()
    del KNOWN["sub-vp"]
    with pytest.raises(PushforwardError, match="sub-vp"):  # another program must know the process as well
        pf.load("mine")


def test_the_process_example_runs(example, capsys):
    module = example("your_own_process")
    errors, report = module.main(steps=2)
    assert set(errors) == set(SOLVERS) - {"sscs"}
    assert report.steps == 2
    assert size("sub-vp.png") == (4 * 96, 4 * 96)
    assert "ddim             error with 20 steps" in capsys.readouterr().out


# -- your own solver --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVER_PROCESSES)
def test_the_solver_has_its_order_on_every_process(example, name):
    """Order 2, or 1 without extrapolation, to .2: at 80 to 160 steps the asymptotic regime is that near."""
    module = example("your_own_solver")
    process = PROCESSES[name]
    assert module.order(process, "ab2", coarse=80) == pytest.approx(2, abs=0.2)
    assert module.order(process, "ab2", coarse=80, share=0.0) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_solver_without_its_extrapolation_is_ddim_and_starts_without_signal(example, name):
    """Also from t_max, where flow matching has no signal; equal but for rounding."""
    module, process = example("your_own_solver"), PROCESSES[name]
    grid = pf.grid.uniform(process, 5)
    u = torch.randn(2, process.blocks, *(process.basis.shape or (3, 2)), dtype=torch.float64)
    network = Function(lambda u, t: torch.tanh(u) * (0.5 + t / process.t_max))
    expected = run(ddim(process, grid), network, u)
    torch.testing.assert_close(run(module.ab2(process, grid, share=0.0), network, u), expected, rtol=1e-9, atol=1e-9)
    extrapolated = run(module.ab2(process, grid), network, u)
    assert bool(extrapolated.isfinite().all())
    assert (extrapolated - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vp", "flow", "langevin"])
def test_the_solver_runs_at_once_and_backwards(example, name):
    """A mixture of six Gaussians: all at once to 1e-3 (RMS), there and back to ten times the inversion's 1e-4.

    Steps this coarse may leave one image without a code on Langevin (multistep gDDIM too); the inversion must say so.
    """
    module, process = example("your_own_solver"), PROCESSES[name]
    denoiser = mixture_denoiser(process, normal(6, 1, *FIELD).float(), 0.2)
    model = Model("mixture", process, denoiser, (1, *FIELD), reference=Gaussian(0.5))
    found = module.use(model, "mixture", 12, 5, Path("codes.safetensors"))
    assert found.rounds <= 12
    assert (found.together - found.images).square().mean().sqrt() < 1e-3
    good = found.residual < 1e-3
    assert good.sum() >= (4 if name == "langevin" else 5)
    torch.testing.assert_close(found.again[good], found.given[good], rtol=0, atol=1e-3)
    code, head = load_codes(Path("codes.safetensors"))
    assert (head["solver"], head["settings"]) == ("ab2", {"share": 0.5})
    assert code.start.shape == (5, process.blocks, *FIELD)


def test_the_solver_is_used_on_an_embedded_model(example, capsys):
    """All at once to 2e-3 (RMS). Steps as few as here may have no inverse that is found, and are only run."""
    found = example("your_own_solver").main(steps=6, count=1)
    assert found.rounds <= 6
    assert (found.together - found.images).square().mean().sqrt() < 2e-3
    assert found.images.std() > 0.3
    assert found.again.shape == found.images.shape == (1, 1, 28, 28)
    assert size("ab2.png")[1] > 3 * 84
    assert "Order of ab2 on vp: 1.9" in capsys.readouterr().out
    with pytest.raises(PushforwardError, match="it has share"):
        plan_of(VP(), "ab2", pf.grid.uniform(VP(), 5), {"order": 2})


def test_the_order_is_of_the_step_not_of_the_name(example):
    """Another solver through the same measurement: DDIM's order 1 is told from 2."""
    module = example("your_own_solver")
    assert module.order(replace(VP(), beta_max=10.0), "ddim") == pytest.approx(1, abs=0.1)


# -- guide your model -------------------------------------------------------------------------------------------------


def test_a_model_is_guided_by_a_function(example, monkeypatch, capsys):
    """Gaussian data of mean 0 and the measurement `m` of half the pixels, whose posterior is known.

    `m` has variance v = .25 / 8 before and, with noise of deviation d, `v d^2 / (v + d^2)` after, with mean
    `b v / (v + d^2)`. Of 200 chains both are within four standard errors: 4 / sqrt(200) deviations, 40% of a variance.
    """
    process, data = VP(), Gaussian(0.25)

    def denoise(u, t):
        return data.response(process, torch.tensor(t, dtype=torch.float64))(u)

    module = example("guide_your_model")
    model = Model("gaussian", process, Function(denoise), (1, 4, 4), reference=data)
    monkeypatch.setattr(pf, "load", lambda name: model)
    before, found = module.main("gaussian", bright=0.3, deviation=0.1, plan="auto:steps=8", steps=60, chains=200)
    v, seen, left = 0.25 / 8, 0.1**2, module.measured(found.images)
    variance = v * seen / (v + seen)
    assert left.mean() == pytest.approx(0.3 * v / (v + seen), abs=4 * (variance / 200) ** 0.5)
    assert left.var() == pytest.approx(variance, rel=0.4)
    assert module.measured(before).var() == pytest.approx(v, rel=0.4)
    assert "wanted   0.30 +- 0.1" in capsys.readouterr().out


def test_an_embedded_model_is_guided_by_command(monkeypatch, capsys):
    command = ["x", "--plan", "dpm++:steps=3", "--steps", "4", "--chains", "2", "--bright", "0.3", "--out", "s.png"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(EXAMPLES / "guide_your_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    numbers = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in printed.splitlines()[:2]}
    assert sum(numbers["after"]) > sum(numbers["before"])
    assert "30 network evaluations per chain" in printed
    assert size("s.png")[0] > 2 * 84


# -- reward your model ------------------------------------------------------------------------------------------------


def test_a_policy_of_gaussians_reaches_its_reward(example):
    """Answers are half the state and a parameter: rewarded for a mean near .6, images go there from 0."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(()))

        def forward(self, u, t, condition=None):
            return self.value + 0.5 * u

    module = example("reward_your_model")
    network = Mean()
    model = Model("mean", VP(), Network(network, "sample"), (1, 2, 2))
    sampler = pf.Diffusion(model, pf.solvers.ddim(model.process, pf.grid.uniform(model.process, 4), eta=1.0))

    def reward(images):
        return -(images.mean((1, 2, 3)) - 0.6).square()

    before = float(sampler.sample(64, seed=5).mean())
    module.train(sampler, reward, rounds=150, count=64, rate=0.01)
    after = float(sampler.sample(64, seed=5).mean())
    assert abs(before) < 0.1
    assert after == pytest.approx(0.6, abs=0.1)  # three deviations of a mean of 64 images


def test_the_reward_of_an_embedded_model_is_plotted(example, capsys):
    curve = example("reward_your_model").main(rounds=2, count=2, steps=2)
    assert len(curve) == 2
    assert "round 2: reward" in capsys.readouterr().out
    assert size("reward.png") == (720, 480)


# -- edit a photograph ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stable_diffusion", "flux"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_photograph_is_edited(kind, example, capsys, tmp_path):
    """A tiny pipeline of random weights: another text makes another picture; and so does a LoRA, where it is read."""
    from support import pipelines

    torch.manual_seed(3)
    pipe = getattr(pipelines, kind)(tmp_path / "parts")
    pipe.save_pretrained("mine")
    Image.effect_noise((30, 20), 60).convert("RGB").save("photo.png")
    words = {"photograph": "photo.png", "source": "a fox", "pipeline": "mine", "steps": 4, "side": 8}
    module = example("edit_a_photograph")
    before, snow = module.main(target="a fox in the snow", **words)
    _, sea = module.main(target="the sea", **words)
    assert before.shape == snow.shape == (1, 3, 8, 8)
    assert bool(snow.isfinite().all())
    assert not torch.equal(snow, sea)
    assert "from the photograph" in capsys.readouterr().out
    assert size("edited.png")[0] > 2 * 96
    prefix = "unet" if kind == "stable_diffusion" else "transformer"
    network = pipe.components[prefix]
    layers = {name: layer for name, layer in network.named_modules() if name.endswith("to_q")}
    lora = {f"{prefix}.{name}.lora_{end}.weight": torch.randn(shape)
            for name, layer in layers.items()
            for end, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2)))}  # fmt: skip
    save_file(lora, "lora.safetensors")
    _, other = module.main(target="a fox in the snow", lora="lora.safetensors", **words)
    assert not torch.equal(other, snow)


def test_the_list_of_examples_is_complete():
    text = (EXAMPLES / "README.md").read_text()
    missing = [path.name for path in EXAMPLES.glob("*.py") if path.name not in text]
    assert not missing

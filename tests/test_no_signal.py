"""Where a process ends without signal, and where samples end far from all data.

Truth: for data N(0, 1/4) the best network is linear and known, and its samples have deviation 1/2. Forty steps bring
every solver here within 15% of it (first-order ones are 10% off); what divides by a rounded zero is off by 1e10.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import diffusers
import pytest
import torch
from torch import Tensor

import pushforward as pf
from pushforward.cli import main
from pushforward.errors import FarOutside
from pushforward.linear import VP, Blurring, Cosine, Discrete, Gaussian, Process
from pushforward.linear.process import ScaledProcess
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, Network
from pushforward.model.diffusers.tables import alphas_cumprod
from pushforward.model.model import far_outside
from pushforward.plan import SOLVERS, grid, plan_of
from support.helpers import PROCESSES, times

DEVIATION, STEPS = 0.5, 40
SHAPE = (1, 4, 4)
NAMES = ["auto", *(name for name in SOLVERS if name != "euler-maruyama")]


@dataclass(frozen=True)
class Naive(ScaledProcess):
    """As a user would write it: its signal at time 1 is 6e-17."""

    t_min: float = 1e-3
    t_max: float = 1.0
    name: ClassVar[str] = "naive"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = 0.5 * torch.pi * t
        return angle.cos(), angle.sin()


def zero_snr(**settings: object) -> Discrete:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **settings)
    return Discrete(tuple(alphas_cumprod(scheduler.config).tolist()))


ENDS: dict[str, Process] = {
    "table": zero_snr(),
    "cosine table": zero_snr(beta_schedule="squaredcos_cap_v2"),
    "cosine": Cosine(offset=0.0),
    "blurring": Blurring(SHAPE[1:], offset=0.0, blur_max=2.0),
    "naive": Naive(),
}


def exact(process: Process, prediction: str = "v") -> Model:
    """The model of N(0, 1/4), told in a prediction."""

    def network(u: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        assert isinstance(process, ScaledProcess)
        alpha, sigma = (x.view(len(u), 1, *(x.shape[1:] or (1, 1))) for x in process.alpha_sigma(t.double()))
        noisy = process.basis.forward(u.double())
        signal, noise = (x / (0.25 * alpha**2 + sigma**2) for x in (0.25 * alpha, sigma))
        answer = (alpha * noise - sigma * signal) * noisy if prediction == "v" else noise * noisy
        return process.basis.inverse(answer).to(u)

    return Model("exact", process, Network(network, prediction), SHAPE, Gaussian(0.25))


def drawn(model: Model, plan: object, parallel: bool) -> Tensor:
    method = pf.Parallel(tolerance=1e-4) if parallel else None
    return pf.Diffusion(model, plan).run_by(parallel=method).sample(64)


RUNS = [("table", solver) for solver in NAMES]
RUNS += [(end, solver) for end in ENDS for solver in ("auto", "heun", "gddim", "unipc") if end != "table"]


@pytest.mark.parametrize(("end", "solver"), RUNS)
def test_samples_have_the_datas_deviation(end: str, solver: str) -> None:
    model = exact(ENDS[end])
    plan = SamplerSpec(solver, STEPS, grid=None if solver == "auto" else "uniform").plan(model)
    one_by_one = None if plan.implicit else drawn(model, plan, parallel=False)
    at_once = drawn(model, plan, parallel=True)
    assert at_once.std().item() == pytest.approx(DEVIATION, rel=0.15)
    if one_by_one is not None:
        torch.testing.assert_close(one_by_one, at_once, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["log-snr", "karras", "angle", "timesteps"])
@pytest.mark.parametrize("solver", ["heun", "rk4", "dpm++", "unipc", "gddim", "o-belm"])
def test_on_grids_whose_variable_has_no_end(solver: str, name: str) -> None:
    model = exact(ENDS["table"])
    spacing = {"spacing": "trailing"} if name == "timesteps" else {}
    plan = plan_of(model.process, solver, grid.GRIDS[name](model.process, STEPS, **spacing), {})
    assert drawn(model, plan, parallel=False).std().item() == pytest.approx(DEVIATION, rel=0.15)


@pytest.mark.parametrize("end", ENDS)
def test_there_is_no_signal_at_all(end: str) -> None:
    """And around it as much as the angle says: the noise and the signal of a quarter turn are mirror images."""
    process = ENDS[end]
    assert process.log_snr(times(1.0)).item() == -torch.inf
    if end != "naive":
        assert process.transition(times(1.0), times(0.0)).coefficients.abs().max() == 0
    if end == "cosine":
        near, far = (
            x.item() for x in (process.alpha_sigma(times(1 - 2**-40))[0], process.alpha_sigma(times(2**-40))[1])
        )
        assert near == pytest.approx(far, rel=1e-15)


def test_small_signals_keep_their_digits() -> None:
    """A table that falls to 1e-40: what is interpolated at its knots is the table."""
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.5, 300, dtype=torch.float64), 0)
    alpha, _ = Discrete(tuple(table.tolist())).alpha_sigma((torch.arange(300, dtype=torch.float64) + 1) / 300)
    torch.testing.assert_close(alpha, table.sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm++", "unipc", "auto", "collocation"])
@pytest.mark.parametrize("end", ["table", "cosine", "naive"])
def test_a_prediction_of_the_noise_says_nothing_there(end: str, solver: str) -> None:
    model = exact(ENDS[end], "epsilon")
    plan = SamplerSpec(solver, 8, grid=None if solver == "auto" else "uniform").plan(model)
    for parallel in (False, True)[plan.implicit :]:
        with pytest.raises(pf.PushforwardError, match="says nothing about the image"):
            drawn(model, plan, parallel)
    drawn(exact(ENDS[end]), plan, parallel=True)


@pytest.mark.parametrize("solver", ["ddim", "heun", "gddim", "auto"])
def test_pipelines_end_with_the_datas_deviation(solver: str) -> None:
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    network = exact(ENDS["table"]).denoiser.module
    u = torch.randn(64, *SHAPE)
    scheduler = pf.PushforwardScheduler(diffusers.DDIMScheduler(**settings, prediction_type="v_prediction"), solver)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        u = scheduler.step(network(u, (t.double().expand(64) + 1) / 1000, None), t, u).prev_sample
    assert u.std().item() == pytest.approx(DEVIATION, rel=0.15)
    scheduler = pf.PushforwardScheduler(diffusers.DDIMScheduler(**settings), solver)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(pf.PushforwardError, match="says nothing about the image"):
        scheduler.step(u, scheduler.timesteps[0], u)


# -- far outside ------------------------------------------------------------------------------------------------------


def wrong(scale: float, process: Process) -> Model:
    """A network whose images are `scale` times too large."""
    return Model("wrong", process, Network(lambda u, t, c: scale * u[:, :1], "sample"), SHAPE, Gaussian(0.25))


@pytest.mark.parametrize("process", [VP(), PROCESSES["langevin"], PROCESSES["ve"]], ids=lambda p: p.name)
def test_samples_that_no_data_are_near_are_noticed(process: Process) -> None:
    model = wrong(1e4, process)
    plan = SamplerSpec("ddim", 1).plan(model)
    with pytest.warns(FarOutside, match="'wrong' reach"):
        pf.Diffusion(model, plan).sample(2)
    with pytest.warns(FarOutside, match="they are no images"):
        pf.Diffusion(model, plan).decode(pf.Code(torch.randn(model.state_shape(1))))


def test_pipelines_notice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the logger that diffusers' schedulers have."""
    told: list[str] = []
    monkeypatch.setattr(diffusers.logging.get_logger("pushforward.integrations.diffusers"), "warning", told.append)
    scheduler = pf.PushforwardScheduler(diffusers.DDIMScheduler(clip_sample=False), "ddim")
    scheduler.set_timesteps(1)
    scheduler.step(torch.full((1, *SHAPE), 1e5), scheduler.timesteps[0], torch.randn(1, *SHAPE))
    assert len(told) == 1
    assert "they are no images" in told[0]


def test_far_is_a_hundred_deviations_of_the_data() -> None:
    """Latents of unit variance may reach 90, images in [-1, 1] of deviation 1/2 45, data with a mean as much more."""
    for data, largest in (
        (Gaussian(1.0), 90.0),
        (Gaussian(0.25), 45.0),
        (Gaussian(1.0, torch.full(SHAPE, 9.0)), 900.0),
    ):
        assert far_outside(torch.full((1, *SHAPE), -largest), data, "data") is None
        assert far_outside(torch.full((1, *SHAPE), 1.2 * largest), data, "data")


def test_few_steps_are_not_far() -> None:
    """Warnings are errors here. One step of a good network is a blurred image, two of euler-maruyama are noisy."""
    model = pf.load("fashion-langevin")
    for solver in ("auto", "ddim", "dpm++", "heun", "euler-maruyama", "ddpm"):
        for steps in (1, 2):
            plan = SamplerSpec(solver, steps).plan(model)
            assert pf.Diffusion(model, plan).given(torch.arange(2)).sample(2).isfinite().all()


def test_the_command_line_says_it_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And writes the picture."""
    monkeypatch.setattr("pushforward.cli._shared.models.load", lambda *_, **__: wrong(1e4, VP()))
    out = tmp_path / "out.png"
    command = ["pushforward", "sample", "wrong", "--solver", "ddim", "--steps", "1", "--count", "1", "--quiet"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("default")  # as it is outside tests
        main()
    assert left.value.code == 1
    told = capsys.readouterr().err.strip()
    assert "they are no images" in told
    assert "\n" not in told
    assert out.is_file()

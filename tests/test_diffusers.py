"""Models of `diffusers`: what is read from their folders, and our solvers against their schedulers on one network.

Networks have random weights and are saved by the tests. Most comparisons run in float64 with our float64 table put
into the scheduler, which leaves the two formulas alone to differ: 1e-9. Schedulers that keep their coefficients and
states in float32 whatever they are given are compared at 2e-5 of the largest value in a state, some hundred roundings.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import pushforward as pf
from pushforward.execute import run
from pushforward.linear import Discrete
from pushforward.model import Model, schedulers
from pushforward.model.diffusers import diffusers_model
from pushforward.plan import Plan, ddim, ddpm, dpm_solver_pp, grid, runge_kutta, unipc

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # of diffusers

EXACT, SINGLE = 1e-9, 2e-5
STEPS = 10
SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}
SPACINGS = ["leading", "linspace", "trailing"]


def network(**changes: Any) -> diffusers.UNet2DModel:
    torch.manual_seed(1)
    return diffusers.UNet2DModel(**{**SIZES, **changes}).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> diffusers.UNet2DModel:
    return network()


@pytest.fixture
def save(tmp_path: Path, unet: diffusers.UNet2DModel) -> Callable[..., Path]:
    """Writes a pipeline of a scheduler and the network (or another), and says where."""

    def write(scheduler: Any, net: Any = None) -> Path:
        folder = tmp_path / "model"
        diffusers.DDPMPipeline(net or unet, scheduler).save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def read(save: Callable[..., Path]) -> Callable[..., Model]:
    """The model of a scheduler, through its folder."""
    return lambda scheduler, net=None: diffusers_model(save(scheduler, net), dtype=torch.float64)


def state(seed: int = 0) -> Tensor:
    return torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normals(count: int) -> list[Tensor]:
    return [state(100 + k) for k in range(count)]


def share_table(scheduler: Any, process: Discrete) -> None:
    """Our table in the scheduler's place."""
    scheduler.alphas_cumprod = torch.tensor(process.alphas_cumprod, dtype=torch.float64)
    if getattr(scheduler, "final_alpha_cumprod", 1) != 1:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]


def theirs(scheduler: Any, unet: Any, u: Tensor, **settings: Any) -> Tensor:
    """The scheduler's own loop; a list among the settings has one value a step."""
    for k, t in enumerate(scheduler.timesteps):
        now = {name: value[k] if isinstance(value, list) else value for name, value in settings.items()}
        answer = unet(scheduler.scale_model_input(u, t).to(unet.dtype), t).sample
        u = scheduler.step(answer, t, u, **now).prev_sample
    return u


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * max(size, 1), f"{error:.2e} of {size:.2e}"


# -- the schedule ---------------------------------------------------------------------------------------------------

TABLES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "trained": {"trained_betas": [0.001 * 1.02**n for n in range(200)]},
    "zero": {"rescale_betas_zero_snr": True},
    "short": {"num_train_timesteps": 50, "beta_end": 0.3},
}


@pytest.mark.parametrize("settings", TABLES.values(), ids=TABLES)
def test_tables_are_those_of_diffusers(settings: dict[str, Any]) -> None:
    scheduler = diffusers.DDPMScheduler(**settings)
    ours = schedulers.alphas_cumprod(scheduler.config)
    assert ours.dtype == torch.float64
    # 1 - beta in float32 is off by 3e-8, and a thousand of these are multiplied; near zero SNR, by what is taken off.
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    Discrete(tuple(ours.tolist()))


SOLVERS = {
    "DDPM": {}, "DDIM": {}, "PNDM": {"set_alpha_to_one": True}, "DEISMultistep": {}, "DPMSolverMultistep": {},
    "DPMSolverSinglestep": {"beta_schedule": "scaled_linear"}, "UniPCMultistep": {}, "EulerDiscrete": {},
    "EulerAncestralDiscrete": {}, "HeunDiscrete": {}, "LMSDiscrete": {}, "KDPM2Discrete": {}, "KDPM2AncestralDiscrete": {},
}  # fmt: skip
ZERO_SNR = {"DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete"}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_scheduler_with_a_table_is_read(name: str, read: Callable[..., Model]) -> None:
    """Also its defaults: a file that says nothing stands for what the class does by itself."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SOLVERS[name])
    process = read(scheduler).process
    assert isinstance(process, Discrete)
    table = torch.tensor(process.alphas_cumprod, dtype=torch.float64)
    torch.testing.assert_close(table, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    bare = schedulers.read_schedule({"_class_name": f"{name}Scheduler"}, Path("file"))
    default = getattr(diffusers, f"{name}Scheduler")()
    table = torch.tensor(bare.process.alphas_cumprod, dtype=torch.float64)
    torch.testing.assert_close(table, default.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", sorted(ZERO_SNR))
def test_zero_terminal_snr_as_each_scheduler_has_it(name: str) -> None:
    """Those that divide by the last alpha leave it 2^-24; the others none."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(rescale_betas_zero_snr=True)
    config = {**scheduler.config, "_class_name": f"{name}Scheduler"}
    process = schedulers.read_schedule(config, Path("file")).process
    assert process.alphas_cumprod[-1] == scheduler.alphas_cumprod[-1].item()


@pytest.mark.parametrize("steps", [4, 10, 27])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DEISMultistep", "DPMSolverMultistep", "UniPCMultistep"])
def test_default_grids_are_the_schedulers_timesteps(name: str, spacing: str, steps: int) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    schedule = schedulers.read_schedule({**scheduler.config, "_class_name": f"{name}Scheduler"}, Path("file"))
    times = grid.default(schedule.process, steps, **schedule.grid)
    asked = (times[:-1] * 1000 - 1).round().long()
    expected = scheduler.timesteps
    if name == "DEISMultistep" and expected[-1] == 0:  # its last step goes from timestep 0 to timestep 0
        expected = expected[:-1]
    assert asked.tolist() == expected.tolist()
    assert times[-1].item() == (0.001 if name == "DEISMultistep" else 0)


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"])
def test_karras_grids_have_the_schedulers_noise_levels(name: str) -> None:
    # no warning of this scheduler's is ours to heed
    scheduler = getattr(diffusers, f"{name}Scheduler")(use_karras_sigmas=True, beta_start=0.0001, beta_end=0.02)
    scheduler.set_timesteps(8)
    schedule = schedulers.read_schedule({**scheduler.config, "_class_name": f"{name}Scheduler"}, Path("file"))
    times = grid.default(schedule.process, 8, **schedule.grid)
    ours = torch.exp(-schedule.process.log_snr(times[:-1]))
    torch.testing.assert_close(ours, scheduler.sigmas.unique().flip(0)[:-1].double(), rtol=1e-5, atol=0)


# -- solvers --------------------------------------------------------------------------------------------------------


def quirky_arrivals(process: Discrete, model: Model, steps: int) -> Tensor:
    """Where diffusers' DDIM steps go: N // steps timesteps on, wherever its next timestep is."""
    asked = grid.asked_timesteps(process, steps, model.grid["spacing"], model.grid["offset"])
    previous = asked - process.timesteps // steps
    return torch.where(previous >= 0, (previous + 1) / process.timesteps, model.grid["final"])


def ddim_pair(read: Callable[..., Model], unet: Any, eta: float, steps: int = STEPS, **settings: Any) -> None:
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False, **settings})
    model = read(scheduler)
    share_table(scheduler, model.process)
    times = grid.default(model.process, steps, **model.grid)
    arrivals = quirky_arrivals(model.process, model, steps)[: len(times) - 1]
    plan = ddim(model.process, times, eta=eta, arrivals=arrivals)
    noises = normals(steps)
    ours = run(plan, model.denoiser, state(), noise=lambda k: noises[k - 1])
    scheduler.set_timesteps(steps)
    assert_close(
        ours,
        theirs(scheduler, unet, state(), eta=eta, variance_noise=noises, use_clipped_model_output=True),
        EXACT,
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim(spacing: str, eta: float, read: Callable[..., Model], unet: Any) -> None:
    ddim_pair(read, unet, eta, timestep_spacing=spacing)


VARIANTS: dict[str, dict[str, Any]] = {
    "no alpha one": {"set_alpha_to_one": False},
    "no alpha one, linspace": {"set_alpha_to_one": False, "timestep_spacing": "linspace"},
    "offset": {"steps_offset": 1, "set_alpha_to_one": False},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "zero snr, sample": {"rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "linspace"},
    "clip": {"clip_sample": True, "clip_sample_range": 0.9},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
    "short": {"num_train_timesteps": 40, "beta_end": 0.4},
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_ddim_variants(settings: dict[str, Any], eta: float, read: Callable[..., Model], unet: Any) -> None:
    ddim_pair(read, unet, eta, **settings)


def test_ddim_of_uneven_steps(read: Callable[..., Model], unet: Any) -> None:
    """7 does not divide 1000: linspace and trailing are then irregular."""
    for spacing in SPACINGS:
        ddim_pair(read, unet, 0.5, steps=7, timestep_spacing=spacing)


def test_ddim_untouched(read: Callable[..., Model], unet: Any) -> None:
    """With the scheduler's float32 table as it is: 1e-5 of the state, what the table differs by."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    model = read(scheduler)
    plan = ddim(model.process, grid.default(model.process, STEPS, **model.grid))
    scheduler.set_timesteps(STEPS)
    assert_close(run(plan, model.denoiser, state()), theirs(scheduler, unet, state(), eta=0.0), 1e-5)


def ddpm_pair(read: Callable[..., Model], unet: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ours and theirs, and the deviation of the noise that theirs add to the result."""
    scheduler = diffusers.DDPMScheduler(**{"clip_sample": False, **settings})
    model = read(scheduler)
    share_table(scheduler, model.process)
    large = settings.get("variance_type") == "fixed_large"
    times = grid.default(model.process, STEPS, **model.grid)
    plan = ddpm(model.process, times, variance="large" if large else "small")
    draw = torch.Generator().manual_seed(5)
    ours = run(plan, model.denoiser, state(), noise=lambda _: torch.randn(3, 2, 8, 8, generator=draw).double())
    ours_next = torch.randn(3, 2, 8, 8, generator=draw).double()
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(5)
    last = (1 - scheduler.alphas_cumprod[scheduler.timesteps[-1]]).sqrt() if large and scheduler.timesteps[-1] else 0
    single = unet  # noises are drawn in the answers' dtype; in float32 they are the same numbers for both

    def drawn(shape: Any, **_: Any) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    module = sys.modules[diffusers.DDPMScheduler.__module__]
    original, module.randn_tensor = module.randn_tensor, drawn
    try:
        return ours, theirs(scheduler, single, state()), last * ours_next
    finally:
        module.randn_tensor = original


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(spacing: str, variance: str, read: Callable[..., Model], unet: Any) -> None:
    """Where its last timestep is not 0, diffusers adds noise of `fixed_large` to the finished image; the paper does not."""
    ours, reference, noise = ddpm_pair(read, unet, timestep_spacing=spacing, variance_type=variance)
    assert_close(ours + noise, reference, EXACT)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_sample": True},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 2.0},
        {"prediction_type": "v_prediction", "steps_offset": 1},
        {"prediction_type": "sample", "beta_schedule": "sigmoid"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_ddpm_variants(settings: dict[str, Any], read: Callable[..., Model], unet: Any) -> None:
    ours, reference, _ = ddpm_pair(read, unet, **settings)
    assert_close(ours, reference, EXACT)

"""Models of `diffusers`: what is read from their folders, and our solvers against their schedulers on one network.

Networks have random weights and are saved by the tests. Most comparisons run in float64 with our float64 table put
into the scheduler, which leaves the two formulas alone to differ: 1e-9. Schedulers that keep their coefficients and
states in float32 whatever they are given are compared at 2e-5 of the largest value in a state, some hundred roundings.
"""

import contextlib
import importlib
import inspect
import json
import pkgutil
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import pushforward as pf
from pushforward.execute import run
from pushforward.linear import Discrete
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.model.diffusers import schedules as schedulers
from pushforward.model.diffusers.load import diffusers_model
from pushforward.model.diffusers.tables import alphas_cumprod
from pushforward.plan import Plan, ddim, ddpm, dpm_solver_pp, grid, runge_kutta, unipc
from support.helpers import assert_close
from support.models import edit

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # of diffusers
]

EXACT, SINGLE = 1e-9, 2e-5
STEPS = 6
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
        seen = scheduler.scale_model_input(u, t) if hasattr(scheduler, "scale_model_input") else u
        answer = unet(seen.to(unet.dtype), t).sample
        u = scheduler.step(answer, t, u, **now).prev_sample
    return u


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
    ours = alphas_cumprod(scheduler.config)
    assert ours.dtype == torch.float64
    # 1 - beta in float32 is off by 3e-8, and a thousand of these are multiplied; near zero SNR, by what is taken off.
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    Discrete(tuple(ours.tolist()))


SOLVERS = {
    "DDPM": {}, "DDIM": {}, "CogVideoXDDIM": {}, "CogVideoXDPM": {},
    "PNDM": {"set_alpha_to_one": True}, "DEISMultistep": {}, "DPMSolverMultistep": {},
    "DPMSolverSinglestep": {"beta_schedule": "scaled_linear"}, "UniPCMultistep": {}, "EulerDiscrete": {},
    "EulerAncestralDiscrete": {}, "HeunDiscrete": {}, "LMSDiscrete": {}, "KDPM2Discrete": {},
    "KDPM2AncestralDiscrete": {},
}  # fmt: skip


def table_of(name: str, scheduler: Any) -> Tensor:
    """The table we read from a scheduler's settings."""
    schedule = schedulers.read_schedule({**scheduler.config, "_class_name": f"{name}Scheduler"}, Path("file"))
    assert isinstance(schedule.process, Discrete)
    return torch.tensor(schedule.process.alphas_cumprod, dtype=torch.float64)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_scheduler_with_a_table_is_read(name: str) -> None:
    """Also its defaults: a file that says nothing stands for what the class does by itself."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=100, **SOLVERS[name])
    torch.testing.assert_close(table_of(name, scheduler), scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    bare = schedulers.read_schedule({"_class_name": f"{name}Scheduler", "num_train_timesteps": 100}, Path("file"))
    scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=100)
    table = torch.tensor(bare.process.alphas_cumprod, dtype=torch.float64)
    torch.testing.assert_close(table, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["DDPM", "DDIM", "CogVideoXDPM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"]
)
def test_zero_terminal_snr_is_zero(name: str) -> None:
    """Some schedulers put 2^-24 = 6e-8 at the end, which is more than the entry before it: not a noise schedule."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(rescale_betas_zero_snr=True)
    ours = table_of(name, scheduler)
    assert ours[-1] == 0
    torch.testing.assert_close(ours[:-1], scheduler.alphas_cumprod[:-1].double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 4, 10, 27])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "name", ["DDPM", "DDIM", "EulerDiscrete", "DEISMultistep", "DPMSolverMultistep", "UniPCMultistep"]
)
def test_default_grids_are_the_schedulers_timesteps(name: str, spacing: str, steps: int) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    schedule = schedulers.read_schedule({**scheduler.config, "_class_name": f"{name}Scheduler"}, Path("file"))
    times = grid.default(schedule.process, steps, **schedule.grid)
    asked = times[:-1] * 1000 - 1
    expected = scheduler.timesteps
    if name == "DEISMultistep" and expected[-1] == 0:  # its last step goes from timestep 0 to timestep 0
        expected = expected[:-1]
    assert asked.tolist() == pytest.approx(expected.tolist(), abs=1e-3)  # Euler's are fractions, in float32
    assert times[-1].item() == (0.001 if name == "DEISMultistep" else 0)


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"])
def test_karras_grids_have_the_schedulers_noise_levels(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(use_karras_sigmas=True, beta_start=0.0001, beta_end=0.02)
    scheduler.set_timesteps(8)
    schedule = schedulers.read_schedule({**scheduler.config, "_class_name": f"{name}Scheduler"}, Path("file"))
    times = grid.default(schedule.process, 8, **schedule.grid)
    ours = torch.exp(-schedule.process.log_snr(times[:-1]))
    # 1 - 0.9999 in float32, of which the smallest is made, is off by 2e-4
    torch.testing.assert_close(ours, scheduler.sigmas.unique().flip(0)[:-1].double(), rtol=2e-4, atol=0)


# What is done about every setting of every scheduler that is read, and a value that shows it. "honoured": it changes
# what is read; "solver": of the scheduler's own solver, in whose place is ours; "refused": it would change the images.
SETTINGS: dict[str, tuple[str, Any]] = {
    "num_train_timesteps": ("honoured", 50), "beta_start": ("honoured", 0.0003), "beta_end": ("honoured", 0.015),
    "beta_schedule": ("honoured", "squaredcos_cap_v2"), "trained_betas": ("honoured", [0.02] * 1000),
    "rescale_betas_zero_snr": ("honoured", True), "snr_shift_scale": ("honoured", 1.0),
    "prediction_type": ("honoured", "v_prediction"),
    "clip_sample": ("honoured", None), "clip_sample_range": ("honoured", 0.5), "thresholding": ("honoured", True),
    "dynamic_thresholding_ratio": ("honoured", 0.9), "sample_max_value": ("honoured", 2.0),
    "variance_type": ("honoured", "fixed_large"),  # of `ddpm`; a learned variance is left aside
    "timestep_spacing": ("honoured", "trailing"), "steps_offset": ("honoured", 1),
    "set_alpha_to_one": ("honoured", None),
    "use_karras_sigmas": ("honoured", True), "use_exponential_sigmas": ("honoured", True),
    "use_beta_sigmas": ("honoured", True), "use_lu_lambdas": ("honoured", True), "use_flow_sigmas": ("honoured", True),
    "flow_shift": ("honoured", 3.0), "use_dynamic_shifting": ("honoured", True),
    "time_shift_type": ("honoured", "linear"),
    "final_sigmas_type": ("honoured", "sigma_min"), "lambda_min_clipped": ("honoured", -2.0),
    "sigma_min": ("honoured", 0.05), "sigma_max": ("honoured", 60.0), "sigma_data": ("honoured", 1.0),
    "sigma_schedule": ("honoured", "exponential"), "rho": ("honoured", 5.0),
    "timestep_type": ("honoured", "continuous"),
    "shift": ("honoured", 3.0), "shift_terminal": ("honoured", 0.1), "base_shift": ("honoured", 0.4),
    "max_shift": ("honoured", 1.3), "base_image_seq_len": ("honoured", 100), "max_image_seq_len": ("honoured", 5000),
    "sampling_eps": ("honoured", 0.1),
    "invert_sigmas": ("honoured", True), "stochastic_sampling": ("refused", True),
    "scale_factors": ("refused", [1.0, 2.0]), "upscale_mode": ("solver", "nearest"),
    "interpolation_type": ("refused", "log_linear"),
    "solver_order": ("solver", 3), "algorithm_type": ("solver", "x"), "solver_type": ("solver", "x"),
    "lower_order_final": ("solver", False), "euler_at_final": ("solver", True), "predict_x0": ("solver", False),
    "disable_corrector": ("solver", [0]), "solver_p": ("solver", None), "skip_prk_steps": ("solver", True),
    "snr": ("solver", 0.2), "correct_steps": ("solver", 2),
}  # fmt: skip
TOGETHER: dict[str, dict[str, Any]] = {  # without which a setting has no effect
    "clip_sample_range": {"clip_sample": True}, "dynamic_thresholding_ratio": {"thresholding": True},
    "sample_max_value": {"thresholding": True}, "flow_shift": {"use_flow_sigmas": True},
    "steps_offset": {"timestep_spacing": "leading"}, "timestep_type": {"prediction_type": "v_prediction"},
}  # fmt: skip
SHIFTED = (
    "use_dynamic_shifting",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)


def scheduler_classes() -> dict[str, Any]:
    """All that the package has."""
    found = {}
    for module in pkgutil.iter_modules(diffusers.schedulers.__path__):
        with contextlib.suppress(ImportError):  # some need more packages, which does not make them readable
            members = vars(importlib.import_module(f"diffusers.schedulers.{module.name}"))
            found |= {n: c for n, c in members.items() if n.endswith("Scheduler") and hasattr(c, "from_config")}
    return found


def keys_of(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}


def test_all_schedulers_are_read_or_refused_and_all_settings_known() -> None:
    classes = scheduler_classes()
    known = set(schedulers.READERS) & set(classes)
    assert set(schedulers.READERS) - known <= {"CosineDPMSolverMultistepScheduler"}  # it needs torchsde
    for name in set(classes) - set(schedulers.READERS):
        with pytest.raises(pf.PushforwardError, match=f"{name}, which cannot be read|consistency model"):
            schedulers.read_schedule({"_class_name": name}, Path("file"))
    keys = {key for name in known for key in keys_of(classes[name])}
    assert keys == set(SETTINGS)


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_are_honoured_or_refused(key: str) -> None:
    """In every class that has it."""
    kind, value = SETTINGS[key]
    some = False
    for name in (n for n in schedulers.READERS if key in keys_of(getattr(diffusers, n))):
        keys = keys_of(getattr(diffusers, name))
        base = {k: v for k, v in TOGETHER.get(key, {}).items() if k in keys}
        base |= (
            {"use_karras_sigmas": True}
            if key in ("sigma_min", "sigma_max", "timestep_type") and "Edm" not in name
            else {}
        )
        if key in SHIFTED or key == "shift_terminal":
            base |= {"use_flow_sigmas": True} if "use_flow_sigmas" in keys else {}
            base |= {"use_dynamic_shifting": True} if key in SHIFTED[1:] else {}
        now = value
        if value is None and kind == "honoured":
            now = not inspect.signature(getattr(diffusers, name).__init__).parameters[key].default
        read = [
            {**{k: v for k, v in config.items() if k in keys}, "_class_name": name}
            for config in (base, {**base, key: now})
        ]
        if kind == "refused":
            schedulers.read_schedule(read[0], Path("file"), 300)
            with pytest.raises(pf.PushforwardError, match=key):
                schedulers.read_schedule(read[1], Path("file"), 300)
            some = True
            continue
        before, after = (facts(schedulers.read_schedule(config, Path("file"), 300)) for config in read)
        assert kind != "solver" or before == after, name
        some |= before != after
    assert some == (kind != "solver")


def facts(schedule: Any) -> Any:
    network = {k: v for k, v in schedule.network.items() if k not in ("clock", "reference", "input_reference")}
    reference = None if schedule.reference is None else schedule.reference.variance
    return schedule.process, network, schedule.grid, schedule.solvers, reference, schedule.gain


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
GRIDS: list[tuple[str, dict[str, Any]]] = [
    *(("FlowMatchEulerDiscrete", {**more, **bend}) for more in (
        {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
        for bend in ({}, {"shift": 3.0}, {"shift": 2.0, "shift_terminal": 0.1})),
    *((name, {f"use_{rule}_sigmas": True, "timestep_spacing": spacing})
        for name in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "DPMSolverMultistep", "UniPCMultistep")
        for rule in ("karras", "exponential", "beta") for spacing in ("linspace", "trailing")),
    ("EulerDiscrete", {"timestep_spacing": "linspace"}), ("DPMSolverMultistep", {"use_lu_lambdas": True}),
    ("EulerDiscrete", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
    ("EulerDiscrete", {"use_karras_sigmas": True, "sigma_min": 0.1, "final_sigmas_type": "sigma_min"}),
    *(("EulerDiscrete", {f"use_{rule}_sigmas": True, "rescale_betas_zero_snr": True, "timestep_spacing": spacing})
        for rule in ("karras", "exponential", "beta") for spacing in ("linspace", "leading")),
    ("DEISMultistep", {"use_karras_sigmas": True}),
    *(("DPMSolverMultistep", {"lambda_min_clipped": -2.0, "timestep_spacing": spacing}) for spacing in SPACINGS),
    ("DPMSolverSinglestep", {"lambda_min_clipped": -2.0}),
    ("UniPCMultistep", {**FLOW, "flow_shift": 3.0}), ("UniPCMultistep", {**FLOW, "use_karras_sigmas": True}),
    ("UniPCMultistep", {**FLOW, "flow_shift": 2.0, "shift_terminal": 0.1, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistep", {"use_beta_sigmas": True, "sigma_min": 0.05, "final_sigmas_type": "sigma_min"}),
    ("EDMEuler", {"final_sigmas_type": "sigma_min"}), ("EDMDPMSolverMultistep", {"rho": 3.0}),
]  # fmt: skip


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize(("name", "settings"), GRIDS, ids=str)
def test_noise_levels_are_the_schedulers(name: str, settings: dict[str, Any], steps: int) -> None:
    """Theirs are float32, of a float32 table: 2e-4, as above. A level that is there twice is no step."""
    table = {"beta_start": 0.0001, "beta_end": 0.02} if "Flow" not in name and "EDM" not in name else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**table, **settings)
    scheduler.set_timesteps(steps)
    schedule = schedulers.read_schedule({**scheduler.config, "_class_name": f"{name}Scheduler"}, Path("file"))
    times = grid.default(schedule.process, steps, **schedule.grid)
    ours = times if schedule.process.name == "flow" else torch.exp(-schedule.process.log_snr(times))
    theirs = scheduler.sigmas.double()
    theirs = theirs[torch.cat([torch.tensor([True]), theirs.diff().abs() > 1e-6 * theirs[:-1]])]
    torch.testing.assert_close(ours, theirs, rtol=3e-4, atol=2e-6)


def test_one_step_is_not_stretched() -> None:
    """Theirs is 0 / 0."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1, "shift": 3.0}
    schedule = schedulers.read_schedule(config, Path("file"))
    assert grid.default(schedule.process, 1, **schedule.grid).tolist() == [1.0, 0.0]


def test_what_a_class_does_not_have_is_not_read() -> None:
    """As diffusers leaves it unread: files keep settings of other schedulers that they were made from."""
    plain, more = (
        schedulers.read_schedule({"_class_name": "DDIMScheduler", **config}, Path("file"))
        for config in ({}, {"use_karras_sigmas": True, "use_flow_sigmas": True, "final_sigmas_type": "sigma_min"})
    )
    assert facts(plain) == facts(more)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_the_variance_of_ddpm_is_the_schedulers(variance: str, read: Callable[..., Model]) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False)
    model = read(scheduler)
    found = SamplerSpec("ddpm", 4).plan(model)
    times = grid.default(model.process, 4, **model.grid)
    expected = ddpm(model.process, times, variance="large" if "large" in variance else "small")
    noises = [
        [float(plan.nodes[k].terms[("noise", k)].coefficients) for k in plan.noises] for plan in (found, expected)
    ]
    assert noises[0] == noises[1]
    ours = pf.PushforwardScheduler(scheduler, "ddpm")
    ours.set_timesteps(4)
    assert [float(ours._plan.nodes[k].terms[("noise", k)].coefficients) for k in ours._plan.noises] == noises[0]


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

    def drawn(shape: Any, **_: Any) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    module = sys.modules[diffusers.DDPMScheduler.__module__]
    original, module.randn_tensor = module.randn_tensor, drawn
    try:
        return ours, theirs(scheduler, unet, state()), last * ours_next
    finally:
        module.randn_tensor = original


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(spacing: str, variance: str, read: Callable[..., Model], unet: Any) -> None:
    """Where its last timestep is not 0, diffusers adds `fixed_large` noise to the finished image; DDPM does not."""
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


def pair(
    read: Callable[..., Model],
    unet: Any,
    scheduler: Any,
    solve: Callable[..., Plan],
    steps: int = STEPS,
    **settings: Any,
) -> None:
    """A scheduler that turns all it is given into float32, against a plan on its own grid."""
    model = read(scheduler)
    plan = solve(model.process, grid.default(model.process, steps, **model.grid))
    if isinstance(model.process, Discrete):
        share_table(scheduler, model.process)
    scheduler.set_timesteps(steps)
    noises = normals(steps)
    if settings.pop("noisy", False):
        settings["variance_noise"] = noises
    ours = run(plan, model.denoiser, state(), noise=lambda k: noises[k - 1])
    assert_close(ours, theirs(scheduler, unet, state(), **settings), SINGLE)


@pytest.mark.parametrize("steps", [1, 2, 6, 15])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver_2m(spacing: str, steps: int, read: Callable[..., Model], unet: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
    pair(read, unet, scheduler, dpm_solver_pp, steps)


@pytest.mark.parametrize("steps", [6, 15])
def test_dpm_solver_2m_to_the_first_timestep(steps: int, read: Callable[..., Model], unet: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", prediction_type="v_prediction")
    pair(read, unet, scheduler, dpm_solver_pp, steps)


@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpm_solver(order: int, read: Callable[..., Model], unet: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=order)
    pair(read, unet, scheduler, lambda p, g: dpm_solver_pp(p, g, order=order, noise=1.0), noisy=True)


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("lower_final", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, lower_final: bool, steps: int, read: Callable[..., Model], unet: Any) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, lower_order_final=lower_final, final_sigmas_type="zero" if lower_final else "sigma_min"
    )
    pair(read, unet, scheduler, lambda p, g: unipc(p, g, order=order, lower_final=lower_final), steps)


def in_sigma(scheduler: Any, process: Discrete, u: Tensor) -> Tensor:
    """A variance-preserving state in the units of the schedulers that count in sigma."""
    return u * (1 + scheduler.sigmas[0].double() ** 2).sqrt()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_schedulers_that_count_in_sigma(name: str, spacing: str, read: Callable[..., Model], unet: Any) -> None:
    """Euler's method in sigma is DDIM; Heun's is ours in its default coordinates. (The grids end at sigma = 0.)"""
    settings = {"timestep_spacing": spacing, "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "v_prediction"}
    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(**settings)
    model = read(scheduler)
    share_table(scheduler, model.process)
    scheduler.set_timesteps(STEPS)
    solve = ddim if name == "Euler" else runge_kutta
    ours = run(solve(model.process, grid.default(model.process, STEPS, **model.grid)), model.denoiser, state())
    assert_close(ours, theirs(scheduler, unet, in_sigma(scheduler, model.process, state())), SINGLE)


def test_heun_clips(read: Callable[..., Model], unet: Any) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(timestep_spacing="leading", clip_sample=True, clip_sample_range=0.5)
    model = read(scheduler)
    share_table(scheduler, model.process)
    scheduler.set_timesteps(STEPS)
    plan = runge_kutta(model.process, grid.default(model.process, STEPS, **model.grid))
    ours = run(plan, model.denoiser, state())
    assert_close(ours, theirs(scheduler, unet, in_sigma(scheduler, model.process, state())), SINGLE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_edm(name: str, spacing: str, prediction: str, read: Callable[..., Model], unet: Any) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        sigma_schedule=spacing, prediction_type=prediction, sigma_data=0.4
    )
    model = read(scheduler)
    assert (model.process.t_min, model.process.t_max) == (0.002, 80.0)
    assert model.reference.variance == pytest.approx(0.16)
    scheduler.set_timesteps(STEPS)
    times = grid.default(model.process, STEPS, **model.grid)
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=1e-5, atol=0)
    plan = (ddim if name == "EDMEuler" else dpm_solver_pp)(model.process, times)
    ours = run(plan, model.denoiser, 80 * state())
    # its noise levels are those of the float32 power 7: 1e-6, of 80 in the state at the start
    assert_close(ours, theirs(scheduler, unet, 80 * state()), 5 * SINGLE)


def test_euler_with_continuous_time_is_edm(read: Callable[..., Model], unet: Any) -> None:
    settings = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    scheduler = diffusers.EulerDiscreteScheduler(**settings, sigma_min=0.002, sigma_max=70.0)
    model = read(scheduler)
    scheduler.set_timesteps(STEPS)
    times = grid.default(model.process, STEPS, **model.grid)
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=1e-5, atol=0)
    ours = run(ddim(model.process, times), model.denoiser, 70 * state())
    assert_close(ours, theirs(scheduler, unet, 70 * state()), 5 * SINGLE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift: float, read: Callable[..., Model], unet: Any) -> None:
    """Euler's method on straight lines is DDIM."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    model = read(scheduler)
    scheduler.set_timesteps(STEPS)
    times = grid.default(model.process, STEPS, **model.grid)
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=1e-5, atol=1e-7)
    ours = run(ddim(model.process, times), model.denoiser, state())
    assert_close(ours, theirs(scheduler, unet, state()), SINGLE)
    euler = run(runge_kutta(model.process, times, tableau="euler"), model.denoiser, state())
    assert_close(ours, euler, EXACT)


def test_flow_matching_in_a_multistep_scheduler(read: Callable[..., Model]) -> None:
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    model = read(diffusers.DPMSolverMultistepScheduler(**settings))
    assert model.process.name == "flow"
    times = grid.default(model.process, 4, **model.grid)
    torch.testing.assert_close(times, torch.tensor([1, 6 / 7, 2 / 3, 0.4, 0], dtype=torch.float64))


def test_score_of_a_variance_exploding_model(read: Callable[..., Model]) -> None:
    """The pipeline's predictor is our DDPM of large variance, on images in [0, 1] where ours are in [-1, 1].

    Its steps go between levels of one table and the network is told those of another; `sampling_eps = 0` makes the
    two agree.
    """
    unet = network(time_embedding_type="fourier", center_input_sample=True)
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0, sampling_eps=0.0)
    model = read(scheduler, unet)
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)
    noise = normals(STEPS)
    times = grid.default(model.process, STEPS, **model.grid)
    torch.testing.assert_close(times[:-1], 2 * scheduler.sigmas.double(), rtol=1e-5, atol=0)
    ours = run(
        ddpm(model.process, times, variance="large"), model.denoiser, state() * 100, noise=lambda k: noise[k - 1]
    )
    u = (100 * state() + 1) / 2
    levels = [*scheduler.sigmas.double(), torch.tensor(0.0, dtype=torch.float64)]
    for k in range(STEPS):
        score = unet(u, levels[k] * torch.ones(3)).sample
        variance = levels[k] ** 2 - levels[k + 1] ** 2
        u = u + variance * score + (variance.sqrt() * noise[k] if k < STEPS - 1 else 0)
    assert_close(ours, 2 * u - 1, SINGLE)


# -- what belongs to the network ------------------------------------------------------------------------------------


def test_start_is_the_terminal_marginal(read: Callable[..., Model]) -> None:
    model = read(diffusers.EDMEulerScheduler())
    plan = ddim(model.process, grid.default(model.process, 4, **model.grid))
    start = pf.Diffusion(model, plan, dtype=torch.float64).start(state())
    torch.testing.assert_close(start, state() * (80**2 + 0.25) ** 0.5)


def test_batch_is_loop(read: Callable[..., Model]) -> None:
    model = read(diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=3.0))
    plan = ddim(model.process, grid.default(model.process, 5, **model.grid))
    whole = run(plan, model.denoiser, state())
    single = torch.cat([run(plan, model.denoiser, u) for u in state().split(1)])
    torch.testing.assert_close(whole, single, rtol=1e-11, atol=1e-11)


def test_classes(read: Callable[..., Model]) -> None:
    unet = network(num_class_embeds=3)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    model = read(scheduler, unet)
    assert model.classes == ("0", "1", "2")
    share_table(scheduler, model.process)
    plan = ddim(model.process, grid.default(model.process, 3, **model.grid))
    labels = torch.tensor([2, 0, 1])
    ours = run(plan, model.given(labels).denoiser, state())
    scheduler.set_timesteps(3)
    u = state()
    for t in scheduler.timesteps:
        u = scheduler.step(unet(u, t, class_labels=labels).sample, t, u).prev_sample
    assert_close(ours, u, EXACT)
    with pytest.raises(pf.PushforwardError, match="give a label"):
        run(plan, model.denoiser, state())


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_embedded_classes(kind: str, save: Callable[..., Path]) -> None:
    unet = network(class_embed_type=kind).float()  # diffusers embeds numbers in float32 whatever the weights are
    model = pf.load(save(diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"), unet))
    assert model.classes == ()
    condition = torch.tensor([1.0, 2.0, 7.0]) if kind == "timestep" else torch.randn(3, 16)
    u = state().float()
    ask = model.given(condition).denoiser.at(model.process, torch.tensor([0.5], dtype=torch.float64), u)
    torch.testing.assert_close(ask(0, u), unet(u, torch.tensor(499), class_labels=condition).sample)


def test_a_learned_variance_is_left_aside(read: Callable[..., Model]) -> None:
    unet = network(out_channels=4)
    model = read(
        diffusers.DDPMScheduler(variance_type="learned_range", prediction_type="sample", clip_sample=False), unet
    )
    ask = model.denoiser.at(model.process, torch.tensor([0.5], dtype=torch.float64), state())
    torch.testing.assert_close(ask(0, state()), unet(state(), torch.tensor(499)).sample[:, :2])


def test_learned_times_are_indices(read: Callable[..., Model]) -> None:
    unet = network(time_embedding_type="learned", num_train_timesteps=1000)
    model = read(diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False), unet)
    times = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    ask = model.denoiser.at(model.process, times, state())
    for n in (0, 1, 499, 998, 999):
        torch.testing.assert_close(ask(n, state()), unet(state(), torch.tensor(n)).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(dtype: torch.dtype, save: Callable[..., Path], unet: Any) -> None:
    """States stay in their own dtype; 8 bits of a bfloat16 weight are 0.4% each."""
    folder = save(diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False))
    model = pf.load(folder, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.module.parameters()} == {dtype}
    plan = ddim(model.process, grid.default(model.process, 3, **model.grid))
    images = pf.Diffusion(model, plan).sample(2)
    assert images.dtype == torch.float32
    expected = pf.Diffusion(pf.load(folder), plan).sample(2)
    assert_close(images, expected, 0.03)


# -- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pipeline", "bare", "bare, scheduler apart", "flat pipeline", "pickled"])
def test_layouts(layout: str, save: Callable[..., Path], tmp_path: Path, unet: Any) -> None:
    folder = save(diffusers.DDIMScheduler(beta_end=0.03))
    if layout.startswith("bare"):
        bare = tmp_path / "bare"
        shutil.copytree(folder / "unet", bare)
        place = bare / "scheduler" if "apart" in layout else bare
        shutil.copytree(folder / "scheduler", place, dirs_exist_ok=True)
        folder = bare
    elif layout == "flat pipeline":
        for name in ("unet", "scheduler"):
            shutil.copytree(folder / name, folder, dirs_exist_ok=True)
            shutil.rmtree(folder / name)
    elif layout == "pickled":
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    model = pf.load(str(folder), dtype=torch.float64)
    assert model.shape == (2, 8, 8)
    assert model.process.alphas_cumprod[0] == pytest.approx(0.9999)
    assert model.name == folder.name
    assert model.info["scheduler"] == "DDIMScheduler"
    weights = unet.state_dict()
    assert all(torch.equal(p, weights[n]) for n, p in model.module.unet.state_dict().items())
    assert not any(p.requires_grad for p in model.module.parameters())


def autoencoder(kind: str) -> Any:
    torch.manual_seed(2)
    shared = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 2, "scaling_factor": 0.5}
    shared |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    if kind == "VQModel":
        return diffusers.VQModel(**shared, num_vq_embeddings=16, vq_embed_dim=2).eval()
    return diffusers.AutoencoderKL(**shared, shift_factor=0.1).eval()


def test_ddim_pipeline(save: Callable[..., Path], tmp_path: Path) -> None:
    """From noise to pixels, in float32 and against all of the pipeline."""
    pipe = diffusers.DDIMPipeline(network().float(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    reference = pipe(
        2, torch.Generator().manual_seed(0), num_inference_steps=5, use_clipped_model_output=True, output_type="np"
    )
    model = pf.load(tmp_path)
    start = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = ddim(model.process, grid.default(model.process, 5, **model.grid))
    ours = model.images(run(plan, model.denoiser, start))
    expected = torch.from_numpy(reference.images).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        (ours / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4
    )  # float32, clipped at each step


@pytest.mark.parametrize("kind", ["VQModel", "AutoencoderKL"])
def test_latent_diffusion(kind: str, tmp_path: Path, unet: Any) -> None:
    decoder, scheduler = autoencoder(kind), diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    pipe = diffusers.LDMPipeline(decoder, network(sample_size=4).float(), scheduler)
    pipe.save_pretrained(tmp_path)
    if kind == "AutoencoderKL":
        index = json.loads((tmp_path / "model_index.json").read_text())
        index["vae"] = index.pop("vqvae")
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "vqvae").rename(tmp_path / "vae")
    model = pf.load(tmp_path)
    assert model.shape == (2, 4, 4)
    plan = ddim(model.process, grid.default(model.process, 4, **model.grid))
    latents = run(plan, model.denoiser, torch.randn(2, 2, 4, 4))
    shift = 0.1 if kind == "AutoencoderKL" else 0.0
    expected = decoder.decode(latents / 0.5 + shift).sample
    torch.testing.assert_close(model.images(latents), expected)
    found = decoder.encode(expected)
    clean = found.latents if kind == "VQModel" else found.latent_dist.mode()
    torch.testing.assert_close(model.latents(expected), (clean - shift) * 0.5)
    assert model.image_shape == (3, 8, 8)
    assert pf.Diffusion(model, plan).sample(1).shape == (1, 3, 8, 8)
    model.to("cpu")


def test_hub(monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path], unet: Any) -> None:
    import huggingface_hub

    folder, asked = save(diffusers.DDPMScheduler()), []
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "safe")

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        if any(pattern.endswith(".bin") for pattern in allow_patterns):
            torch.save(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = pf.load("someone/model", revision="v1")
    assert model.name == "someone/model"
    assert asked == [("someone/model", "v1")] * 3  # the index, its parts, again, as there are no safe weights
    (folder / "safe").rename(folder / "unet" / "diffusion_pytorch_model.safetensors")
    pf.load("someone/model")
    assert len(asked) == 5


# -- errors ---------------------------------------------------------------------------------------------------------


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "holds no model"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
    "no unet in index": (
        lambda f: edit(f / "model_index.json", unet=[None, None]),
        "cannot be called with these arguments",
    ),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "has no unet/config.json"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler/scheduler_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "lacks its weights"),
    "short weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "cannot be read"),
    "no bytes": (lambda f: (f / WEIGHTS).write_bytes(b""), "cannot be read"),
    "other weights": (lambda f: edit(f / "unet/config.json", block_out_channels=[4, 12]), "cannot be read"),
    "deeper": (lambda f: edit(f / "unet/config.json", layers_per_block=2), "cannot be read|lack"),
    "other network": (
        lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"),
        "is a UNet2DConditionModel alone",
    ),
    "no size": (lambda f: edit(f / "unet/config.json", sample_size=None), "sample_size"),
    "unknown block": (lambda f: edit(f / "unet/config.json", down_block_types=["A", "B"]), "cannot be read"),
    "scheduler": (lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="Odd"), "describes a Odd"),
    "schedule": (lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="odd"), "beta_schedule 'odd'"),
    "prediction": (lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="x"), "prediction_type 'x'"),
    "setting": (lambda f: edit(f / "scheduler/scheduler_config.json", beta_end="x"), "cannot be read"),
    "betas": (lambda f: edit(f / "scheduler/scheduler_config.json", trained_betas=[0.1, 2.0]), "decreasing values"),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_told_in_a_sentence(damage: Any, message: str, save: Callable[..., Path]) -> None:
    folder = save(diffusers.DDPMScheduler())
    damage(folder)
    with pytest.raises(pf.PushforwardError, match=message) as caught:
        diffusers_model(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 1200


def test_a_network_that_needs_more_than_an_image(save: Callable[..., Path]) -> None:
    folder = save(diffusers.DDPMScheduler(), network(in_channels=5))
    with pytest.raises(pf.PushforwardError, match="takes 5 channels and gives 2"):
        diffusers_model(folder)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(pf.PushforwardError, match="holds no model"):
        pf.load(tmp_path)
    with pytest.raises(pf.PushforwardError, match="the hub gives no model"):
        pf.load("nobody-at-all/nothing", revision="v9")
    with pytest.raises(pf.PushforwardError, match="the hub gives no model"):
        pf.load("no body/nothing")


@pytest.mark.parametrize("package", ["diffusers", "huggingface_hub"])
def test_without_the_extra(package: str, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(diffusers.DDPMScheduler()) if package == "diffusers" else "someone/model"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(pf.PushforwardError, match=r"pip install 'pushforward\[diffusers\]'"):
        pf.load(source)

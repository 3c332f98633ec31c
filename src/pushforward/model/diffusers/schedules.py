r"""What the configurations of `diffusers`' schedulers say: process, prediction and grid.

A scheduler's configuration mixes what a network was trained for with settings of one sampler. It is taken apart here:

| scheduler | process, at the network's time n | network |
|---|---|---|
| DDPM, DDIM, PNDM, DEIS, DPM-Solver, UniPC, | table `alphas_cumprod[n]`, | noise, v |
| Euler, Heun, LMS, KDPM2 | t = (n + 1) / N | or image |
| ScoreSdeVe | t = noise level of images in [-1, 1]; the network's are in [0, 1], n = t / 2 | score |
| EDMEuler, EDMDPMSolverMultistep | t = noise level, n = log(t) / 4 | residual |
| FlowMatchEuler, FlowMatchHeun, `use_flow_sigmas` | t, n = N t | velocity |

Schedulers that count in `sigma` (Euler to KDPM2) divide their state by `sqrt(1 + sigma^2)` before each call: in these
units it is the variance-preserving state of the same table. Clipping and thresholding belong to the network, so every
answer is bounded, and the noise is what fits the bounded answer (in `diffusers`' DDIM: `use_clipped_model_output`).
The way the scheduler places its steps becomes the model's grid, for `plan.grid.default`. The caller chooses the solver,
and the variance of DDPM's noise becomes the default for `ddpm`. A setting that would change the images and cannot be
honoured is an error. Entries that a scheduler's class does not know are ignored, as `diffusers` ignores them.

Networks get exact times. The multistep schedulers of `diffusers` round them where noise levels lie between timesteps
(`use_karras_sigmas`, `use_flow_sigmas` and similar), and begin flows at s = 1 - 1/N, here at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pushforward.data.faults import reason
from pushforward.errors import PushforwardError
from pushforward.linear import VE, Discrete, Flow, Gaussian, Process
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.tables import Settings, alphas_cumprod

__all__ = ["READERS", "Schedule", "read_schedule", "schedule_of", "settings_in_force"]

_MADE_ONCE = {  # settings that a scheduler's class makes something of when it is made, and does not look at again
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "snr_shift_scale", "set_alpha_to_one", "shift",
    "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",  # pipelines read these, as items
}  # fmt: skip
_CLOSE = 1e-3  # signal scales of a table; Euler's last is 2^-12 where others have 0


@dataclass(frozen=True)
class Schedule:
    """The content of a scheduler's configuration.

    Args:
        process: the diffusion.
        network: fields of `Network`.
        grid: value of `Model.grid`.
        solvers: value of `Model.solvers`.
        reference: reference Gaussian of the data, if stated.
        gain, scale, shift: the network is `gain * unet(scale u + shift, n)`.
    """

    process: Process
    network: Settings
    grid: Settings
    reference: Gaussian | None = None
    solvers: Mapping[str, Settings] = field(default_factory=dict)
    gain: float = 1.0
    scale: float = 1.0
    shift: float = 0.0


def read_schedule(config: Settings, path: Path | str, tokens: int | None = None, scheduler: Any = None) -> Schedule:
    """Read the schedule that a scheduler's file describes, with its class's defaults for what is left out.

    Args:
        config: the scheduler's configuration.
        path: the file that it was read from, or what it is, for messages.
        tokens: number of tokens per image, if the grid depends on it (`use_dynamic_shifting`).
        scheduler: the scheduler itself, if there is one: of an unknown one, its table `alphas_cumprod` is read.

    Raises:
        PushforwardError: the scheduler or one of its settings is unknown, or its table is not what they say.
    """
    name = config.get("trained") or config.get("_class_name")
    if name == "CMStochasticIterativeScheduler":
        raise PushforwardError(
            f"{path} belongs to a consistency model, not a diffusion; open it with pushforward.load_generator."
        )
    if name not in READERS and config.get("use_flow_sigmas"):
        return _flow({**config, "_class_name": name, "tokens": tokens})
    if name not in READERS and getattr(scheduler, "alphas_cumprod", None) is not None:
        return _tabled(config, scheduler)
    if name not in READERS:
        raise PushforwardError(f"{path} describes a {name}, which cannot be read here; known are {', '.join(READERS)}.")
    cls = getattr(import_diffusers(), str(name), None)
    if cls is None:
        raise PushforwardError(
            f"{path} describes a {name}, which this version of diffusers lacks; install a newer one."
        )
    parameters = signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
    try:
        own = {key: config.get(key, default) for key, default in defaults.items()}
        schedule = READERS[str(name)]({**own, "_class_name": name, "tokens": tokens})
    except PushforwardError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise PushforwardError(f"{path} has a setting that cannot be read: {reason(error)}.") from error
    table = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(schedule.process, Discrete) and table is not None:
        said = torch.tensor(schedule.process.alphas_cumprod, dtype=torch.float64, device="cpu")
        table = table.double().cpu()
        if table.shape != said.shape or float((table.sqrt() - said.sqrt()).abs().max()) > _CLOSE:
            raise PushforwardError(
                f"{path} has another table alphas_cumprod than its settings say; make a {name} whose trained_betas are "
                "those of the table."
            )
    return schedule


def settings_in_force(scheduler: Any) -> dict[str, Any]:
    """Return the settings that a scheduler goes by, given it or its configuration.

    Users set some later as attributes of the configuration (`pipe.scheduler.config.timestep_spacing = "trailing"`),
    which its items do not show.
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    later = {name: value for name, value in getattr(config, "__dict__", {}).items() if name not in _MADE_ONCE}
    return {name: later.get(name, value) for name, value in config.items()}


def _tabled(settings: Settings, scheduler: Any) -> Schedule:
    """Read the table of any scheduler that has one."""
    process = Discrete(tuple(scheduler.alphas_cumprod.double().tolist()))
    network = {
        "prediction": _prediction({"prediction_type": "epsilon", **settings}),
        "time_scale": float(process.timesteps),
        "time_shift": -1.0,
    }
    return Schedule(process, {**network, **_bounds(settings)}, {})


def schedule_of(pipe: Any) -> Schedule:
    """Read the schedule of the scheduler that a pipeline holds in memory.

    Raises:
        PushforwardError: as `read_schedule`.
    """
    settings = {**settings_in_force(pipe.scheduler), "_class_name": type(pipe.scheduler).__name__}
    return read_schedule(settings, f"The scheduler of {type(pipe).__name__}", scheduler=pipe.scheduler)


_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "velocity"}


def _table(settings: Settings, *, multistep: bool = False) -> Schedule:
    """Read a scheduler with a table."""
    if settings.get("use_flow_sigmas"):
        return _flow(settings)
    prediction = _prediction(settings)
    table = alphas_cumprod(settings)
    process = Discrete(tuple(table.tolist()))
    if len(table) != settings["num_train_timesteps"]:
        raise PushforwardError(
            f"There are {len(table)} trained_betas, but num_train_timesteps is {settings['num_train_timesteps']}."
        )
    if settings.get("timestep_type") == "continuous" and prediction == "v":
        return _euler_edm(settings, process)
    _one_of(settings, "timestep_type", "discrete", "continuous")
    _one_of(settings, "interpolation_type", "linear")
    network = {"prediction": prediction, "time_scale": float(process.timesteps), "time_shift": -1.0}
    large = "large" in str(settings.get("variance_type"))
    return Schedule(
        process,
        {**network, **_bounds(settings)},
        _table_grid(settings, process, multistep),
        solvers={"ddpm": {"variance": "large"}} if large else {},
    )


def _unclipped(settings: Settings) -> Schedule:
    """Read a scheduler with a table that does not clip, whatever it says."""
    return _table({**settings, "clip_sample": False})


def _multistep(settings: Settings) -> Schedule:
    return _table(settings, multistep=True)


def _table_grid(settings: Settings, process: Discrete, multistep: bool) -> Settings:
    """Read where a scheduler with a table places its steps; multistep ones use the whole table."""
    spacing, offset = settings.get("timestep_spacing", "linspace"), settings.get("steps_offset", 0)
    _one_of({"timestep_spacing": spacing}, "timestep_spacing", "leading", "linspace", "trailing")
    to_zero = settings.get("set_alpha_to_one", _to_zero(settings))
    final = 0.0 if to_zero else process.t_min
    if (spread := _spread(settings)) is None:
        grid = {"name": "timesteps", "spacing": spacing, "offset": offset, "final": final, "drop_last": multistep}
        fractions = settings["_class_name"] in _FRACTIONS
        clipped = _clipped(settings, process)
        return {**grid, **({"whole": False} if fractions else {}), **({} if clipped is None else {"top": clipped})}
    given = {"low": settings.get("sigma_min"), "high": settings.get("sigma_max")}
    least, most = _levels(process)
    for key, level in zip(("sigma_min", "sigma_max"), given.values(), strict=True):
        if level is not None and not least * (1 - 1e-4) <= level <= most * (1 + 1e-4):
            raise PushforwardError(
                f"The noise level {key} = {level:g} lies outside the table's range, {least:g} to {most:g}."
            )
    ends = {key: level for key, level in given.items() if level is not None}
    return {
        "name": "levels",
        "spread": spread,
        **ends,
        **({} if multistep else {"spacing": spacing, "offset": offset}),
        **({"stay": True} if settings["_class_name"] in _STAYING and not to_zero else {"end": final}),
    }


def _to_zero(settings: Settings) -> bool:
    """Say whether the last step goes to clean data."""
    if settings["_class_name"] == "DEISMultistepScheduler":
        return False
    _one_of(settings, "final_sigmas_type", "zero", "sigma_min")
    return settings.get("final_sigmas_type", "zero") == "zero"


def _spread(settings: Settings) -> str | None:
    """Return the rule by which noise levels are placed, if there is one."""
    chosen = [rule for key, rule in _SPREADS.items() if settings.get(key)]
    if len(chosen) > 1:
        raise PushforwardError(f"Only one of {', '.join(_SPREADS)} can place the noise levels; got {len(chosen)}.")
    return chosen[0] if chosen else None


def _clipped(settings: Settings, process: Discrete) -> int | None:
    """Count the timesteps with a log-SNR of `lambda_min_clipped` or more, if some have less."""
    least = settings.get("lambda_min_clipped", -math.inf)
    times = (torch.arange(process.timesteps, dtype=torch.float64, device="cpu") + 1) * process.t_min
    count = int((process.log_snr(times) >= least).sum())
    return None if count == process.timesteps else count


def _levels(process: Discrete) -> tuple[float, float]:
    """Return the least and greatest noise level of a table."""
    least, most = torch.exp(
        -process.log_snr(torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu"))
    ).tolist()
    return least, most


def _one_of(settings: Settings, key: str, *known: str) -> None:
    if key in settings and settings[key] not in known:
        raise PushforwardError(
            f"The setting {key} = {settings[key]!r} is not supported; supported are {', '.join(known)}."
        )


def _euler_edm(settings: Settings, process: Discrete) -> Schedule:
    """Read Euler's `timestep_type: continuous`: EDM with data of unit variance, and v for the residual."""
    low, high = _levels(process)
    given = {"sigma_min": settings["sigma_min"] or low, "sigma_max": settings["sigma_max"] or high}
    spread = _spread(settings)
    if spread is None or (settings["timestep_spacing"] != "linspace" and given != {k: settings[k] for k in given}):
        raise PushforwardError(
            "timestep_type 'continuous' needs use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas to place "
            "noise levels, and sigma_min and sigma_max to bound them; the configuration lacks one of these."
        )
    return _edm({"rho": 7.0, **settings, **given, "sigma_schedule": spread, "sigma_data": 1.0, "least": low})


def _score(settings: Settings) -> Schedule:
    """Read a network of images in [0, 1]; here images are in [-1, 1], twice as far apart, and so is the noise."""
    process = VE(t_min=2 * settings["sigma_min"], t_max=2 * settings["sigma_max"])
    network = {"prediction": "score", "time_scale": 0.5}
    low = process.t_min * (process.t_max / process.t_min) ** settings["sampling_eps"]
    grid = {"name": "levels", "spread": "exponential", "low": low, "end": 0.0}
    return Schedule(process, network, grid, gain=0.5, scale=0.5, shift=0.5)


def _edm(settings: Settings) -> Schedule:
    """Read EDM (Karras et al., arXiv 2206.00364, table 1), which predicts the residual for N(0, sigma_data^2)."""
    prediction = settings["prediction_type"]
    if prediction not in ("epsilon", "v_prediction"):
        raise PushforwardError(
            f"Unknown prediction_type {prediction!r} of an EDM scheduler; known are epsilon and v_prediction."
        )
    process = VE(t_min=settings["sigma_min"], t_max=settings["sigma_max"])
    reference = Gaussian(settings["sigma_data"] ** 2)
    network = {
        "prediction": "residual",
        "clock": _quarter_log,
        "reference": reference,
        "input_reference": reference,
    }
    _one_of(settings, "sigma_schedule", "karras", "exponential", "beta")
    grid = {"name": "levels", "spread": settings["sigma_schedule"], "rho": settings["rho"]}
    end = 0.0 if _to_zero(settings) else settings.get("least", process.t_min)
    gain = -1.0 if prediction == "v_prediction" else 1.0
    return Schedule(process, {**network, **_bounds(settings)}, {**grid, "end": end}, reference, gain=gain)


def _quarter_log(t: Tensor) -> Tensor:
    return t.log() / 4


def _angle(t: Tensor) -> Tensor:
    return t.atan() / math.pi * 2


def _cosine(settings: Settings) -> Schedule:
    """Read Stable Audio's scheduler: EDM with v for the residual, told the angle of the noise level."""
    schedule = _edm({"sigma_schedule": "exponential", "rho": 7.0, **settings})
    return replace(schedule, network={**schedule.network, "clock": _angle})


def _flow(settings: Settings) -> Schedule:
    """Read a flow on straight lines. Settings that bend the grid's times do not bend those passed to the network."""
    if settings.get("stochastic_sampling"):
        raise PushforwardError("Flow models with stochastic_sampling cannot be read: every step renews all noise.")
    if settings.get("scale_factors"):
        raise PushforwardError("Flow models with scale_factors cannot be read: their states grow between steps.")
    count, spread = settings["num_train_timesteps"], _spread(settings)
    process = Flow(t_min=1 / count if count > 1 else 1e-3)
    back = bool(settings.get("invert_sigmas"))  # the network's time runs the other way, and so does its velocity
    clock = {"time_scale": -float(count), "time_shift": float(count)} if back else {"time_scale": float(count)}
    network = {"prediction": _prediction(settings), **clock, **_bounds(settings)}
    gain = -1.0 if back else 1.0
    grid: dict[str, Any] = {"name": "shifted", "shift": settings.get("shift", settings.get("flow_shift", 1.0))}
    if "shift" in settings:  # these move the end of their range, then all: twice
        grid["last"] = grid["shift"] / (count + grid["shift"] - 1)
    elif settings["_class_name"] == "UniPCMultistepScheduler":
        grid["beyond"] = 1 / count
    if settings.get("use_dynamic_shifting"):
        _one_of(settings, "time_shift_type", "exponential", "linear")
        grid["shift"] = _dynamic_shift(settings)
        grid |= {"last": 1 / count} if "last" in grid else {}
    if settings.get("shift_terminal"):
        grid["terminal"] = settings["shift_terminal"]
    if "shift" in settings:
        return Schedule(process, network, {**grid, **({} if spread is None else {"spread": spread})}, gain=gain)
    low, high = _levels(Discrete(tuple(alphas_cumprod(settings).tolist())))
    if spread is not None:  # at the noise levels of the table
        if settings["_class_name"] != "UniPCMultistepScheduler" or spread != "karras":
            raise PushforwardError(
                "A table's noise levels (use_karras_sigmas and similar) differ from those of use_flow_sigmas; set one."
            )
        low, high = settings["sigma_min"] or low, settings["sigma_max"] or high
        grid = {"name": "levels", "spread": spread, "low": low, "high": high}
    if not _to_zero(settings):
        grid |= {"stay": True} if settings["_class_name"] in _STAYING else {"end": low}
    return Schedule(process, network, grid, gain=gain)


def _dynamic_shift(settings: Settings) -> float:
    """Compute the shift, larger for larger images: linear in the tokens, or its exponent is; 1 if none is known."""
    if settings["tokens"] is None:
        return 1.0
    few, many = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    least, most = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
    mu = least + (most - least) * (settings["tokens"] - few) / (many - few)
    return math.exp(mu) if settings["time_shift_type"] == "exponential" else mu


def _prediction(settings: Settings) -> str:
    name = settings.get("prediction_type", "flow_prediction")
    if name not in _PREDICTIONS:
        raise PushforwardError(f"Unknown prediction_type {name!r}; known are {', '.join(_PREDICTIONS)}.")
    return _PREDICTIONS[name]


def _bounds(settings: Settings) -> Settings:
    """Read the bounds of the network's answer."""
    if settings.get("thresholding"):
        return {
            "threshold": settings["dynamic_thresholding_ratio"],
            "threshold_max": float(settings["sample_max_value"]),
        }
    return {"clip": float(settings["clip_sample_range"])} if settings.get("clip_sample") else {}


_SPREADS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "exponential",  # equal steps in log-SNR
    "use_beta_sigmas": "beta",
}
_FRACTIONS = (  # schedulers that ask for fractions of timesteps
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
_STAYING = ("DEISMultistepScheduler", "UniPCMultistepScheduler")  # their last noise level is that of the last call
READERS: dict[str, Callable[[Settings], Schedule]] = {
    "DDPMScheduler": _table,
    "DDPMParallelScheduler": _table,
    "DDIMScheduler": _table,
    "DDIMParallelScheduler": _table,
    "PNDMScheduler": _table,
    "CogVideoXDDIMScheduler": _unclipped,
    "CogVideoXDPMScheduler": _unclipped,
    "DEISMultistepScheduler": _multistep,
    "DPMSolverMultistepScheduler": _multistep,
    "DPMSolverSinglestepScheduler": _multistep,
    "UniPCMultistepScheduler": _multistep,
    "EulerDiscreteScheduler": _table,
    "EulerAncestralDiscreteScheduler": _table,
    "HeunDiscreteScheduler": _table,
    "LMSDiscreteScheduler": _table,
    "KDPM2DiscreteScheduler": _table,
    "KDPM2AncestralDiscreteScheduler": _table,
    "ScoreSdeVeScheduler": _score,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "CosineDPMSolverMultistepScheduler": _cosine,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
}

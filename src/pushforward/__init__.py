"""Diffusion models as maps between Gaussian codes and images.

    model = pushforward.load("fashion-vp")
    images = model.sample(16, solver="gddim:order=2", steps=20, seed=0)
    codes = model.invert(images, solver="ddim", steps=50)
    again = codes.decode()

Whatever is named here is imported when it is first used, so that `import pushforward` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the table below once more, for editors and type checkers
    from pushforward import (
        data,
        denoiser,
        errors,
        evaluation,
        execute,
        guidance,
        integrations,
        linear,
        maps,
        model,
        plan,
        training,
        translation,
        verbs,
        vision,
    )
    from pushforward.denoiser import Denoiser, Function
    from pushforward.errors import Diverged, FarOutside, PushforwardError
    from pushforward.evaluation.runs import Evaluation
    from pushforward.execute import Exact, Implicit, Parallel, Phantom, Skeleton
    from pushforward.guidance import energies
    from pushforward.guidance.dynamics import Schedule, ess, hmc, langevin, mala, pcn
    from pushforward.guidance.particles import fk, psi
    from pushforward.guidance.posterior import best
    from pushforward.guidance.steering import Steering, steered
    from pushforward.integrations.diffusers import PushforwardScheduler
    from pushforward.linear import (
        PROCESSES,
        VE,
        VP,
        Blurring,
        BlurringLangevin,
        Cosine,
        Discrete,
        Flow,
        Gaussian,
        Langevin,
        Process,
        process_from_config,
    )
    from pushforward.maps.adaptive import AdaptiveDiffusion
    from pushforward.maps.code import Code
    from pushforward.maps.diffusion import Diffusion
    from pushforward.maps.generator import Generator, consistency, gan, stylegan
    from pushforward.maps.load import load_generator
    from pushforward.maps.protocol import Pushforward
    from pushforward.model import Network
    from pushforward.plan import SOLVERS, Plan, grid, load_plan, save_plan, solvers
    from pushforward.training.plans import learn_plan
    from pushforward.training.trainer import TrainConfig
    from pushforward.verbs import (
        Model,
        decode,
        edit,
        encode,
        evaluate,
        from_pipeline,
        guide,
        inpaint,
        invert,
        load,
        log_likelihood,
        read_watermark,
        sample,
        steer,
        train,
        translate,
        watermark,
    )

    __version__: str

__all__ = [
    "PROCESSES", "SOLVERS", "VE", "VP", "AdaptiveDiffusion", "Blurring", "BlurringLangevin", "Code", "Cosine",
    "Denoiser", "Diffusion", "Discrete", "Diverged", "Evaluation", "Exact", "FarOutside", "Flow", "Function",
    "Gaussian", "Generator", "Implicit", "Langevin", "Model", "Network", "Parallel", "Phantom", "Plan", "Process",
    "Pushforward", "PushforwardError", "PushforwardScheduler", "Schedule", "Skeleton", "Steering", "TrainConfig",
    "best", "consistency", "data", "decode", "denoiser", "edit", "encode", "energies", "errors", "ess", "evaluate",
    "evaluation", "execute", "fk", "from_pipeline", "gan", "grid", "guidance", "guide", "hmc", "inpaint",
    "integrations", "invert", "langevin", "learn_plan", "linear", "load", "load_generator", "load_plan",
    "log_likelihood", "mala", "maps", "model", "pcn", "plan", "process_from_config", "psi", "read_watermark",
    "sample", "save_plan", "solvers", "steer", "steered", "stylegan", "train", "training", "translate", "translation",
    "verbs", "vision", "watermark",
]  # fmt: skip

# Where each name is from. The rooms of the house are named as they are.
_HOMES = {
    "errors": "Diverged FarOutside PushforwardError",
    "denoiser": "Denoiser Function",
    "linear": "Blurring BlurringLangevin Cosine Discrete Flow Gaussian Langevin PROCESSES Process VE VP"
    " process_from_config",
    "plan": "Plan SOLVERS grid load_plan save_plan solvers",
    "execute": "Exact Implicit Parallel Phantom Skeleton",
    "model": "Network",
    "maps.adaptive": "AdaptiveDiffusion",
    "maps.code": "Code",
    "maps.diffusion": "Diffusion",
    "maps.generator": "Generator consistency gan stylegan",
    "maps.load": "load_generator",
    "maps.protocol": "Pushforward",
    "guidance.dynamics": "Schedule ess hmc langevin mala pcn",
    "guidance.particles": "fk psi",
    "guidance.posterior": "best",
    "guidance.steering": "Steering steered",
    "evaluation.runs": "Evaluation",
    "training.plans": "learn_plan",
    "training.trainer": "TrainConfig",
    "integrations.diffusers": "PushforwardScheduler",
    "verbs": "Model decode edit encode evaluate from_pipeline guide inpaint invert load log_likelihood read_watermark"
    " sample steer train translate watermark",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
_MODULES = {name: name for name in __all__ if name not in _HOME} | {"energies": "guidance.energies"}

if not TYPE_CHECKING:  # by this, they would take any name for known

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        if name in _MODULES:
            return import_module(f"{__name__}.{_MODULES[name]}")
        if name == "__version__":
            return _version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:  # it is run from a checkout, and installed nowhere
        return "0+checkout"

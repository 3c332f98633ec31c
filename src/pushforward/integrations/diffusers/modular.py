"""Any solver, and all steps at once, as the denoising loop of Modular diffusers.

    blocks = with_pushforward(FluxAutoBlocks(), solver="gddim:order=2", parallel=True)
    pipe = blocks.init_pipeline("black-forest-labs/FLUX.1-dev")
    pipe.load_components(torch_dtype=torch.bfloat16)
    images = pipe(prompt="a watercolour of a fox", num_inference_steps=20, output="images")

A family of pipelines has its denoising loop in one block. `PushforwardLoop` takes its place, and has it inside:
its sub-blocks are asked for predictions, at many states and times at once where `parallel` says so, and the solver
takes the steps. So whatever the sub-blocks do acts: guidance, control networks, blocks that are added to them.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import INVERSE, Parallel
from pushforward.linear import Discrete, Flow, Gaussian
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.model import Model, Network
from pushforward.model.diffusers.blocks import AskedLoop, LoopCall, check_loop
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.pipeline import probes
from pushforward.model.diffusers.schedules import Schedule, schedule_of
from pushforward.model.diffusers.steps import flow_times
from pushforward.plan import SOLVERS, Plan

__all__ = ["Loop", "save_block", "with_pushforward"]

_BLOCK = '''"""{name}, with any solver of pushforward, step by step or all steps at once."""

from {module} import {name}
from pushforward.integrations.diffusers.modular import PushforwardLoop


class Pushforward{name}(PushforwardLoop):
    """The denoising loop of {family}."""

    def __init__(self, solver={solver!r}, parallel={parallel!r}):
        super().__init__({name}(), solver=solver, parallel=parallel)
'''


class Loop:
    """A denoising loop of Modular diffusers, with the steps of any solver.

    Called with a pipeline and its state, it turns the state's `latents` into the denoised ones, as the loop in it does.
    The steps are where the pipeline's own scheduler was told to take them (its `timesteps`), unless the solver's words
    name a grid; `auto` has one of its own. The scheduler itself takes no step, and nothing that the pipeline has is
    changed. The first time, the pipeline is asked some ten times more, to find out how many states it can be asked
    about at once, and whether its answers depend on state and time alone.

    Among the pipeline's outputs is then a `code`, the noise that the images are made of; given as `latents`, it makes
    the same images again, by the same deterministic solver. With `invert=True` among its inputs, the pipeline finds the
    code behind an `image`, to the solver's tolerance; that needs a solver that ends above time 0:

        pipe = with_pushforward(pipe, solver="ddim:end=0.01")
        code = pipe(prompt, image=image, strength=1.0, invert=True, output="code")
        again = pipe(prompt, latents=code, output="images")

    For pipelines that take no image, `latents` are then the denoised ones.

    Args:
        loop: the family's own block, such as `FluxDenoiseStep()`.
        solver: a name of `pushforward.SOLVERS`, with settings after colons if need be: `gddim:order=2`.
        parallel: take all steps at once: `True`, the name of a way (see `pushforward.sample`), or a `Parallel`.

    Raises:
        PushforwardError: the block is no loop along timesteps, or no such solver or way.
    """

    sub_blocks: Any
    get_block_state: Callable[[Any], Any]
    progress_bar: Callable[..., Any]

    def __init__(self, loop: Any, solver: str = "auto", parallel: bool | str | Parallel | None = None) -> None:
        check_loop(loop)
        self.loop, self.sub_blocks, self.model_name = loop, loop.sub_blocks, loop.model_name
        self.block_classes, self.block_names = list(loop.block_classes), list(loop.block_names)
        self._progress_bar_config = dict(getattr(loop, "_progress_bar_config", {}))
        spec = parse(solver)
        if not spec.adaptive and spec.solver not in SOLVERS:
            raise PushforwardError(f"Unknown solver {spec.solver!r}; known are {', '.join(SOLVERS)}.")
        if spec.adaptive or spec.start != 1:
            raise PushforwardError(f"The pipeline says how many steps are taken, and from where; got {solver!r}.")
        self.parallel = parallel if isinstance(parallel, Parallel) else None
        if parallel and self.parallel is None:
            spec = replace(spec, parallel="preconditioned" if parallel is True else str(parallel))
        self.spec = spec
        self._asked: dict[Any, AskedLoop] = {}

    # -- what the block takes and needs, as that inside ---------------------------------------------------------------

    @property
    def description(self) -> str:
        """What it does."""
        how = "all steps at once" if self.parallel or self.spec.parallel or self.spec.rounds else "step by step"
        return f"Denoising by the solver {self.spec.label}, {how}, in the place of {type(self.loop).__name__}."

    @property
    def loop_expected_components(self) -> Any:
        """Those of the loop inside."""
        return self.loop.loop_expected_components

    @property
    def loop_expected_configs(self) -> Any:
        """Those of the loop inside."""
        return self.loop.loop_expected_configs

    @property
    def loop_intermediate_outputs(self) -> Any:
        """Those of the loop inside, and `code`."""
        from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam

        said = "The noise that the images are made of, to be given as `latents`; none where the steps begin later."
        return [*self.loop.loop_intermediate_outputs, OutputParam("code", type_hint=Tensor, description=said)]

    @property
    def loop_inputs(self) -> Any:
        """Those of the loop inside, and `invert`."""
        from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

        said = "Whether to find the `code` behind the image, in place of denoising."
        return [*self.loop.loop_inputs, InputParam("invert", type_hint=bool, default=False, description=said)]

    # -- the loop -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Denoise a state's latents, or find the noise behind them."""
        self.get_block_state(state)  # raises if an input is missing
        scheduler, latents, timesteps = components.scheduler, state.get("latents"), state.get("timesteps")
        schedule = schedule_of(components)
        model = self._model(components, state, schedule)
        plan = self._plan(model, scheduler, timesteps)
        chain = Diffusion(model, plan, device=latents.device, parallel=self.parallel or self.spec.method(plan))
        unit, signal = _units(scheduler, timesteps)
        last = float(model.process.signal(plan.times[-1:])[0].coefficients) if signal != 1 else 1.0
        begun = len(timesteps) < len(scheduler.timesteps)
        if state.get("invert"):
            if begun:
                raise PushforwardError("A code is at the beginning of all steps; give strength=1.0 to find it.")
            clean = self._clean(state, unit)
            found = chain.invert(clean.float() * last, noisy=False)
            made, start = clean, chain.start(found.code.start) / signal
            if missed := int((~(found.residual <= INVERSE.tolerance)).sum()):
                warnings.warn(
                    f"The codes of {missed} of {len(clean)} images lead back to them with errors of up to "
                    f"{float(found.residual.max()):.1e}; take less guidance or more steps.",
                    stacklevel=2,
                )
        else:
            start = latents.float()
            with self.progress_bar(total=plan.nfe) as bar:
                noises = self._noises(plan, start, state.get("generator"))
                code = Code(chain.code(start * signal), noises)
                made = chain.decode(code, callback=lambda _: bar.update()) / last
        state.set("code", None if begun else (start / unit).to(latents))
        state.set("latents", made.to(latents))
        return components, state

    def _clean(self, state: Any, unit: float) -> Tensor:
        """Return the denoised latents of which the noise is wanted: the image's, or the latents that are given."""
        latents: Tensor = state.get("latents")
        image = state.get("image_latents")
        conditions = "image_latents" in {param.name for param in self.loop.inputs}
        return latents / unit if image is None or conditions or image.shape != latents.shape else image

    def _model(self, components: Any, state: Any, schedule: Schedule) -> Model:
        """Make a model of the loop inside, which is asked as it was the last time if all has the same form."""
        call, latents = LoopCall(self.loop, components, state), state.get("latents")
        seen = [(name, _form(value, call.images)) for name, value in sorted(state.values.items())]
        key = call.form, tuple(latents.shape[1:]), *seen
        if key not in self._asked:
            call.find_denoisers()
            bare = copy.copy(call)
            bare.state = None  # it is not kept
            self._asked[key] = AskedLoop(call, latents[:1], probes(schedule), schedule.gain).again(bare)
        which = torch.arange(call.images, device=latents.device)
        network = Network(self._asked[key].again(call), condition=which, **schedule.network)
        shape = tuple(latents.shape[1:])
        reference = schedule.reference or Gaussian(1.0)
        name = type(components).__name__
        return Model(name, schedule.process, network, shape, reference, grid=schedule.grid, solvers=schedule.solvers)

    def _plan(self, model: Model, scheduler: Any, timesteps: Tensor) -> Plan:
        """Make the plan at the pipeline's timesteps."""
        spec: SamplerSpec = self.spec
        times = _times(model, scheduler, timesteps)
        if spec.end is not None:
            times = torch.cat([times[times > spec.end], times.new_tensor([spec.end])])
        begun = len(timesteps) < len(scheduler.timesteps)
        if (spec.grid is not None or spec.solver == "auto") and not begun:
            return replace(spec, steps=len(times) - 1).plan(model, guided=True)
        if spec.solver == "auto":  # its own grid begins at noise, and ends at 0
            times = torch.cat([times[:-1], times.new_zeros(1)])
        return spec.at(model, times, guided=True)

    def _noises(self, plan: Plan, like: Tensor, generator: Any) -> Tensor | None:
        """Draw the noises of a stochastic plan."""
        from diffusers.utils.torch_utils import randn_tensor

        drawn = [randn_tensor(like.shape, generator=generator, device=like.device) for _ in plan.noises]
        return torch.stack(drawn) if drawn else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Pipelines copy their blocks: a copy begins without what was learned of a pipeline."""
        made = copy.copy(self)
        memo[id(self)] = made
        made.loop = copy.deepcopy(self.loop, memo)
        made.sub_blocks, made._asked = made.loop.sub_blocks, {}
        return made


def with_pushforward(blocks: Any, solver: str = "auto", parallel: bool | str | Parallel | None = None) -> Any:
    """Put `PushforwardLoop` in the place of all denoising loops of a pipeline's blocks.

    Args:
        blocks: the blocks, or a pipeline that is made of them; changed in place.
        solver: see `PushforwardLoop`.
        parallel: see `PushforwardLoop`.

    Returns:
        The blocks, or the pipeline.

    Raises:
        PushforwardError: there is no loop whose place a solver can take, or no such solver or way.
    """
    own = getattr(blocks, "_blocks", blocks)
    missed: list[PushforwardError] = []
    found = _replace(own, lambda loop: _made()(loop, solver, parallel), missed)
    if not found:
        why = str(missed[0]) if missed else "There is no denoising loop among them."
        raise PushforwardError(f"No loop of {type(own).__name__} can be replaced. {why}")
    return blocks


def save_block(loop: Any, folder: str | Path, solver: str = "auto", parallel: bool | str | None = None) -> Path:
    """Write a folder that can be shared, with a block in the place of a family's denoising loop.

    It has the form of the Hub's custom blocks, `block.py` and `modular_config.json`, and no weights:

        save_block(FluxDenoiseStep, "flux-pushforward", solver="gddim:order=2", parallel=True)
        block = ModularPipelineBlocks.from_pretrained("flux-pushforward", trust_remote_code=True)
        blocks.sub_blocks["denoise"] = block

    Who loads it may say another `solver` and `parallel` there.

    Args:
        loop: class of the family's own block, importable from `diffusers` where the folder is loaded.
        folder: the folder, which may be there.
        solver: see `PushforwardLoop`.
        parallel: see `PushforwardLoop`, but no `Parallel`.

    Returns:
        The folder.

    Raises:
        PushforwardError: as of `PushforwardLoop`.
    """
    made = _made()(loop(), solver, parallel)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    name = loop.__name__
    said = {"module": loop.__module__, "family": made.model_name, "solver": solver, "parallel": parallel}
    (place / "block.py").write_text(_BLOCK.format(name=name, **said))
    config = {
        "_class_name": f"Pushforward{name}",
        "_diffusers_version": import_diffusers().__version__,
        "auto_map": {"ModularPipelineBlocks": f"block.Pushforward{name}"},
        "requirements": {"pushforward": ""},
    }
    (place / "modular_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return place


def _replace(block: Any, make: Callable[[Any], Any], missed: list[PushforwardError]) -> int:
    """Replace the loops below a block; return how many."""
    base, found = _bases()[1], 0
    for name, one in list(block.sub_blocks.items()):
        if not isinstance(one, base):
            found += _replace(one, make, missed)
            continue
        try:
            block.sub_blocks[name] = make(one.loop if isinstance(one, Loop) else one)
            found += 1
        except PushforwardError as error:
            missed.append(error)
    return found


def _times(model: Model, scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the process's times at a pipeline's timesteps, and where they end."""
    process, own = model.process, timesteps.double().cpu()
    if isinstance(process, Flow):
        return torch.unique_consecutive(flow_times(scheduler)[len(scheduler.timesteps) - len(own) :])
    if not isinstance(process, Discrete):
        raise PushforwardError(f"{type(scheduler).__name__} has no table of timesteps and is no flow's.")
    end = model.grid.get("final", model.grid.get("end", 0.0))
    return torch.unique_consecutive(torch.cat([(own + 1) * process.t_min, own.new_tensor([end])]))


def _units(scheduler: Any, timesteps: Tensor) -> tuple[float, float]:
    """Return what the pipeline multiplies noise by, and what its first state is to be multiplied by.

    States of Euler and its kin are those of the process over the signal that is left, all others those of the process.
    """
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0, 1.0
    signal = float(
        copy.deepcopy(scheduler).scale_model_input(torch.ones(1, dtype=torch.float64, device="cpu"), timesteps[0])
    )
    return (1.0, 1.0) if signal == 1 else (float(scheduler.init_noise_sigma), signal)


def _form(value: Any, images: int) -> Any:
    """Return what of a value of the pipeline's state decides how the loop is asked; the lengths of prompts do not."""
    if isinstance(value, Tensor):
        return value.ndim, value.dtype, value.device, bool(value.ndim) and len(value) == images
    if isinstance(value, list | tuple):
        return type(value), len(value) == images, frozenset(_form(one, images) for one in value)
    return type(value)


# The class exists once `diffusers` is there, so that importing this module does not import that.


def _bases() -> tuple[type, type]:
    import_diffusers()
    try:
        from diffusers.modular_pipelines import LoopSequentialPipelineBlocks
    except ImportError as error:
        raise PushforwardError("This version of diffusers has no modular pipelines; install a newer one.") from error
    return Loop, LoopSequentialPipelineBlocks


if TYPE_CHECKING:

    class PushforwardLoop(Loop):
        """See `Loop`."""

    def _made() -> type[PushforwardLoop]: ...
else:

    @cache
    def _made() -> type:
        return type("PushforwardLoop", _bases(), {"__module__": __name__, "__doc__": Loop.__doc__})

    def __getattr__(name: str) -> Any:
        if name == "PushforwardLoop":
            return _made()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

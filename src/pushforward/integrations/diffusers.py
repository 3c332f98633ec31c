"""Our plans as a scheduler of `diffusers`, for a pipeline that you have.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    pipe.scheduler = pushforward.PushforwardScheduler.from_config(pipe.scheduler.config, solver="gddim", order=2)
    pipe(prompt, num_inference_steps=20)

A pipeline calls `step` once for each call of its network. So `timesteps` has an entry for every state that the plan
asks about, several a step for Runge-Kutta methods, and `step` takes the answer there and goes on to the next of them.
What the network predicts, for which noise levels, and where the steps are comes from the configuration of the
scheduler that the pipeline came with (see `model.diffusers.schedules`).

Pipelines that begin in the middle (image to image, inpainting) count steps, so they begin where a step does. Where a
chain is split by its times (a base model and a refiner), the split may lie inside a step, whose earlier answers the
second part does not have; that is refused. Solvers of one call a step can be split anywhere.

`ddim` does what `DDIMScheduler` does where a configuration has `clip_sample` or `thresholding`: the image is bounded
and the noise is not, unless the pipeline says `use_clipped_model_output`. With all other solvers, and wherever
`pushforward.load` reads a model, the noise is what fits the bounded image.

States are `alpha x + sigma noise` of the process. `diffusers`' own schedulers have the same, but for Euler and its kin,
whose state is `x + (sigma / alpha) noise`; pipelines treat both alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import cache
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pushforward.denoiser import Ask
from pushforward.errors import PushforwardError
from pushforward.execute.sequential import steps
from pushforward.linear import VE, Discrete, Flow, Gaussian, Process, ScaledProcess
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, Network
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.schedules import READERS, read_schedule
from pushforward.model.model import far_outside
from pushforward.model.network import inverse_deviation
from pushforward.plan import Node, Plan, exponential, plan_of
from pushforward.plan.grid import bent, check_grid, solve_for_time

SAVED_AS = "pushforward.scheduler"  # the module by which saved pipelines know the class
_SOURCE = Path("the scheduler's configuration")
_STEPS = 10  # before `set_timesteps` says how many
_DEFAULTS = "_use_default_values"  # names of the settings that a configuration has by default
_ROUNDED = 1e-2  # published lists of sigmas have two or three digits


class _Order(int):
    """Calls a step; a step's number times this is the call where the step begins, as pipelines reckon.

    Some steps make fewer calls than others: the last one, and the first where there is no signal yet. So it is looked
    up. It equals no number: where it equals 2, pipelines of Stable Diffusion XL begin a refiner's part one call before
    the time that its state has.
    """

    _begins: tuple[int, ...]  # of the steps, then of the end

    def __new__(cls, calls: int, begins: tuple[int, ...]) -> _Order:
        made = super().__new__(cls, calls)
        made._begins = begins
        return made

    def __rmul__(self, step: int) -> int:
        return self._begins[min(step, len(self._begins) - 1)] if step >= 0 else int(self) * step

    def __eq__(self, other: object) -> bool:
        return self is other

    __mul__, __hash__ = __rmul__, object.__hash__


class _Given(NamedTuple):
    """A grid that a pipeline gives.

    Args:
        times: where the steps begin, and the end.
        timesteps: what the network is told there, if not its own times.
    """

    times: Tensor
    timesteps: Tensor | None = None


class _Run(NamedTuple):
    """A plan on its way.

    Args:
        walk: of `execute.steps`.
        ask: gives the denoised state of the network's output.
        unbounded: the same before clipping or thresholding, where the noise is to be that of the output.
        first: index of its first state among the scheduler's timesteps.
        signal: alpha at its states.
    """

    walk: Generator[Tensor, tuple[Tensor, Tensor], None]
    ask: Ask
    unbounded: Ask | None
    first: int
    signal: Tensor


class _Scheduler:
    """Any explicit plan as a scheduler of `diffusers`.

    Args:
        config: of the scheduler that the pipeline came with, or that scheduler itself, or another of these.
        solver: a name in `SOLVERS` that is run step by step, or `auto`. By default that of `config`, with its grid and
            settings, if it has one, or else `auto`.
        grid: where the steps are, a name in `plan.grid.GRIDS`; by default where the pipeline's own scheduler has them,
            or the `timesteps` or `sigmas` that the pipeline gives. With a name, only their number counts; `auto` has a
            grid of its own.
        variance: of the data about 0, for `auto` and `reference="data"`: about .25 for images in [-1, 1]. By default
            what the configuration says (EDM), or 1, that of latents.
        settings: of the solver, numbers and words, as `order=2` or `eta=1.0`.

    Attributes:
        timesteps: the network's times at the states that are asked about, `(calls,)`.
        order: calls a step; times a step's number, the call where that step begins.
        init_noise_sigma: deviation of the first state.

    Raises:
        PushforwardError: a scheduler that is not known, no such solver, setting or grid, or a plan that a pipeline
            cannot run: an implicit one, adaptive steps, or one that moves before its first call.
    """

    config: Any
    register_to_config: Callable[..., None]

    def __init__(
        self,
        config: Any,
        solver: str | None = None,
        *,
        grid: str | None = None,
        variance: float | None = None,
        **settings: Any,
    ) -> None:
        known = _known(config)
        before = known if solver is None else {}
        known["solver"] = solver or before.get("solver") or "auto"
        known["grid"] = grid or before.get("grid")
        known["variance"] = variance or known.get("variance")
        known["settings"] = {**before.get("settings", {}), **settings}
        for name, value in known["settings"].items():
            if not isinstance(value, int | float | str | None):
                raise PushforwardError(f"Settings of a scheduler are numbers and words; got {name}={value!r}.")
        if variance is not None and not variance > 0:
            raise PushforwardError(f"The data's variance must be positive; got {variance!r}.")
        self.register_to_config(**known)
        self._output = torch.empty(0)
        self._generator: torch.Generator | list[torch.Generator] | None = None
        self.set_timesteps(min(_STEPS, int(known.get("num_train_timesteps", _STEPS))), mu=1.0)

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **settings: Any) -> Any:
        """As the class itself; so `from_pretrained` takes `solver`, `grid` and settings too."""
        made = cls(config, **settings)
        return (made, {}) if return_unused_kwargs else made

    # -- before the loop --------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Make the plan.

        Args:
            num_inference_steps: how many; by default as many as there are `timesteps` or `sigmas`.
            device: of `timesteps`.
            timesteps: where the steps begin, in the network's times (no shift moves them); they end as the
                configuration says.
            sigmas: the same as noise over signal, and the last is the end; or, for flow models, where the steps begin,
                as times before their shift. With `timesteps` besides, states are at `sigmas` and the network is told
                `timesteps`.
            mu: that shift, for flow models whose pipeline says it.

        Raises:
            PushforwardError: as for the class, or a grid that does not decrease, is longer or shorter than said, or
                leaves the times that the network was trained for.
        """
        name, solver = self.config["trained"], self.config["solver"]
        schedule = read_schedule({**self.config, "_class_name": name}, _SOURCE)
        if (schedule.scale, schedule.shift) != (1.0, 0.0):
            raise PushforwardError(
                f"A pipeline with {name} scales images in a way of its own; load its folder with pushforward.load."
            )
        given = timesteps if timesteps is not None else sigmas
        count = num_inference_steps
        if count is None and given is not None:
            count = len(given) - (timesteps is None and not isinstance(schedule.process, Flow))  # sigmas with an end
        if not count or count < 1:
            raise PushforwardError(
                "A plan needs a number of steps, or where they begin: give num_inference_steps, timesteps or sigmas."
            )
        network = Network(_Output(self, schedule.gain), **schedule.network)
        variance = self.config["variance"]
        reference = Gaussian(variance) if variance else schedule.reference or Gaussian(1.0)
        self._model = Model(
            "pipeline", schedule.process, network, (1,), reference, grid=schedule.grid, solvers=schedule.solvers
        )
        self._told: tuple[np.ndarray, np.ndarray] | None = None
        own = self.config["grid"] is None and solver not in ("auto", "rk45")
        grid = self._given(count, timesteps, sigmas, mu) if own else None
        if grid is None:
            sampler = SamplerSpec(solver, count, self.config["settings"], self.config["grid"])
            self._plan = _checked(sampler.plan(self._model), solver)
        else:
            self._plan = self._plan_on(grid.times)
        self._idle = len(self._plan.times) <= count
        if self._idle:
            self._plan = _idling(self._plan)
        self.num_inference_steps = count
        self._times = self._plan.asked_times
        if grid is not None and grid.timesteps is not None:
            self._told = self._pairs(grid.times, grid.timesteps)
        self.timesteps = self._clock_tensor(self._times).to(device)
        self._given_grid = grid is not None and given is not None
        self.init_noise_sigma = 1.0
        if isinstance(schedule.process, VE):
            self.init_noise_sigma = float((self._times[0] ** 2 + reference.variance).sqrt())
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._run: _Run | None = None

    @property
    def order(self) -> int:
        """See the class. Pipelines that gave a grid take each call for a step: then that at the same share of steps."""
        begins = (*_begins(self._plan), len(self._times))
        if begins == tuple(range(len(begins))):
            return 1
        if self._given_grid:
            count, calls = len(begins) - 1, len(self._times)
            return _Order(1, tuple(begins[call * count // calls] for call in range(calls + 1)))
        return _Order(max(after - before for before, after in pairwise(begins)), begins)

    @property
    def begin_index(self) -> int | None:
        """See `set_begin_index`."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Which of `timesteps` the next `step` is for; `None` before the first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Let the loop begin at `timesteps[begin_index]`, from an image with that much noise."""
        self._begin_index = begin_index

    @property
    def sigmas(self) -> Tensor:
        """Noise over signal at `timesteps` and at the end, on the CPU; for flow models, time."""
        t = torch.cat([self._times, self._plan.times[-1:]])
        if isinstance(self._model.process, Flow):
            return t.float()
        alpha, sigma = self._scales(t)
        return (sigma / alpha).float()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given of a state: the state, or where it was trained so, of unit size (EDM)."""
        data = self._network.input_reference
        if data is None:
            return sample
        time = self._time(timestep) if self._step_index is None else self._times[self._step_index]
        scale = inverse_deviation(data.covariance(self._model.process, time))
        return sample * float(scale.coefficients)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next state that the network is asked about, or the last one.

        Args:
            model_output: the network's, at `timestep` and `sample`; channels beyond those of `sample` are left aside.
            timestep: the one of `timesteps` whose turn it is.
            sample: the state; the loop may have changed it since the last `step`.
            eta: 0 or the solver's own setting.
            use_clipped_model_output: for `ddim`, whether the noise is what fits the bounded image (of the other
                solvers it always is).
            generator: of a stochastic plan's noise.
            return_dict: an object with `prev_sample` and `pred_original_sample`, or a tuple of these.

        Raises:
            PushforwardError: another `eta`, or another timestep's turn.
        """
        if eta and eta != self.config["settings"].get("eta"):
            raise PushforwardError(
                f"The plan is made before the loop: give eta={eta:g} to PushforwardScheduler, not to the pipeline."
            )
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        run, index = self._run, self._step_index
        if run is None or index is None:
            run, index = self._begin(timestep, state)
        elif not isinstance(timestep, Tensor) or timestep.device.type == "cpu":  # elsewhere a look would cost a wait
            self._check_turn(index, float(timestep))
        self._output, self._generator = model_output[:, : sample.shape[1]], generator
        answer = run.ask(index - run.first, state)
        if run.unbounded is not None and not use_clipped_model_output:  # the state whose noise is the network's
            state = state + run.signal[index - run.first].item() * (answer - run.unbounded(index - run.first, state))
        following = run.walk.send((state, answer))
        self._output, self._generator = torch.empty(0), None
        going = index + 1 < len(self.timesteps)
        if not going and (sentence := far_outside(following, self._model.reference, self._model.name)):
            import_diffusers().logging.get_logger(__name__).warning(sentence)
        self._run, self._step_index = (run, index + 1) if going else (None, None)
        result = following.to(sample.dtype), answer.to(sample.dtype)
        if not return_dict:
            return result
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        return DDIMSchedulerOutput(*result)

    # -- noise on images --------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x + sigma noise` at the network's times `(batch,)` or `(1,)`."""
        alpha, sigma = self._scales_like(original_samples, timesteps)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same, as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network that predicts `v` is trained for, `alpha noise - sigma x`; for flow models `noise - x`."""
        if isinstance(self._model.process, Flow):
            return noise - sample
        alpha, sigma = self._scales_like(sample, timesteps)
        return alpha * noise - sigma * sample

    # -- the table, for training loops and for pipelines with a rule of their own --------------------------------------

    @property
    def alphas_cumprod(self) -> Tensor:
        """`alpha^2` at the timesteps 0 … N - 1, float32; `AttributeError` where the model has no table."""
        process = self._model.process
        if not isinstance(process, Discrete):
            raise AttributeError(f"A {self.config['trained']} has no table alphas_cumprod: its times are continuous.")
        return torch.tensor(process.alphas_cumprod, dtype=torch.float64).float()

    @property
    def alphas(self) -> Tensor:
        """Ratios of `alphas_cumprod`, `1 - betas`."""
        table = self.alphas_cumprod.double()
        return (table / torch.cat([table.new_ones(1), table[:-1]])).float()

    @property
    def betas(self) -> Tensor:
        """Variances of the noise of the single timesteps."""
        return 1 - self.alphas

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """`alpha^2` where the grid ends: 1, or that of timestep 0."""
        return self.alphas_cumprod[0] if self._final else torch.ones_like(self.alphas_cumprod[0])

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew: what is on its way cannot be copied."""
        return {**self.__dict__, "_run": None, "_step_index": None}

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # -- how it is done ---------------------------------------------------------------------------------------------

    def _plan_on(self, times: Tensor) -> Plan:
        """The plan on a grid."""
        process, reference = self._model.process, self._model.reference
        solver = self.config["solver"]
        settings = {**self._model.solvers.get(solver, {}), **self.config["settings"]}
        if solver == "auto":
            rule: Mapping[str, Any] = self._plan.settings
            return exponential(process, times, reference=reference, name="auto", **rule)
        if settings.get("reference") in ("data", "spectrum"):
            settings["reference"] = float(reference.variance)
        try:
            return _checked(plan_of(process, solver, times, settings), solver)
        except (TypeError, KeyError) as error:  # a word where a number should be, or the reverse
            raise PushforwardError(f"Solver {solver!r} does not take the settings {settings}: {error}.") from error

    def _given(self, count: int, timesteps: Any, sigmas: Any, mu: float | None) -> _Given | None:
        """The grid that the pipeline gives, or says how to make; `None` if it is the configuration's."""
        process, config = self._model.process, self.config
        final = self._final
        shifted = config.get("use_dynamic_shifting") or config.get("shift_terminal")
        told = None if timesteps is None else torch.as_tensor(timesteps).to("cpu", torch.float64)
        if sigmas is not None:
            sigmas = torch.as_tensor(sigmas).to("cpu", torch.float64)
        elif isinstance(process, Flow) and told is None and shifted:
            sigmas = self._unshifted(count)
        if isinstance(process, Flow) and sigmas is not None:
            times = self._shifted(sigmas, mu)
        elif sigmas is not None:
            *starts, final = _times_at(process, sigmas).tolist()
            times = torch.tensor(starts, dtype=torch.float64)
        elif told is not None:
            times = self._time(told)
        else:
            return None
        if count != len(times) or (told is not None and len(told) != count):
            there = f"{len(times)} steps" if told is None else f"{len(told)} timesteps, at {len(times)} times"
            raise PushforwardError(
                f"The grid of {count} steps that is asked for, and what is given, must agree; got {there}."
            )
        within = times[: -1 if times[-1] <= final + 1e-12 else None]  # a last step that begins at the end moves nothing
        grid = check_grid(process, torch.cat([within, torch.tensor([final], dtype=torch.float64)]))
        return _Given(grid, None if sigmas is None else told)

    def _unshifted(self, count: int) -> Tensor:
        """The times of a flow model's steps before their shift, where the pipeline says only how many."""
        last = self._model.grid.get("last")
        if last is None:  # of schedulers with a `flow_shift`
            return torch.linspace(1, 1 / self.config["num_train_timesteps"], count + 1, dtype=torch.float64)[:-1]
        return torch.linspace(1, last, count, dtype=torch.float64)

    def _shifted(self, times: Tensor, mu: float | None) -> Tensor:
        """A flow model's times, moved as the configuration says."""
        config = self.config
        if not bool(((times >= 0) & (times <= 1)).all()):
            raise PushforwardError(f"The sigmas of a flow model are times in [0, 1]; got {times.tolist()}.")
        shift = self._model.grid.get("shift", 1.0)
        if config.get("use_dynamic_shifting"):
            if mu is None:
                raise PushforwardError(
                    "This model's grid is shifted by the size of the image: give mu, or the scheduler a grid."
                )
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        spread = self._model.grid.get("spread") if self._model.grid["name"] == "shifted" else None
        return bent(times, shift=shift, terminal=config.get("shift_terminal"), spread=spread)

    @property
    def _final(self) -> float:
        """Where the grid ends, by the configuration."""
        grid = self._model.grid
        return grid.get("final", grid.get("end", 0.0))

    def _begin(self, timestep: Any, start: Tensor) -> tuple[_Run, int]:
        """The run from a timestep on: in the middle it is the plan on the rest of the grid, which has no past."""
        index, begins = self._begin_index, _begins(self._plan)
        if index is None:
            near = torch.isclose(self._clock(self._times), torch.as_tensor(timestep).to("cpu", torch.float64))
            index = next((k for k in near.nonzero()[:, 0].tolist() if k in begins), None)
            if index is None:
                raise PushforwardError(f"No step of this plan begins at timestep {float(timestep):g}; see `timesteps`.")
        plan = self._plan
        if index and index in begins:
            plan = self._rest(begins.index(index))
        times = plan.asked_times
        if index not in begins or not (len(times) == len(rest := self._times[index:]) and torch.allclose(times, rest)):
            calls = max(after - before for before, after in pairwise((*begins, len(self._times))))
            raise PushforwardError(
                f"Call {index} is inside a step of {self.config['solver']!r}, whose earlier answers are not known: "
                f"begin at a multiple of {calls} (a step's number times `order`), or split the chain with a solver of "
                "one call a step."
            )
        walk = steps(plan, start, noise=lambda _: self._noise(start))
        next(walk)
        network, unbounded = self._network, None
        if self.config["solver"] == "ddim" and (network.clip is not None or network.threshold is not None):
            unbounded = replace(network, clip=None, threshold=None).at(plan.process, times, start)
        return _Run(walk, network.at(plan.process, times, start), unbounded, index, self._scales(times)[0]), index

    def _rest(self, step: int) -> Plan:
        """The plan from a step on."""
        times = self._plan.times[step:]
        if len(times) == 1:  # all that is left is to do nothing
            return Plan(self._model.process, self._plan.solver, (Node(float(times[0]), {}, asks=True),), (0,))
        plan = self._plan_on(times)
        return _idling(plan) if self._idle else plan

    def _check_turn(self, index: int, timestep: float) -> None:
        expected = float(self._clock(self._times[index]))
        if not math.isclose(timestep, expected, rel_tol=1e-5, abs_tol=1e-6):
            raise PushforwardError(
                f"It is the turn of timestep {expected:g}; got {timestep:g}. The steps of a plan follow one another; "
                "to begin anew, call set_timesteps."
            )

    def _noise(self, like: Tensor) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(like.shape, generator=self._generator, device=like.device, dtype=like.dtype)

    @property
    def _network(self) -> Network:
        network = self._model.denoiser
        assert isinstance(network, Network)
        return network

    def _clock(self, t: Tensor) -> Tensor:
        """The network's times."""
        network = self._network
        if self._told is not None:
            return torch.as_tensor(np.interp(t.numpy(), *self._told))
        return network.time_scale * t + network.time_shift if network.clock is None else network.clock(t)

    def _pairs(self, times: Tensor, told: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Times and what the network is told there, increasing; at the end its own time, if it has one there."""
        end = self._clock(times[-1:])
        if len(told) < len(times):
            told = torch.cat([told, end if end.isfinite() else told[-1:]])
        if not bool((told.diff() < 0)[:-1].all()) or told[-1] > told[-2]:
            raise PushforwardError(f"Timesteps must decrease; got {told.tolist()}.")
        return times.flip(0).numpy(), told.flip(0).numpy()

    def _clock_tensor(self, t: Tensor) -> Tensor:
        """The same as pipelines get them: whole numbers if all are."""
        clock = self._clock(t)
        whole = isinstance(self._model.process, Discrete) and bool((clock - clock.round()).abs().max() < 1e-6)
        return clock.round().long() if whole else clock.float()

    def _time(self, clock: Any) -> Tensor:
        """The process's times at the network's, float64 on the CPU."""
        process, wanted = self._model.process, torch.as_tensor(clock).to("cpu", torch.float64)
        first = 0.0 if isinstance(process, Flow) else process.t_min
        ends = torch.tensor([first, process.t_max], dtype=torch.float64)
        low, high = self._clock(ends).tolist()
        slack = 1e-5 * (high - low)
        if not bool(((wanted >= low - slack) & (wanted <= high + slack)).all()):
            raise PushforwardError(f"The timesteps of this model lie in [{low:g}, {high:g}]; got {_listed(wanted)}.")
        return solve_for_time(self._clock, wanted, ends[1], ends[0])

    def _scales_like(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at timesteps `(batch,)` or `(1,)`, to multiply images with."""
        alpha, sigma = self._scales(self._time(timesteps).flatten())
        shape = (-1, *[1] * (sample.ndim - 1))
        return alpha.to(sample).view(shape), sigma.to(sample).view(shape)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self._model.process, ScaledProcess)  # as all are that configurations describe
        return self._model.process.alpha_sigma(t)


class _Output:
    """The network's output, handed to `Network` in the place of a network."""

    def __init__(self, scheduler: _Scheduler, gain: float) -> None:
        self._scheduler, self._gain = scheduler, gain

    def __call__(self, u: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:  # noqa: ARG002 - as a network's
        output = self._scheduler._output
        return output if self._gain == 1 else self._gain * output


def _known(config: Any) -> dict[str, Any]:
    """The public settings of a scheduler, with the class that they are of as `trained`."""
    if not isinstance(config, Mapping):
        config = {**config.config, "_class_name": type(config).__name__}
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    if "trained" not in known:
        known["trained"] = config.get("_class_name") or _class_with(set(known))
    if _DEFAULTS in config:
        known[_DEFAULTS] = config[_DEFAULTS]
    return known


def _class_with(names: set[str]) -> str:
    """The class whose settings have these names: schedulers made in memory do not say it in their configuration."""
    for name in READERS:
        cls = getattr(import_diffusers(), name, None)
        if cls is not None and set(signature(cls.__init__).parameters) - {"self", "kwargs"} == names:
            return name
    raise PushforwardError(
        "The configuration does not say which scheduler it is of; give the scheduler itself, pipe.scheduler."
    )


def _begins(plan: Plan) -> tuple[int, ...]:
    """The calls where the steps of a plan begin.

    The first call about a step's state, or, where the state is corrected by an answer that it shares, that answer's.
    """
    before = np.cumsum([0, *(node.asks for node in plan.nodes)])
    last = len(plan.nodes) - 1
    return tuple(int(before[k]) - (not plan.nodes[k].asks) for k in plan.steps if k < last or plan.nodes[k].asks)


def _idling(plan: Plan) -> Plan:
    """The plan with a call about its last state, whose answer changes nothing, for a step from there to there."""
    return replace(plan, nodes=(*plan.nodes[:-1], replace(plan.nodes[-1], asks=True)))


def _times_at(process: Process, sigmas: Tensor) -> Tensor:
    """Times at decreasing ratios of noise to signal, of which the last may be 0."""
    low, high = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)

    def ratio(t: Tensor) -> Tensor:
        return torch.exp(-process.log_snr(t))

    least, most = ratio(low).item(), ratio(high).item()
    inside = (sigmas >= least * (1 - _ROUNDED)) & (sigmas <= most * (1 + _ROUNDED))
    inside[-1] |= sigmas[-1] == 0
    if not bool(inside.all()):
        raise PushforwardError(
            f"The sigmas of this model lie in [{least:.4g}, {most:.4g}], or end at 0; got {_listed(sigmas)}."
        )
    return torch.where(sigmas > 0, solve_for_time(ratio, sigmas, high, low), 0.0)


def _listed(values: Tensor) -> str:
    """Numbers for a message."""
    return ", ".join(f"{value:.6g}" for value in values.flatten().tolist())


def _checked(plan: Plan, solver: str) -> Plan:
    """A plan that a pipeline can run."""
    if plan.implicit:
        why = "solves for all steps together"
    elif not plan.nodes[0].asks:
        why = "moves before it asks the network"
    else:
        return plan
    raise PushforwardError(f"A pipeline cannot run {solver!r}, which {why}; name another solver.")


# The class exists once `diffusers` is there, so that importing this module does not import that.
if TYPE_CHECKING:

    class PushforwardScheduler(_Scheduler):
        """See `_Scheduler`."""
else:

    @cache
    def _made() -> type:
        diffusers = import_diffusers()
        bases = (_Scheduler, diffusers.SchedulerMixin, diffusers.ConfigMixin)
        return type("PushforwardScheduler", bases, {"__module__": SAVED_AS, "__doc__": _Scheduler.__doc__})

    sys.modules.setdefault(SAVED_AS, sys.modules[__name__])

    def __getattr__(name: str) -> Any:
        if name == "PushforwardScheduler":
            return _made()
        if name == "SchedulerMixin":  # loading a pipeline, diffusers looks here for the base of a class from here
            return import_diffusers().SchedulerMixin
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

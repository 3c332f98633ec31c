"""Our plans as a scheduler of `diffusers`, for a pipeline that you have.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    pipe.scheduler = pushforward.PushforwardScheduler.from_config(pipe.scheduler.config, solver="gddim", order=2)
    pipe(prompt, num_inference_steps=20)

A pipeline calls `step` once for each call of its network. So `timesteps` has an entry for every state that the plan
asks about, several a step for Runge-Kutta methods, and `step` takes the answer there and goes on to the next of them.
What the network predicts, for which noise levels, and where the steps are comes from the configuration of the
scheduler that the pipeline came with (see `model.schedulers`).

States are `alpha x + sigma noise` of the process. `diffusers`' own schedulers have the same, but for Euler and its kin,
whose state is `x + (sigma / alpha) noise`; pipelines treat both alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pushforward.codes import plan_of
from pushforward.errors import PushforwardError
from pushforward.execute.sequential import steps
from pushforward.linear import VE, Discrete, Flow, Gaussian, ScaledProcess
from pushforward.model import Model, Network
from pushforward.model.network import Ask, inverse_deviation
from pushforward.model.schedulers import _READERS as READERS
from pushforward.model.schedulers import import_diffusers, read_schedule
from pushforward.plan import Plan, auto, exponential
from pushforward.plan.grid import check_grid, invert
from pushforward.sampler import Sampler

_SOURCE = Path("the scheduler's configuration")
_STEPS = 10  # before `set_timesteps` says how many


class _Run(NamedTuple):
    """A plan on its way.

    Args:
        walk: of `execute.steps`.
        ask: gives the denoised state of the network's output.
        first: index of its first state among the scheduler's timesteps.
    """

    walk: Generator[Tensor, tuple[Tensor, Tensor], None]
    ask: Ask
    first: int


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
        order: calls a step.
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
                msg = f"Settings of a scheduler are numbers and words; got {name}={value!r}."
                raise PushforwardError(msg)
        if variance is not None and not variance > 0:
            msg = f"The data's variance must be positive; got {variance!r}."
            raise PushforwardError(msg)
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
            timesteps: where the steps begin, in the network's times; they end as the configuration says.
            sigmas: the same as noise over signal, or, for flow models, as times before their shift.
            mu: that shift, for flow models whose pipeline says it.

        Raises:
            PushforwardError: as for the class.
        """
        given = timesteps if timesteps is not None else sigmas
        count = num_inference_steps or (0 if given is None else len(given))
        if count < 1:
            msg = "A plan needs a number of steps, or where they begin: give num_inference_steps, timesteps or sigmas."
            raise PushforwardError(msg)
        name, solver = self.config["trained"], self.config["solver"]
        schedule = read_schedule({**self.config, "_class_name": name}, _SOURCE)
        if (schedule.scale, schedule.shift) != (1.0, 0.0):
            msg = f"A pipeline with {name} scales images in a way of its own; load its folder with pushforward.load."
            raise PushforwardError(msg)
        network = Network(_Given(self, schedule.gain), **schedule.network)
        variance = self.config["variance"]
        reference = Gaussian(variance) if variance else schedule.reference or Gaussian(1.0)
        self._model = Model("pipeline", schedule.process, network, (1,), reference, grid=schedule.grid)
        own = self.config["grid"] is None and solver not in ("auto", "rk45")
        times = self._given_times(count, timesteps, sigmas, mu) if own else None
        if times is None:
            sampler = Sampler(solver, count, self.config["settings"], self.config["grid"])
            self._plan = _checked(sampler.plan(self._model), solver)
        else:
            self._plan = self._plan_on(times)
        self.num_inference_steps = count
        self._times = _asked(self._plan)
        self.timesteps = self._clock_tensor(self._times).to(device)
        self.order = self._plan.nfe
        if len(self._plan.times) > 2:
            end = self._plan.times[-3:]
            self.order = self._plan_on(end).nfe - self._plan_on(end[1:]).nfe
        self.init_noise_sigma = 1.0
        if isinstance(schedule.process, VE):
            self.init_noise_sigma = float((self._times[0] ** 2 + torch.as_tensor(reference.variance)).sqrt())
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._run: _Run | None = None

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
        use_clipped_model_output: bool | None = None,  # noqa: ARG002 - pipelines of DDIM give it
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next state that the network is asked about, or the last one.

        Args:
            model_output: the network's, at `timestep` and `sample`; channels beyond those of `sample` are left aside.
            timestep: the one of `timesteps` whose turn it is.
            sample: the state; the loop may have changed it since the last `step`.
            eta: 0 or the solver's own setting.
            use_clipped_model_output: without effect, as the noise always is what fits the bounded image.
            generator: of a stochastic plan's noise.
            return_dict: an object with `prev_sample` and `pred_original_sample`, or a tuple of these.

        Raises:
            PushforwardError: another `eta`, or another timestep's turn.
        """
        if eta and eta != self.config["settings"].get("eta"):
            msg = f"The plan is made before the loop: give eta={eta:g} to PushforwardScheduler, not to the pipeline."
            raise PushforwardError(msg)
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        run, index = self._run, self._step_index
        if run is None or index is None:
            run, index = self._begin(timestep, state)
        elif not isinstance(timestep, Tensor) or timestep.device.type == "cpu":  # elsewhere a look would cost a wait
            self._check_turn(index, float(timestep))
        self._output, self._generator = model_output[:, : sample.shape[1]], generator
        answer = run.ask(index - run.first, state)
        following = run.walk.send((state, answer))
        self._output, self._generator = torch.empty(0), None
        going = index + 1 < len(self.timesteps)
        self._run, self._step_index = (run, index + 1) if going else (None, None)
        result = following.to(sample.dtype), answer.to(sample.dtype)
        if not return_dict:
            return result
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        return DDIMSchedulerOutput(*result)

    # -- noise on images --------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x + sigma noise` at the network's times `(batch,)` or `(1,)`."""
        scales = self._scales(self._time(timesteps).flatten())
        alpha, sigma = (c.to(original_samples).view(-1, *[1] * (original_samples.ndim - 1)) for c in scales)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same, as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew: what is on its way cannot be copied."""
        return {**self.__dict__, "_run": None, "_step_index": None}

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # -- how it is done ---------------------------------------------------------------------------------------------

    def _plan_on(self, times: Tensor) -> Plan:
        """The plan on a grid."""
        process, reference = self._model.process, self._model.reference
        solver, settings = self.config["solver"], dict(self.config["settings"])
        if solver == "auto":
            rule: Mapping[str, Any] = auto(process, 2, reference).settings
            return exponential(process, times, reference=reference, name="auto", **rule)
        if settings.get("reference") in ("data", "spectrum"):
            settings["reference"] = float(torch.as_tensor(reference.variance))
        try:
            return _checked(plan_of(process, solver, times, settings), solver)
        except (TypeError, KeyError) as error:  # a word where a number should be, or the reverse
            msg = f"Solver {solver!r} does not take the settings {settings}: {error}."
            raise PushforwardError(msg) from error

    def _given_times(self, count: int, timesteps: Any, sigmas: Any, mu: float | None) -> Tensor | None:
        """The grid that the pipeline gives, or says how to make; `None` if it is the configuration's."""
        process, config, grid = self._model.process, self.config, self._model.grid
        dynamic, terminal = config.get("use_dynamic_shifting"), config.get("shift_terminal")
        if timesteps is not None:
            times = self._time(timesteps)
        elif isinstance(process, Flow):
            if sigmas is None and not (dynamic or terminal):
                return None
            if sigmas is None:
                sigmas = torch.linspace(1, 1 / config["num_train_timesteps"], count)
            times = torch.as_tensor(sigmas, dtype=torch.float64)
            shift = grid["shift"]
            if dynamic:
                if mu is None:
                    msg = "This model's grid is shifted by the size of the image: give mu, or the scheduler a grid."
                    raise PushforwardError(msg)
                shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
            times = shift * times / (1 + (shift - 1) * times)
            if terminal:
                times = 1 - (1 - times) * (1 - terminal) / (1 - times[-1])
        elif sigmas is not None:
            wanted = torch.as_tensor(sigmas, dtype=torch.float64)
            low, high = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
            times = invert(lambda t: torch.exp(-process.log_snr(t)), wanted[wanted > 0], high, low)
        else:
            return None
        end = torch.tensor([grid.get("final", grid.get("end", 0.0))], dtype=torch.float64)
        return check_grid(process, torch.cat([times[times > end + 1e-12], end]))

    def _begin(self, timestep: Any, start: Tensor) -> tuple[_Run, int]:
        """The run from a timestep on: in the middle it is the plan on the rest of the grid, which has no past."""
        index = self._begin_index
        if index is None:
            near = torch.isclose(self._clock(self._times), torch.as_tensor(timestep).to("cpu", torch.float64))
            index = next((k for k in near.nonzero()[:, 0].tolist() if k % self.order == 0), None)
            if index is None:
                msg = f"No step of this plan begins at timestep {float(timestep):g}; see `timesteps`."
                raise PushforwardError(msg)
        plan = self._plan if index == 0 else self._plan_on(self._plan.times[index // self.order :])
        times = _asked(plan)
        if index % self.order or not torch.equal(times, self._times[index:]):
            msg = f"Call {index} is inside a step of {self.config['solver']!r}; begin at a multiple of {self.order}."
            raise PushforwardError(msg)
        walk = steps(plan, start, noise=lambda _: self._noise(start))
        next(walk)
        return _Run(walk, self._network.at(plan.process, times, start), index), index

    def _check_turn(self, index: int, timestep: float) -> None:
        expected = float(self._clock(self._times[index]))
        if not math.isclose(timestep, expected, rel_tol=1e-5, abs_tol=1e-6):
            msg = (
                f"It is the turn of timestep {expected:g}; got {timestep:g}. The steps of a plan follow one another; "
                "to begin anew, call set_timesteps."
            )
            raise PushforwardError(msg)

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
        return network.time_scale * t + network.time_shift if network.clock is None else network.clock(t)

    def _clock_tensor(self, t: Tensor) -> Tensor:
        """The same as pipelines get them: whole numbers if all are."""
        clock = self._clock(t)
        whole = isinstance(self._model.process, Discrete) and bool((clock - clock.round()).abs().max() < 1e-6)
        return clock.round().long() if whole else clock.float()

    def _time(self, clock: Any) -> Tensor:
        """The process's times at the network's, float64 on the CPU."""
        low, high = torch.tensor([self._model.process.t_min, self._model.process.t_max], dtype=torch.float64)
        return invert(self._clock, torch.as_tensor(clock).to("cpu", torch.float64), high, low)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self._model.process, ScaledProcess)  # as all are that configurations describe
        return self._model.process.alpha_sigma(t)


class _Given:
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
    return known


def _class_with(names: set[str]) -> str:
    """The class whose settings have these names: schedulers made in memory do not say it in their configuration."""
    for name in READERS:
        cls = getattr(import_diffusers(), name, None)
        if cls is not None and set(signature(cls.__init__).parameters) - {"self", "kwargs"} == names:
            return name
    msg = "The configuration does not say which scheduler it is of; give the scheduler itself, pipe.scheduler."
    raise PushforwardError(msg)


def _asked(plan: Plan) -> Tensor:
    return torch.tensor([node.time for node in plan.nodes if node.asks], dtype=torch.float64)


def _checked(plan: Any, solver: str) -> Plan:
    """A plan that a pipeline can run."""
    if not isinstance(plan, Plan):
        why = "chooses its steps on the way"
    elif plan.implicit:
        why = "solves for all steps together"
    elif not plan.nodes[0].asks:
        why = "moves before it asks the network"
    else:
        return plan
    msg = f"A pipeline cannot run {solver!r}, which {why}; name another solver."
    raise PushforwardError(msg)


# The class exists once `diffusers` is there, so that importing this module does not import that.
if TYPE_CHECKING:

    class PushforwardScheduler(_Scheduler):
        """See `_Scheduler`."""
else:

    @cache
    def _made() -> type:
        diffusers = import_diffusers()
        bases = (_Scheduler, diffusers.SchedulerMixin, diffusers.ConfigMixin)
        return type("PushforwardScheduler", bases, {"__module__": __name__, "__doc__": _Scheduler.__doc__})

    def __getattr__(name: str) -> Any:
        if name == "PushforwardScheduler":
            return _made()
        if name == "SchedulerMixin":  # loading a pipeline, diffusers looks here for the base of a class from here
            return import_diffusers().SchedulerMixin
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

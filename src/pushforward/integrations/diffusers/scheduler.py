"""The scheduler, but for its base classes, which are those of `diffusers`."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pushforward.denoiser import Ask, at_least_float32
from pushforward.errors import PushforwardError
from pushforward.execute.sequential import steps
from pushforward.integrations.diffusers.configuration import public_settings
from pushforward.integrations.diffusers.moves import Move, move_of
from pushforward.integrations.diffusers.plans import Order, beginnings, idling, runnable
from pushforward.integrations.diffusers.times import Times
from pushforward.linear import VE, Discrete, Flow, Gaussian
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, Network
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.schedules import read_schedule
from pushforward.model.model import far_outside
from pushforward.model.network import inverse_deviation
from pushforward.plan import Plan

__all__ = ["Scheduler"]

_SOURCE = Path("the scheduler's configuration")
_CLOSE = 1e-3  # timesteps of one step, in float32
_STEPS = 10  # before `set_timesteps` says how many


class _Run(NamedTuple):
    """A plan on its way.

    Args:
        walk: of `execute.steps`.
        ask: gives the denoised state of the network's output.
        unbounded: the same before clipping or thresholding, where the noise is to be that of the output.
        first: index of its first state among the scheduler's timesteps.
        signal: alpha at its states.
        plan: the plan.
        drawn: noises of the last step, by node.
    """

    walk: Generator[Tensor, tuple[Tensor, Tensor], None]
    ask: Ask
    unbounded: Ask | None
    first: int
    signal: Tensor
    plan: Plan
    drawn: dict[int, Tensor]


class Scheduler:
    """Any explicit plan as a scheduler of `diffusers`.

    Args:
        config: configuration of the scheduler that the pipeline came with, or that scheduler, or one of this class.
        solver: a name in `SOLVERS` that is run step by step, or `auto`, as it is under guidance, of whose weight a
            scheduler is not told. By default that of `config`, with its grid and settings, if it has one, or else
            `auto`.
        grid: where the steps are, a name in `plan.grid.GRIDS`; by default where the pipeline's own scheduler has them,
            or the `timesteps` or `sigmas` that the pipeline gives. With a name, only their number counts; `auto` has a
            grid of its own.
        variance: mean square of the data, for `auto` and `reference="data"`: about .25 for images in [-1, 1]. By
            default what the configuration says (EDM), or 1, that of latents.
        settings: settings of the solver, numbers and words, such as `order=2` or `eta=1.0`.

    Attributes:
        timesteps: the network's times at the states that are asked about, `(calls,)`.
        order: calls per step; times a step's number, the call where that step begins.
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
        known = public_settings(config)
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
        self._output = torch.empty(0, device="cpu")
        self._generator: torch.Generator | list[torch.Generator] | None = None
        self._given: Tensor | None = None  # the state that a step is to lead to
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
        most = self.config.get("sigma_max")
        if name.startswith("FlowMatch") and most is not None and most > 1:
            raise PushforwardError(
                f"This pipeline counts the noise levels of its {name} to {most:g}, not to 1; leave it that scheduler."
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
        self._clock = Times(self._model, self.config)
        own = self.config["grid"] is None and solver not in ("auto", "rk45")
        grid = self._clock.given(count, timesteps, sigmas, mu) if own else None
        self._sampler = sampler = SamplerSpec(solver, count, self.config["settings"], self.config["grid"])
        if sampler.filed:
            raise PushforwardError(f"The plan {solver} has steps of its own, and a pipeline says them: name a solver.")
        times = (sampler.times(self._model) if grid is None else grid.times) if own else None
        self._idle = times is not None and len(times) <= count
        if times is None or (grid is None and not self._idle):
            self._plan = runnable(sampler.plan(self._model, guided=True), solver)
        else:
            self._plan = self._on(times, sampler)
        self.num_inference_steps = count
        self._times = self._plan.asked_times
        if grid is not None and grid.timesteps is not None:
            self._clock = self._clock.telling(grid.times, grid.timesteps)
        self.timesteps = self._clock.to_pipeline(self._times).to(device)
        self._given_grid = grid is not None and given is not None
        self.init_noise_sigma = 1.0
        if isinstance(schedule.process, VE):
            self.init_noise_sigma = float((self._times[0] ** 2 + reference.variance).sqrt())
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._run: _Run | None = None
        self._move: Move | None = None

    @property
    def order(self) -> int:
        """See the class. Pipelines that gave a grid take each call for a step: then that at the same share of steps."""
        begins = (*beginnings(self._plan), len(self._times))
        if begins == tuple(range(len(begins))):
            return 1
        if self._given_grid:
            count, calls = len(begins) - 1, len(self._times)
            return Order(1, tuple(begins[call * count // calls] for call in range(calls + 1)))
        return Order(max(after - before for before, after in pairwise(begins)), begins)

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
        alpha, sigma = self._clock.scales(t)
        return (sigma / alpha).float()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return what the network is given of a state: the state, or where it was trained so, of unit size (EDM)."""
        if sample.ndim < 2:
            raise PushforwardError(
                f"This pipeline reckons with the noise levels of its {self.config['trained']}, whose states are of "
                "another size than a plan's; leave it that scheduler."
            )
        data = self._clock.network.input_reference
        if data is None:
            return sample
        time = self._clock.from_network(timestep) if self._step_index is None else self._times[self._step_index]
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
        prev_sample: Tensor | None = None,
        per_token_timesteps: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return the next state that the network is asked about, or the last one.

        Args:
            model_output: the network's, at `timestep` and `sample`; channels beyond those of `sample` are left aside.
            timestep: the one of `timesteps` whose turn it is.
            sample: the state; the loop may have changed it since the last `step`.
            eta: 0 or the solver's own setting.
            use_clipped_model_output: for `ddim`, whether the noise is what fits the bounded image (of the other
                solvers it always is).
            generator: generator of a stochastic plan's noise.
            return_dict: an object with `prev_sample` and `pred_original_sample`, or a tuple of these.
            prev_sample: the state that a stochastic step led to earlier, and is to lead to again, for `log_prob`.
            per_token_timesteps: the timestep of each token, `(batch, tokens)`; those at another than `timestep` stay.
                `model_output` is the negative of the network's, as `FlowMatchEulerDiscreteScheduler` then has it.
            others: what schedulers with a solver of their own are told.

        Raises:
            PushforwardError: another `eta`, or another timestep's turn; a step to `prev_sample` that is not one random
                move; or others.
        """
        if told := ", ".join(name for name, value in others.items() if value is not None):
            raise PushforwardError(
                f"This pipeline takes its steps by a rule of its {self.config['trained']} ({told}); leave it that "
                "scheduler."
            )
        if eta and eta != self.config["settings"].get("eta"):
            raise PushforwardError(
                f"The plan is made before the loop: give eta={eta:g} to PushforwardScheduler, not to the pipeline."
            )
        state = sample.to(at_least_float32(sample.dtype))
        run, index = self._run, self._step_index
        if run is None or index is None:
            run, index = self._begin(timestep, state)
        elif not isinstance(timestep, Tensor) or timestep.device.type == "cpu":  # elsewhere a look would cost a wait
            self._check_turn(index, float(timestep))
        output = model_output if per_token_timesteps is None else -model_output
        self._output, self._generator = output[:, : sample.shape[1]], generator
        self._given = None if prev_sample is None else prev_sample.to(state)
        run.drawn.clear()
        answer = run.ask(index - run.first, state)
        if run.unbounded is not None and not use_clipped_model_output:  # the state whose noise is the network's
            state = state + run.signal[index - run.first].item() * (answer - run.unbounded(index - run.first, state))
        following = run.walk.send((state, answer))
        self._output, self._generator = torch.empty(0, device="cpu"), None
        self._move = move_of(run.plan, index - run.first + 1, run.drawn, following, self._given)
        if self._given is not None:
            if self._move is None:
                raise PushforwardError(
                    f"This step of {self.config['solver']!r} is not one random move, so it cannot lead to a "
                    "`prev_sample` that is given; leave it out, or take ddpm."
                )
            following, self._given = self._given, None
        if per_token_timesteps is not None:
            moves = (per_token_timesteps - timestep).abs() < _CLOSE
            following = torch.where(moves[..., None], following, sample.to(following))
        going = index + 1 < len(self.timesteps)
        if not going and (sentence := far_outside(following, self._model.reference, self._model.name)):
            import_diffusers().logging.get_logger(__package__).warning(sentence)
        self._run, self._step_index = (run, index + 1) if going else (None, None)
        result = following.to(sample.dtype), answer.to(sample.dtype)
        if not return_dict:
            return result
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        return DDIMSchedulerOutput(*result)

    def log_prob(self) -> Tensor:
        """Return the logarithm of the density of the last step's random move, `(batch,)`; see `execute.density`.

        Differentiable in `model_output`; the state that the step led to counts as given, as policy gradients need it.

        Raises:
            PushforwardError: there was no step, or it was deterministic, or made of several random moves.
        """
        if self._move is None:
            raise PushforwardError(
                f"The last step of {self.config['solver']!r} is not one random move: take a stochastic solver of one, "
                "such as ddpm, and call step first; its step to an image without noise has none."
            )
        return self._move.log_prob()

    # -- noise on images --------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `alpha x + sigma noise` at the network's times `(batch,)` or `(1,)`."""
        alpha, sigma = self._clock.scales_like(original_samples, timesteps)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return the same, as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a network of `v` is trained for, `alpha noise - sigma x`; for flow models `noise - x`."""
        if isinstance(self._model.process, Flow):
            return noise - sample
        alpha, sigma = self._clock.scales_like(sample, timesteps)
        return alpha * noise - sigma * sample

    # -- the table, for training loops and for pipelines with a rule of their own --------------------------------------

    @property
    def alphas_cumprod(self) -> Tensor:
        """`alpha^2` at the timesteps 0 … N - 1, float32; `AttributeError` where the model has no table."""
        process = self._model.process
        if not isinstance(process, Discrete):
            raise AttributeError(f"A {self.config['trained']} has no table alphas_cumprod: its times are continuous.")
        return torch.tensor(process.alphas_cumprod, dtype=torch.float64, device="cpu").float()

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
        return self.alphas_cumprod[0] if self._clock.final else torch.ones_like(self.alphas_cumprod[0])

    def __getstate__(self) -> dict[str, Any]:
        """Begin a copy anew: what is on its way cannot be copied."""
        return {**self.__dict__, "_run": None, "_step_index": None, "_move": None}

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # -- how it is done ---------------------------------------------------------------------------------------------

    def _begin(self, timestep: Any, start: Tensor) -> tuple[_Run, int]:
        """Begin a run at a timestep: in the middle it is the plan on the rest of the grid, which has no past."""
        index, begins = self._begin_index, beginnings(self._plan)
        if index is None:
            near = torch.isclose(
                self._clock.to_network(self._times),
                torch.as_tensor(timestep, dtype=torch.float64, device="cpu"),
            )
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
                "one call per step."
            )
        drawn: dict[int, Tensor] = {}

        def noise(node: int) -> Tensor:
            drawn[node] = self._noise(start) if self._given is None else torch.zeros_like(start)
            return drawn[node]

        walk = steps(plan, start, noise=noise)
        next(walk)
        network, unbounded = self._clock.network, None
        if self.config["solver"] == "ddim" and (network.clip is not None or network.threshold is not None):
            unbounded = replace(network, clip=None, threshold=None).at(plan.process, times, start)
        signal = self._clock.scales(times)[0]
        return _Run(walk, network.at(plan.process, times, start), unbounded, index, signal, plan, drawn), index

    def _rest(self, step: int) -> Plan:
        """Return the plan from a step on."""
        times = self._plan.times[step:]
        sampler = replace(self._sampler, settings=self._sampler.settled(self._plan))
        return self._on(times[:-1] if self._idle else times, sampler)

    def _on(self, times: Tensor, sampler: SamplerSpec) -> Plan:
        """Return the plan at these times; if it idles, where its steps begin."""
        model, solver = self._model, sampler.solver

        def made(grid: Tensor) -> Plan:
            return runnable(sampler.at(model, grid, guided=True), solver)

        return idling(model, solver, times, made) if self._idle else made(times)

    def _check_turn(self, index: int, timestep: float) -> None:
        expected = float(self._clock.to_network(self._times[index]))
        if not math.isclose(timestep, expected, rel_tol=1e-5, abs_tol=1e-6):
            raise PushforwardError(
                f"It is the turn of timestep {expected:g}; got {timestep:g}. The steps of a plan follow one another; "
                "to begin anew, call set_timesteps."
            )

    def _noise(self, like: Tensor) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(like.shape, generator=self._generator, device=like.device, dtype=like.dtype)


class _Output:
    """The network's output, handed to `Network` in the place of a network."""

    def __init__(self, scheduler: Scheduler, gain: float) -> None:
        self._scheduler, self._gain = scheduler, gain

    def __call__(self, u: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:  # noqa: ARG002 - as a network's
        output = self._scheduler._output
        return output if self._gain == 1 else self._gain * output

"""Samplers by words: a solver, its steps and its settings, as a command line, a table or a report names them.

>>> spec = parse("gddim:order=2:steps=20")
>>> spec.solver, spec.steps, spec.settings
('gddim', 20, {'order': 2})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import index
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from pushforward.data import schema
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.execute import PARALLEL_METHODS, Parallel
from pushforward.execute.budget import nodes_in
from pushforward.linear import Gaussian
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import is_guided
from pushforward.model import Model
from pushforward.plan import SOLVERS, Plan, auto, in_rounds, load_plan, plan_of
from pushforward.plan.auto import RULE
from pushforward.plan.files import SUFFIX as PLAN_SUFFIX
from pushforward.plan.grid import default

__all__ = ["MOST", "SamplerSpec", "noisy", "parse", "words"]

NONE: Mapping[str, object] = MappingProxyType({})
_FREE = ("auto", "rk45")  # solvers that choose their own settings
_WITHIN = 1e-3
_ADAPTIVE = 1e-5  # error allowed in an adaptive step
MOST = 100_000  # of anything that words count: more would run for days
_PROBE = 4  # steps of a short plan, and one more, by which the calls that a step takes are counted


@dataclass(frozen=True)
class SamplerSpec:
    """What a plan is made from, for any model.

    Args:
        solver: a name in `SOLVERS`, `rk45`, or a file of a plan (`.plan`), which has all its settings.
        steps: steps of the solver (`rk45` chooses its own).
        settings: settings of the solver, numbers and words. `reference` is the variance of a Gaussian, or `data` for
            the model's own N(m, s^2 I), or `spectrum` for the one fitted to its data; `tolerance` is `rk45`'s.
        grid: name of a grid; by default the model's own, or `power`; where the time is the noise level, `angle`.
        end: time of the last state; by default the grid's own.
        start: share of the steps, counted from the last one, that are taken: below 1 the plan begins at a time between.
        parallel: all steps at once, by this of `PARALLEL_METHODS`.
        within: relative error allowed in an image by `parallel`.
        rounds: all steps at once, for the best image in this many rounds (see `Parallel`).
        max_evaluations: most network evaluations of an image in these rounds.
    """

    solver: str = "auto"
    steps: int = 20
    settings: Mapping[str, object] = field(default_factory=dict)
    grid: str | None = None
    end: float | None = None
    start: float = 1.0
    parallel: str | None = None
    within: float = _WITHIN
    rounds: int | None = None
    max_evaluations: int | None = None

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if not 0 < self.start <= 1 or round(self.start * self.steps) < 1:
            raise PushforwardError(
                f"The start is a share of the {self.steps} steps, one step or more, and at most 1; got {self.start:g}."
            )
        if self.parallel is not None and self.parallel not in PARALLEL_METHODS:
            raise PushforwardError(
                f"Unknown way {self.parallel!r} to take all steps at once; known are {', '.join(PARALLEL_METHODS)}."
            )
        Parallel(rounds=self.rounds, max_evaluations=self.max_evaluations)  # which checks them
        if self.solver == "rk45" and (self.parallel or self.rounds) is not None:
            raise PushforwardError(
                "The adaptive steps of rk45 follow one another and cannot be taken at once; name another solver."
            )

    @property
    def kept(self) -> dict[str, object]:
        """All of it, as runs keep it to know their settings again: what 0.1 did not have, only where it is said."""
        later = ("rounds", "max_evaluations")
        said = {name: value for name, value in asdict(self).items() if name not in later or value is not None}
        return said | self.rule

    @property
    def rule(self) -> dict[str, object]:
        """Which rule `auto` follows, lest a run that began by an earlier one goes on; nothing for other solvers."""
        return {"rule": RULE} if self.solver == "auto" else {}

    @property
    def label(self) -> str:
        """The sampler in the words of `parse`, without its steps, and without the folder of a plan's file."""
        own = {"grid": self.grid, "end": self.end, "parallel": self.parallel, "rounds": self.rounds,
               "max_evaluations": self.max_evaluations}  # fmt: skip
        if self.start != 1:
            own["start"] = self.start
        if self.parallel is not None or self.rounds is not None or self.within != _WITHIN:
            own["within"] = self.within
        words = {**self.settings, **{key: value for key, value in own.items() if value is not None}}
        solver = Path(self.solver).name if self.filed else self.solver
        return ":".join([solver, *(f"{key}={value}" for key, value in words.items())])

    def plan(self, model: Model, *, guided: bool = False) -> Plan:
        """The plan for a model; `guided`, if by a weight above 1, which `auto` goes by.

        Raises:
            PushforwardError: no such solver, grid or setting, or they do not fit the model; or adaptive steps.
        """
        process = model.process
        self._check()
        if self.filed:
            return self._kept_plan(model)
        if self.adaptive:
            raise PushforwardError(f"The solver {self.solver!r} chooses its steps as it goes; name another, e.g. ddim.")
        if self.solver == "auto":
            if self.rounds is not None:
                return in_rounds(process, self.steps, model.reference)
            return auto(process, self.steps, model.reference, guided=guided)
        times = self.times(model)
        if len(times) == 1:
            raise PushforwardError(
                f"Model {model.name!r} begins a single step at time {float(times[0]):g}, where it ends, so it would do "
                "nothing; take more steps, another grid or another end."
            )
        return self.at(model, times[len(times) - 1 - round(self.start * (len(times) - 1)) :])

    def times(self, model: Model) -> Tensor:
        """The times between a model's steps, and their ends, of all solvers but `auto`, adaptive ones and files.

        Raises:
            PushforwardError: no such grid, or it does not fit the model.
        """
        process, at, own = model.process, {} if self.end is None else {"end": self.end}, dict(model.grid)
        if own and self.grid in (None, own.get("name", "uniform")):
            own.update({"final" if own.get("name") == "timesteps" else "end": self.end} if at else {})
            return default(process, self.steps, **own)
        usual = "angle" if process.time_is_noise else "power"
        return default(process, self.steps, name=usual if self.grid is None else self.grid, **at)

    def at(self, model: Model, times: Tensor | Sequence[float], *, guided: bool = False) -> Plan:
        """The plan at given times, `(steps + 1,)`, whatever else is said of steps and grid; `guided` as for `plan`.

        Raises:
            PushforwardError: no such solver, setting or grid.
        """
        if self.filed:
            return self._kept_plan(model)
        own = {**model.solvers.get(self.solver, {}), **self.settings}
        if self.solver == "auto":
            own |= {"reference": "data", "guided": guided}
        if (name := own.get("reference")) in ("data", "spectrum"):
            own["reference"] = model.reference if name == "data" else Gaussian(model.gaussian.variance)
        elif isinstance(name, str):
            raise PushforwardError(f"A reference is data, spectrum or the variance of a Gaussian; got {name!r}.")
        try:
            return plan_of(model.process, self.solver, times, own)
        except (TypeError, KeyError) as error:  # a word where a number should be, or the reverse
            raise PushforwardError(
                f"Solver {self.solver!r} does not take these settings ({self.label}): {error}."
            ) from error

    def diffusion(self, model: Model, guidance: float | None = None) -> Diffusion | AdaptiveDiffusion:
        """The map that samples a model so, with its steps taken at once where that is said.

        Args:
            model: to sample from.
            guidance: weight of guidance that the map is to be given, which `auto` goes by.

        Raises:
            PushforwardError: as `plan`, but that adaptive steps are taken.
        """
        if self.adaptive:
            self._check()
            return AdaptiveDiffusion(model, _positive(self.settings.get("tolerance", _ADAPTIVE)))
        plan = self.plan(model, guided=is_guided(model, guidance))
        return Diffusion(model, plan, parallel=self.method(plan))

    def settled(self, plan: Plan) -> dict[str, object]:
        """The settings with which the solver of its plan makes that again `at` its times: those of `auto`, too."""
        since = ("order", "denoise") if self.solver == "auto" else ("residuals",)
        return {**self.settings, **{name: plan.settings[name] for name in since if name in plan.settings}}

    @property
    def adaptive(self) -> bool:
        """Whether steps are chosen on the way, so that there is no plan."""
        return self.solver == "rk45"

    @property
    def filed(self) -> bool:
        """Whether the plan is read from a file."""
        return self.solver.lower().endswith(PLAN_SUFFIX)

    def invertible(self, model: Model) -> SamplerSpec:
        """The same, to `t_min` where it says no end of its own: a last step to clean data has no inverse.

        Raises:
            PushforwardError: a solver that always ends in clean data.
        """
        if self.solver in _FREE:
            raise PushforwardError(
                f"The solver {self.solver!r} goes on to clean data, from where no way leads back; take ddim, for one."
            )
        return self if self.filed or self.end is not None else replace(self, end=model.process.t_min)

    def _kept_plan(self, model: Model) -> Plan:
        """The plan in the file, which must be the one that is meant, if that is said, and fit the model."""
        plan = load_plan(self.solver)
        meant, found = self.settings.get("digest"), plan.settings["digest"]
        if meant not in (None, found):
            raise PushforwardError(
                f"{self.solver} holds another plan than the one that is meant (digest {found}, not {meant}); give that "
                "one, or leave out its digest."
            )
        if plan.process != model.process:
            raise PushforwardError(
                f"The plan {self.solver} is for process {plan.process.name!r}, model {model.name!r} for another: "
                f"{model.process.name!r}, or the same with other parameters."
            )
        return plan

    def _check(self) -> None:
        """Raise unless there is such a solver, and it can be told what it is told."""
        if self.filed:
            told = [*sorted(self.settings.keys() - {"digest"}), *self._timed, *(["rounds"] if self.rounds else [])]
            if told:
                raise PushforwardError(f"The plan {self.solver} has all its settings; leave out {' and '.join(told)}.")
            return
        if self.solver not in (*SOLVERS, "rk45"):
            raise PushforwardError(f"Unknown solver {self.solver!r}; known are {', '.join((*SOLVERS, 'rk45'))}.")
        more = self.settings.keys() - ({"tolerance"} if self.adaptive else set())
        if self.solver in _FREE and (told := [*sorted(more), *self._timed]):
            raise PushforwardError(
                f"The solver {self.solver!r} chooses its own settings; leave out {' and '.join(told)}, or name another "
                "solver."
            )

    @property
    def _timed(self) -> list[str]:
        """What is said of the grid."""
        said = {"grid": self.grid is not None, "end": self.end is not None, "start": self.start != 1}
        return [name for name, is_said in said.items() if is_said]

    def method(self, plan: Plan) -> Parallel | None:
        """How a plan's steps are taken at once, if they are; an implicit plan's have no other way."""
        name = self.parallel or ("preconditioned" if plan.implicit or self.rounds else None)
        if name is None:
            return None
        return replace(PARALLEL_METHODS[name], tolerance=self.within, rounds=self.rounds,
                       max_evaluations=self.max_evaluations)  # fmt: skip

    def calling(self, model: Model, nfe: int) -> SamplerSpec:
        """The same with the most steps that make no more than `nfe` network evaluations per image.

        Raises:
            PushforwardError: not even one step fits.
        """
        if self.solver in _FREE:
            return replace(self, steps=nfe)
        if self.filed:
            if self.plan(model).nfe > nfe:
                raise PushforwardError(f"{self.label} takes more than {many(nfe, 'network evaluation')}; allow more.")
            return self

        def calls(steps: int) -> int:
            return replace(self, steps=steps).plan(model).nfe

        first, each = calls(_PROBE), calls(_PROBE + 1) - calls(_PROBE)  # as many more with every step
        steps = _PROBE + (nfe - first) // max(1, each)
        if steps < 1 or calls(steps) > nfe:
            raise PushforwardError(f"{self.label} takes more than {many(nfe, 'network evaluation')}; allow more.")
        return replace(self, steps=steps)


def parse(text: str, beside: Mapping[str, object] = NONE, otherwise: Mapping[str, object] = NONE) -> SamplerSpec:
    """Read a sampler from `solver:name=value:name=value`, e.g. `gddim:order=2:steps=50` or `ddim:end=0.01`.

    With `repeats=1` a solver takes its steps as it does of itself, multistep and implicit ones included.

    Args:
        text: the sampler.
        beside: settings that are said beside the text, as by options of a command.
        otherwise: values of settings that neither says.

    Raises:
        PushforwardError: not of that form, or a setting is said twice and differently.
    """
    solver, settings = words(text, "solver", "gddim:order=2")
    for name, value in beside.items():
        if settings.setdefault(name, value) not in (value,):  # NaN is not equal to itself
            raise PushforwardError(
                f"The solver {text!r} says {name}={settings[name]}, and {name} is also given as {value}: give it once."
            )
    if solver == "rk45" and "steps" in settings:
        raise PushforwardError("The solver 'rk45' chooses its own settings; leave out steps, or name another solver.")
    for name in ("rounds", "max_evaluations"):
        if name in settings:
            settings[name] = _counted(settings[name], f"{name}=1 or more")
    if solver.lower().endswith(PLAN_SUFFIX):
        settings, otherwise = _of_file(solver, settings), NONE
    names = ("steps", "grid", "end", "start", "parallel", "within", "rounds", "max_evaluations")
    whole = {**{name: value for name, value in otherwise.items() if name in names or solver not in _FREE}, **settings}
    if "rounds" in whole and "steps" not in settings:
        whole["steps"] = nodes_in(whole["rounds"], whole.get("max_evaluations"))  # type: ignore[arg-type]
    if whole.get("repeats") == 1:
        del whole["repeats"]  # so the solver takes its steps by itself, and remembers those before
    settings = whole
    own = {name: settings.pop(name) for name in names if name in settings}
    if "steps" in own:
        own["steps"] = _counted(own["steps"], "1 step or more")
    for name in own.keys() & {"end", "start", "within"}:
        own[name] = _positive(own[name], zero=name != "within")
    return SamplerSpec(solver, settings=settings, **own)  # type: ignore[arg-type]


def _of_file(solver: str, settings: dict[str, object]) -> dict[str, object]:
    """What is said of a plan in a file, with its steps and the digest by which it is known again."""
    plan = load_plan(solver)
    steps = len(plan.steps) - 1
    if settings.pop("steps", steps) != steps:
        raise PushforwardError(f"The plan {solver} has {steps} steps; leave out steps.")
    return {"digest": plan.settings["digest"], **settings, "steps": steps}


def words(text: str, what: str, example: str) -> tuple[str, dict[str, object]]:
    """The name and the settings in `name:key=value:key=value`.

    Args:
        text: what to read.
        what: what it is, for messages.
        example: an example of such a text, for messages.

    Raises:
        PushforwardError: not of that form, or a count is beyond `MOST`.
    """
    named, *pairs = text.strip().split(":")
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise PushforwardError(
                f"A {what} is written {what}:name=value:name=value, for instance {example}; got {text!r}."
            )
        name, known = name.strip().replace("-", "_"), _value(value.strip())
        if name == "digest":  # whose digits may look like a number
            known = value.strip()
        if isinstance(known, int) and known > MOST and name != "seed":
            raise PushforwardError(f"The {what} {text!r} says {name}={known:,}; take {MOST:,} at most.")
        if settings.setdefault(name, known) not in (known,):  # NaN is not equal to itself
            raise PushforwardError(f"The {what} {text!r} says {name} twice, and differently: say it once.")
    return named, settings


def noisy(sampler: SamplerSpec) -> SamplerSpec:
    """The sampler with some noise where it leaves that to the solver: eta 0.1 for DDIM, lambda 1 for the others."""
    noise: dict[str, dict[str, object]] = {"ddim": {"eta": 0.1}, "gddim": {"noise": 1.0}, "exponential": {"noise": 1.0}}
    return replace(sampler, settings={**noise.get(sampler.solver, {}), **sampler.settings})


def _value(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _counted(value: object, wanted: str) -> int:
    """A whole number of 1 or more, of any library."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise PushforwardError(f"A sampler takes {wanted}; got {value!r}.")
    return number


def _positive(value: object, *, zero: bool = False) -> float:
    number = float(value) if isinstance(value, int | float) else math.nan
    if not (number > 0 or (zero and number == 0)):
        raise PushforwardError(f"Tolerances must be positive numbers, and times not below 0; got {value!r}.")
    return number

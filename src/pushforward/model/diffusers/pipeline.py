"""Any `diffusers` pipeline in memory as a model.

The pipeline is the network: it is called as it is, and asked for its prediction at many states and times at once (see
`model.diffusers.calls` and `rows`). What it holds acts: LoRA, control networks, image prompts, quantised or offloaded
weights. Its process is what its scheduler says (`model.diffusers.schedules`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor, nn

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian
from pushforward.model.diffusers.arguments import SUBJECTS, arguments_of, guidance_of
from pushforward.model.diffusers.calls import Call
from pushforward.model.diffusers.codec import Decoder, decoder_of, decoders, encoder_of
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.patches import alone, parts
from pushforward.model.diffusers.rows import Rows, flat, learn, mixes
from pushforward.model.diffusers.schedules import Schedule, schedule_of
from pushforward.model.diffusers.standin import Stopped
from pushforward.model.diffusers.steps import check_noise, check_step, clocked, grid_of, settings_of
from pushforward.model.model import Model
from pushforward.model.network import Network
from pushforward.model.prompts import Guided

__all__ = ["Asked", "from_pipeline", "made_of", "probes", "refuse_caches"]

TWO_PROMPTS = ("fox", "a cat by the sea")  # of two lengths
PLACES = 32  # times at which it is looked which network is asked


@alone
def from_pipeline(pipe: Any, *, name: str | None = None, **call: Any) -> Model:
    """Make a model of a pipeline of `diffusers` as it is in memory, as `pushforward.from_pipeline` says.

    A copied or pickled model has a pipeline of its own; it is not pickled where other libraries have put hooks on the
    pipeline's parts.

    Args:
        pipe: the pipeline.
        name: name for reports; by default its folder's, or its class's.
        **call: arguments that it would be called with. Those that a sampler decides about are left out, with a warning.

    Raises:
        PushforwardError: `diffusers` is not installed, or the pipeline takes no such argument, or it cannot be asked in
            this way; the sentence names what is in the way.
    """
    diffusers = import_diffusers()
    if not isinstance(pipe, diffusers.DiffusionPipeline) or getattr(pipe, "scheduler", None) is None:
        raise PushforwardError(
            f"{type(pipe).__name__} is no pipeline of diffusers with a scheduler of its own; combined ones hold "
            "several, of which each can be given."
        )
    refuse_caches(pipe)
    schedule = schedule_of(pipe)
    asked = Call(pipe, arguments_of(pipe, call))
    times = probes(schedule)
    with torch.no_grad():
        first = asked.find_entrance(times[1])
    if not bool(first.prediction.isfinite().all()):
        raise PushforwardError(
            f"{asked.name} predicts numbers that are not finite: its networks overflow, or it reckons with the noise "
            "levels of its scheduler, which are known here for flows only; try another dtype."
        )
    check_step(asked, schedule)
    check_noise(asked, first.state)
    schedule = clocked(asked, schedule)
    network = Asked(asked, first.state[:1].detach(), times, schedule.gain)
    return _model(network, schedule, name or _name(pipe))


@dataclass(eq=False)
class _Shared:
    """What the networks of one pipeline have in common.

    Args:
        subject: the argument that says what an image is to be of.
        guidance: the argument that weighs its guidance.
        variants: networks of calls with other guidance.
    """

    subject: str | None
    guidance: str | None
    variants: dict[Any, Asked] = field(default_factory=dict)


class Asked(Guided):
    """`(u, t, subjects) -> prediction` of a pipeline's call, with t in its scheduler's units.

    Args:
        call: the call.
        like: a state `(1, ...)` in the pipeline's dtype and place.
        times: times of its scheduler from noise to data, of which the first and the last are the ends of its range.
        gain: factor of its predictions, see `Schedule`.
        shared: what the same pipeline's calls with other guidance share; by default nothing is known yet.
    """

    def __init__(
        self, call: Call, like: Tensor, times: Sequence[float], gain: float = 1.0, shared: _Shared | None = None
    ) -> None:
        super().__init__()
        self.call, self.like, self.times, self.gain = call, like, tuple(times), gain
        self.subjects: tuple[Any, ...] = ()
        known = call.signature.parameters
        subject = next((name for name in SUBJECTS if name in known and call.arguments.get(name) is not None), None)
        self._shared = _Shared(subject, guidance_of(call)) if shared is None else shared
        self._experts: dict[float, str] = {}
        self._twins = _twins(call)
        self._rows: dict[str, Rows] = {}
        self.mixed = True
        groups = {} if self._twins else {"": list(times)}
        if self._twins:
            for t in torch.linspace(times[0], times[-1], PLACES, dtype=torch.float64, device="cpu").tolist():
                groups.setdefault(self._found(t), []).append(t)
        for expert, some in groups.items():
            inner = some if self._twins else some[1:-1]
            self._rows[expert] = learn(call, like, [inner[0], inner[len(inner) // 2], inner[-1]], [some[0], some[-1]])
            self.mixed = self.mixed and self._mixes(expert, inner)

    @property
    def reads(self) -> bool:
        """Whether it reads prompts."""
        return self._shared.subject == "prompt"

    @property
    def rows(self) -> Rows:
        """How many states are asked about in a call; of several networks, where the fewest are."""
        return min(self._rows.values(), key=lambda rows: ["state", "states", "times"].index(rows.together))

    @property
    def device(self) -> torch.device:
        """Where the pipeline works."""
        device: torch.device = self.call.pipe._execution_device
        return device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of the pipeline's networks."""
        for name, part in parts(self.call.pipe).items():
            if name in self.call.denoisers:
                yield from part.parameters(recurse)

    def to(self, device: Any = None, *_: Any, **__: Any) -> Self:  # type: ignore[override]
        """Move the pipeline, as it moves itself, if it is elsewhere."""
        if isinstance(device, str | torch.device):
            wanted = torch.device(device)
            if wanted.type != self.device.type or (wanted.index or 0) != (self.device.index or 0):
                self.call.pipe.to(wanted)
                self.like = self.like.to(wanted)
        return self

    def told(self, subjects: Sequence[Any]) -> tuple[Asked, Tensor]:
        """Return this network for these prompts, and the number of each."""
        numbers = {subject: k for k, subject in enumerate(dict.fromkeys(subjects))}
        made = copy.copy(self)
        made.subjects = tuple(numbers)
        return made, torch.tensor([numbers[subject] for subject in subjects], dtype=torch.long, device="cpu")

    @property
    def guidance(self) -> float:
        """The weight of guidance that the pipeline is called with; 1 if it takes none."""
        weight = self._given(self._shared.guidance)
        return float(weight) if isinstance(weight, Real) else 1.0

    @alone
    def guided(self, guidance: float | None, negative: str = "") -> Asked:
        """Return this network with another guidance of the pipeline's own kind, or with a negative prompt.

        Raises:
            PushforwardError: the pipeline takes no such thing.
        """
        changes: dict[str, Any] = {}
        for what, argument, value in (
            ("guidance", self._shared.guidance, guidance),
            ("negative prompt", "negative_prompt", negative or None),
        ):
            if value is None or (value == 1 and self._given(argument) is None):
                continue
            if argument is None or argument not in self.call.signature.parameters:
                raise PushforwardError(f"{type(self.call.pipe).__name__} takes no {what}; leave it out.")
            if value != self._given(argument):
                changes[argument] = value
        if not changes:
            return self
        key = tuple(sorted(changes.items()))
        if key not in self._shared.variants:
            call = Call(self.call.pipe, {**self.call.arguments, **changes}, self.call.entrance, self.call.denoisers,
                        self.call.kept, self.call.fewest, self.call.scheduler)  # fmt: skip
            self._shared.variants[key] = Asked(call, self.like, self.times, self.gain, self._shared)
        made = copy.copy(self._shared.variants[key])
        made.subjects = self.subjects
        return made

    def _given(self, argument: str | None) -> Any:
        """What the pipeline is called with, or by default; `None` if it has no such argument."""
        known = self.call.signature.parameters
        if argument is None or argument not in known:
            return None
        return self.call.arguments.get(argument, known[argument].default)

    def forward(self, u: Tensor, t: Tensor, which: Tensor | None = None) -> Tensor:
        states, times = u.to(device=self.like.device, dtype=self.like.dtype), t.cpu().to(torch.float64)
        numbers = [-1] * len(u) if which is None else which.tolist()
        groups: dict[Any, list[int]] = {}
        for row, (number, time) in enumerate(zip(numbers, times.tolist(), strict=True)):
            expert = self._expert(time)
            together = None if self.mixed else number
            groups.setdefault((expert, together, self._rows[expert].apart(row, time)), []).append(row)
        answer = torch.empty_like(states)
        for (expert, *_), some in groups.items():
            more = {} if which is None else self._about([numbers[row] for row in some])
            answer[some] = self._rows[expert].ask(states[some], times[some], more)
        return self.gain * answer.to(u)

    def _about(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of a call about rows of these subjects."""
        values = [self.subjects[number] if self.reads else [number] for number in numbers]
        return {str(self._shared.subject): values[0] if len(set(numbers)) == 1 else flat(values)}

    def contents(self) -> Any:
        """Return what it is made of, see `model.contents`."""
        pipe, arguments = self.call.pipe, self.call.arguments
        told = {name: value for name, value in arguments.items() if value is not None and name != "generator"}
        words = {name: part for name, part in pipe.components.items() if callable(getattr(part, "get_vocab", None))}
        scheduler = self.call.scheduler
        settings = settings_of(scheduler)
        return [type(pipe).__name__, type(scheduler).__name__, settings, {**parts(pipe), **words}, told]

    def _mixes(self, expert: str, times: Sequence[float]) -> bool:
        """Find out whether rows of several subjects can be asked about together."""
        subject = self._shared.subject
        values = TWO_PROMPTS if self.reads else [[0], [1]]
        return subject is None or mixes(self._rows[expert], self.like, times, subject, values)

    def _expert(self, time: float) -> str:
        """Name the network that the pipeline asks at a time of its scheduler; empty if it has one.

        Raises:
            PushforwardError: it was asked at no time that was tried.
        """
        expert = self._found(time)
        if expert not in self._rows:
            raise PushforwardError(
                f"{self.call.name} asks its {expert} at time {time:g} only, so nearby that it was not tried."
            )
        return expert

    def _found(self, time: float) -> str:
        """Name that network, whether or not it was tried."""
        if not self._twins:
            return ""
        if time not in self._experts:
            met: list[str] = []

            def meeting(name: str) -> Any:
                def hook(*_: Any) -> None:
                    met.append(name)
                    raise Stopped

                return hook

            self.call.run([time], hooks={name: meeting(name) for name in self._twins})
            self._experts[time] = met[0] if met else ""
        return self._experts[time]


def _twins(call: Call) -> list[str]:
    """Name the networks among which a pipeline may choose by the time."""
    own = parts(call.pipe)
    kinds = [type(own[name]) for name in call.denoisers]
    return [name for name in call.denoisers if kinds.count(type(own[name])) > 1]


# -- what is asked for -------------------------------------------------------------------------------------------------


def refuse_caches(pipe: Any) -> None:
    """Raise if a network skips work by what it did in the step before."""
    for name, part in parts(pipe).items():
        if getattr(part, "is_cache_enabled", False):
            raise PushforwardError(
                f"The {name} of {type(pipe).__name__} caches between steps, which steps taken all at once do not have; "
                f"call pipe.{name}.disable_cache() first."
            )


def probes(schedule: Schedule) -> list[float]:
    """Times of the scheduler from noise to data, with the ends; bfloat16 holds those between, of a thousand steps."""
    process = schedule.process
    t = process.t_max * torch.tensor([0.96, 0.72, 0.48, 0.032], dtype=torch.float64, device="cpu")
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64, device="cpu")
    clock = schedule.network.get("clock")
    if clock is not None:
        shares = torch.tensor([0.9, 0.5, 0.05, 0.001], dtype=torch.float64, device="cpu")
        own, (first, last) = clock(process.t_min + (process.t_max - process.t_min) * shares), clock(ends).tolist()
    else:
        scale, shift = schedule.network.get("time_scale", 1.0), schedule.network.get("time_shift", 0.0)
        own, (first, last) = scale * t + shift, (scale * ends + shift).tolist()
        if float(own.max()) > 500:
            own = (own / 32).round() * 32
    return [first, *own.tolist(), last]


def _name(pipe: Any) -> str:
    place = str(getattr(pipe, "_name_or_path", "") or getattr(pipe.config, "_name_or_path", "") or "")
    return place.rstrip("/").rpartition("/")[2] or type(pipe).__name__


# -- the model ---------------------------------------------------------------------------------------------------------


def _model(network: Asked, schedule: Schedule, name: str) -> Model:
    call = network.call
    decoder = None
    if decoders(call.pipe):
        decoder = decoder_of(call, noise_like(network.like), network.times[-2])
    classes = _classes(call.pipe) if "class_labels" in call.signature.parameters else ()
    return made_of(network, schedule, name, decoder, grid_of(call, schedule), classes)


def made_of(
    network: Asked,
    schedule: Schedule,
    name: str,
    decoder: Decoder | None,
    grid: Mapping[str, Any],
    classes: tuple[str, ...] = (),
) -> Model:
    """Make the model of a pipeline's network, its schedule and its way to images, and find the way back."""
    pipe, shape = network.call.pipe, tuple(network.like.shape[1:])
    encoder, image_shape = None, shape
    info = {"source": name, "pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__}
    if decoder is not None:
        state = noise_like(network.like)
        with torch.no_grad():
            image = decoder(state)
            try:
                encoder = encoder_of(decoder, state, image)
            except PushforwardError as error:
                info["encoder"] = str(error)
        image_shape = tuple(image.shape[1:])
    return Model(
        name,
        schedule.process,
        Network(network, **schedule.network),
        shape,
        schedule.reference or Gaussian(0.25 if decoder is None else 1.0),
        classes,
        decoder,
        grid,
        info,
        text=network.told if network.reads else None,
        encoder=encoder,
        image_shape=image_shape,
        solvers=schedule.solvers,
    )


def noise_like(like: Tensor) -> Tensor:
    """Draw a state, float32, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device)


def _classes(pipe: Any) -> tuple[str, ...]:
    """List the first name of each class."""
    network = getattr(pipe, "transformer", None) or pipe.unet
    count = network.config.get("num_embeds_ada_norm") or network.config.get("num_class_embeds") or 0
    names = pipe.config.get("id2label") or {}
    return tuple(str(names.get(str(k), names.get(k, k))).split(",")[0].strip() for k in range(count))

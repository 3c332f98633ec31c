"""The models that a page offers, each loaded when it is first used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    from pushforward.maps.spec import SamplerSpec
    from pushforward.verbs import Model

__all__ = ["Shelf", "asked_what", "choices_of", "sampler", "steps_beside", "take_turns"]

MOST_CHOICES = 300
MOST_STEPS = 1000
EMBEDDED = ("fashion-vp", "fashion-blurring", "fashion-langevin", "emoji-2", "emoji", "emoji-noto", "emoji-twemoji")


@dataclass(frozen=True)
class Shelf:
    """Models by name.

    Args:
        names: what `load` finds them by.
        device: where their networks run; `auto`: on a GPU if there is one.
        clip: a CLIP of `transformers` that guides by texts; `None`: no texts.
    """

    names: tuple[str, ...] = EMBEDDED
    device: str = "auto"
    clip: str | None = None
    _open: dict[str, Model] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def open(self, name: str) -> Model:
        """The model of a name.

        Raises:
            PushforwardError: the page does not offer it, or it cannot be loaded.
        """
        if name not in self.names:
            raise PushforwardError(f"This page has no model {name!r}; it has {', '.join(self.names)}.")
        with self._lock:
            if name not in self._open:
                import torch

                from pushforward.verbs import load

                own = "cuda" if torch.cuda.is_available() else "cpu"
                self._open[name] = load(name, device=own if self.device == "auto" else self.device)
            return self._open[name]


def choices_of(model: Model) -> list[str]:
    """What a model can be asked to draw, as far as it can be listed: its classes, or some captions that it knows."""
    known = model.info.get("captions", ()) if model.text is not None else model.classes
    return [str(one) for one in known[:MOST_CHOICES]]


def asked_what(what: object, *, text: bool, prefix: str = "") -> dict[str, object]:
    """What images show as an option of a command (see `options`): a prompt to a model that reads them, else a class."""
    return {f"{prefix}{'prompt' if text else 'label'}": what}


def take_turns(what: Sequence[str], count: int) -> list[str]:
    """Classes or prompts for images that take them in turn; none where none are given."""
    return [what[i % len(what)] for i in range(count if what else 0)]


def sampler(solver: str, steps: int | None = None) -> SamplerSpec:
    """A solver's words as they are read, with a number of steps beside them.

    Raises:
        PushforwardError: not of that form, a plan in a file of the server, or more steps than a page allows.
    """
    from pushforward.maps.spec import parse
    from pushforward.plan.files import SUFFIX

    if SUFFIX in solver.lower():  # to say whether there is such a file would be too much
        raise PushforwardError("This page reads no plans from files; name a solver, e.g. ddim.")
    spec = parse(solver, {} if steps is None else {"steps": steps})
    if spec.steps > MOST_STEPS:
        raise PushforwardError(f"This page takes at most {MOST_STEPS} steps; got {spec.steps}.")
    return spec


def steps_beside(solver: str, steps: int) -> int | None:
    """The number of steps to be given beside a solver's words; none if they say it, or steps are chosen on the way.

    Raises:
        PushforwardError: as `sampler`.
    """
    beside = None if "steps=" in solver or sampler(solver).adaptive else steps
    sampler(solver, beside)
    return beside

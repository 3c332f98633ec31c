"""Energies by text, as a command line or a report names them.

    clip:a smiling face:model=openai/clip-vit-base-patch32:weight=500
    classifier:fashion:label=sneaker:weight=5
    near:photo.png:deviation=0.5
    python:my_energies.py:name=redness
    command:./size-of-a-jpeg.sh

The text is the name of the energy, what it is about, and settings `key=value`, joined by colons; all energies take
`weight`. `ENERGIES` lists the settings with their usual values, which the command line's help shows, too.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from PIL import ImageColor
from torch import Tensor

from pushforward.data.files import held_by
from pushforward.data.pictures import read_mask, save_each
from pushforward.errors import PushforwardError
from pushforward.guidance import energies as known
from pushforward.guidance.energies.energy import Energy, Function, of
from pushforward.maps.code import Code
from pushforward.maps.spec import MOST
from pushforward.vision.clip import load_clip

__all__ = ["CLIP", "ENERGIES", "Setting", "Words", "energy", "energy_of"]

CLIP = "openai/clip-vit-base-patch32"
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Setting:
    """What the text of energies refers to.

    Args:
        read: function that reads an image file, fitted to the model's shape: in [-1, 1], `(channels, height, width)`.
        shape: shape of the model's images, `(channels, height, width)`.
        device: device of networks.
        used: pictures, networks and functions that energies are made of, by where they come from; energies share them.
    """

    read: Callable[[Path], Tensor]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"
    used: dict[tuple[str, ...], Any] = field(default_factory=dict)


class Words:
    """The settings of one energy, taken one by one, so that any left over is an error.

    Args:
        text: the energy as it was written.
        about: what it is about.
        settings: what the text says of them.
        usual: their values where it says nothing; "" where there is none.
        setting: what the text refers to.
    """

    def __init__(self, text: str, about: str, settings: Mapping[str, str], usual: Mapping[str, str], setting: Setting):
        self.text, self.about, self.left, self.usual, self.setting = text, about, dict(settings), usual, setting

    def word(self, name: str) -> str:
        value = self.left.pop(name, self.usual[name])
        if not value:
            raise PushforwardError(f"Energy {self.text!r} needs {name}=…; see `pushforward guide --help`.")
        return value

    def number(self, name: str) -> float:
        value = self.word(name)
        try:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        except ValueError:
            raise PushforwardError(f"The {name} of energy {self.text!r} must be a number; got {value!r}.") from None

    def whole(self, name: str) -> int:
        value = self.number(name)
        if value != value // 1 or not 0 <= value <= MOST:
            raise PushforwardError(
                f"The {name} of energy {self.text!r} must be a whole number from 0 to {MOST:,}; got {value:g}."
            )
        return int(value)

    def yes(self, name: str) -> bool:
        value = self.word(name).lower()
        if value not in ("true", "false"):
            raise PushforwardError(f"The setting {name} of energy {self.text!r} is true or false; got {value!r}.")
        return value == "true"

    def used(self, kind: str, place: str, load: Callable[[str], _T]) -> _T:
        """Load something from a place, once."""
        known = self.setting.used
        if (kind, place) not in known:
            known[kind, place] = load(place)
        return known[kind, place]

    def image(self) -> Tensor:
        return self.used("image", self.about, lambda place: self.setting.read(Path(place).expanduser()))

    def network(self, kind: str, place: str, load: Callable[..., _T]) -> _T:
        return self.used(kind, place, lambda place: load(place, device=self.setting.device))

    def mask(self) -> Tensor | None:
        """Read where a mask's picture is white, `(height, width)`."""
        text = self.left.pop("mask", None)
        if text is None:
            return None
        return self.used("mask", text, lambda place: read_mask(Path(place).expanduser(), self.setting.read))

    def views(self) -> known.Views | None:
        count = self.whole("views")
        return known.views(count) if count else None


def _clip(words: Words) -> Energy:
    clip = words.network("clip", words.word("model"), load_clip)
    return known.clip_text(clip, words.about, views=words.views())


def _clip_image(words: Words) -> Energy:
    clip = words.network("clip", words.word("model"), load_clip)
    return known.clip_image(clip, words.image(), views=words.views())


def _classifier(words: Words) -> Energy:
    network = words.network("classifier", words.about, known.load_classifier)
    return known.classifier(network, words.word("label"), views=words.views())


def _attribute(words: Words) -> Energy:
    network = words.network("classifier", words.about, known.load_classifier)
    wanted = words.yes("wanted")
    return known.attribute(network, words.word("label"), wanted=wanted, views=words.views())


def _score(words: Words) -> Energy:
    network = words.network("classifier", words.about, known.load_classifier)
    return known.score(network.logits, low=words.yes("low"), views=words.views())


def _face(words: Words) -> Energy:
    return known.identity(words.network("faces", words.word("network"), known.load_faces), words.image())


def _near(words: Words) -> Energy:
    return known.near(words.image(), deviation=words.number("deviation"))


def _low_pass(words: Words) -> Energy:
    return known.low_pass(words.image(), words.whole("cells"), deviation=words.number("deviation"))


def _masked(words: Words) -> Energy:
    image, mask = words.image(), words.mask()
    if mask is None:
        raise PushforwardError(f"Energy {words.text!r} needs mask=FILE, white where the image is known.")
    return known.masked(image, mask, deviation=words.number("deviation"))


def _colour(words: Words) -> Energy:
    text = words.about.lstrip("#")
    if not re.fullmatch("[0-9a-fA-F]{6}", text):
        raise PushforwardError(f"A colour is written as #rrggbb, for instance #ff8000; got {words.about!r}.")
    seen = ImageColor.getcolor(f"#{text}", "L" if words.setting.shape[0] == 1 else "RGB")  # grey as pictures are made
    rgb = [value / 127.5 - 1 for value in ([seen] if isinstance(seen, int) else seen)]
    return known.colour(rgb, words.mask(), deviation=words.number("deviation"))


def _perceptual(words: Words) -> Energy:
    return known.perceptual(words.image(), words.word("network"))


def _concentration(words: Words) -> Energy:
    return known.concentration(words.whole("chunk"), words.whole("shuffles"))


def _python(words: Words) -> Energy:
    path, name = Path(words.about).expanduser(), words.word("name")
    spec = importlib.util.spec_from_file_location(f"_energy_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise PushforwardError(f"There is no Python file {path} for energy {words.text!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PushforwardError(f"{path} cannot be run ({type(error).__name__}: {error}).") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PushforwardError(
            f"{path} has no function {name!r}; it takes images (count, channels, height, width) in [-1, 1] and a code."
        )
    return of(words.used("python", f"{path}:{name}", lambda _: function), name)


def _command(words: Words) -> Energy:
    """The numbers that a program prints for PNG files, one a line; they have no gradient."""
    try:
        program = shlex.split(words.about)
    except ValueError as error:
        raise PushforwardError(f"Energy {words.text!r} is no command: {error}.") from None
    if program:
        program[0] = os.path.expanduser(program[0])  # a Path would lose the ./ that says where it lies
    if not program or shutil.which(program[0]) is None:
        raise PushforwardError(f"There is no program {words.about!r} that can be run, for energy {words.text!r}.")
    files = [held for part in program if (held := held_by(part)) is not None]  # whose change is another energy
    words.used("command", words.about, lambda _: files)

    def command(images: Tensor) -> Tensor:
        with TemporaryDirectory() as folder:
            save_each(images, Path(folder))
            pictures = sorted(map(str, Path(folder).iterdir()))
            done = subprocess.run([*program, *pictures], capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise PushforwardError(f"The program {words.about!r} of an energy fails: {said}.")
        lines = done.stdout.split()
        try:
            numbers = [float(line) for line in lines]
        except ValueError:
            numbers = []
        if len(numbers) != len(images):
            raise PushforwardError(
                f"The program {words.about!r} of an energy must print one number a line for each of the "
                f"{len(images)} PNG files in its arguments; it printed {done.stdout.strip()[:80]!r}."
            )
        return torch.tensor(numbers, dtype=torch.float64, device=images.device)

    return of(command)


# name: (what it is about, its settings with their usual values or what is to be named, how it is made)
ENERGIES: dict[str, tuple[str, str, Callable[[Words], Energy]]] = {
    "clip": ("TEXT", f"model={CLIP}, views=8", _clip),
    "clip-image": ("FILE", f"model={CLIP}, views=8", _clip_image),
    "classifier": ("fashion, TorchScript file or transformers folder", "label=, views=0", _classifier),
    "attribute": ("TorchScript file or transformers folder", "label=0, wanted=true, views=0", _attribute),
    "score": ("TorchScript file or transformers folder with one output", "low=false, views=0", _score),
    "face": ("FILE", "network=FILE of dlib's weights", _face),
    "near": ("FILE", "deviation=1", _near),
    "low-pass": ("FILE", "cells=7, deviation=1", _low_pass),
    "masked": ("FILE", "mask=FILE, deviation=.1", _masked),
    "colour": ("#rrggbb", "mask=FILE, deviation=.1", _colour),
    "perceptual": ("FILE", "network=alex", _perceptual),
    "python": ("FILE.py", "name=energy", _python),
    "command": ("PROGRAM of PNG files, without gradient", "", _command),
    "chi": ("", "", lambda _: known.chi()),
    "gaussian": ("", "", lambda _: known.gaussian()),
    "concentration": ("", "chunk=4, shuffles=100", _concentration),
}

_SPELLINGS = {"color": "colour"}


def energy_of(texts: Sequence[str], setting: Setting) -> Energy:
    """Make the sum of energies from their texts, one or more; see `energy`."""
    first, *others = (energy(text, setting) for text in texts)
    return sum(others, first)


def energy(text: str, setting: Setting) -> Energy:
    """Make one energy from its text.

    Raises:
        PushforwardError: the energy is unknown, a setting is missing or unknown, or what it is about cannot be read.
    """
    kind, *rest = text.strip().split(":")
    kind = _SPELLINGS.get(kind, kind)
    if kind not in ENERGIES:
        raise PushforwardError(f"Unknown energy {kind!r}; known are {', '.join(ENERGIES)}.")
    about, settings = _parts(kind, rest)
    wanted = ENERGIES[kind][0]
    if bool(about) != bool(wanted):
        form = f"{kind}:{wanted}" if wanted else kind
        raise PushforwardError(f"An energy {kind!r} is written {form}:key=value…; got {text!r}.")
    words = Words(text, about, settings, _usual(kind), setting)
    weight = words.number("weight")
    made = ENERGIES[kind][2](words)
    if words.left:
        raise PushforwardError(f"Energy {kind!r} has no setting {', '.join(words.left)}; it takes {_settings(kind)}.")
    name = f"{kind}:{about}" if about and kind in ("clip", "colour") else kind
    if "label" in settings:
        name += f":{settings['label']}"
    if kind == "python":
        name += f":{settings.get('name', words.usual['name'])}"
    several = len(made.terms) > 1
    terms = [replace(term, name=f"{name} {term.name}" if several else name) for term in made.terms]
    return weight * Energy(tuple(replace(term, function=_guarded(term.function, term.name)) for term in terms))


def _guarded(function: Function, name: str) -> Function:
    """Wrap a function so that its errors become one sentence."""

    def energy(images: Tensor, code: Code) -> Tensor:
        try:
            return function(images, code)
        except PushforwardError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            said = " ".join(lines if len(lines) < 4 else lines[-1:])  # TorchScript has the cause in its last line
            raise PushforwardError(
                f"Energy {name!r} fails on images of shape {tuple(images.shape[1:])} ({type(error).__name__}: {said})."
            ) from error

    return energy


def _settings(kind: str) -> str:
    return ", ".join(filter(None, [ENERGIES[kind][1], "weight=1"]))


def _usual(kind: str) -> dict[str, str]:
    """The values that settings have where none is given, by name; "" where one is needed."""
    pairs = (one.partition("=") for one in _settings(kind).split(", "))
    return {name: "" if value.startswith("FILE") else value for name, _, value in pairs}


def _parts(kind: str, rest: list[str]) -> tuple[str, dict[str, str]]:
    """Split what an energy is about from its settings, which come last; both may contain colons."""
    own = _usual(kind)
    about: list[str] = []
    settings: dict[str, str] = {}
    last = None
    for part in rest:
        key, equals, value = part.partition("=")
        key = key.strip().replace("_", "-")
        if equals and key in settings:
            raise PushforwardError(f"Energy {kind!r} has the setting {key} twice; give it once.")
        if equals and (key in own or (about and re.fullmatch(r"[a-z-]+", key))):
            settings[key], last = value.strip(), key
        elif last is not None:
            settings[last] += f":{part}"
        else:
            about.append(part)
    return ":".join(about), settings

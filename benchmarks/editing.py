"""Editing with the truth at hand: how near each method comes to an emoji's true partner, and what it keeps.

    python benchmarks/editing.py --emoji emoji.npz                   # made by examples/zoo_data.py
    python benchmarks/editing.py --emoji emoji.npz --calls 28 --count 64

A held-out emoji in one drawing style is edited into the other by its caption ("grinning face, noto" to "grinning face,
twemoji"); the truth is the same emoji as the other style draws it. The embedded network is run as one of flow matching
(`Model.as_flow`), in which Euler's steps of `flowedit` and `flowalign` are those of the papers, and in 16 bits. With
the default counts that takes a quarter of an hour of one core's time. `deterministic` is left out: exact inversion
takes too many evaluations for these budgets.

*Calls* are network evaluations of an image, all of them: both ends' and guidance's second ones. A method takes as many
steps as its budget has room for. Methods differ in how much they change, so each is run from several first times and
with several weights of guidance, and compared at equal similarity (SSIM) to the source: the points of one weight make a
line that begins at the copy, and a method's PSNR to the truth at a similarity is the best on its lines at that SSIM or
above.

A paler image is nearer to any truth, on average, and hardly less similar to the source. So there are second tables, in
which any method's images, and the copy, may be drawn towards the mean of the target's style by a factor (`CONTRASTS`),
one for all images of a point. What a method gains in the first tables alone, it gains by being pale.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _common import RESULTS, table, write_json, write_text
from torch import Tensor

from pushforward import Diffusion, Model, Network, Plan, load
from pushforward.data.files import atomic_path
from pushforward.data.pictures import from_bytes
from pushforward.evaluation.pairs import psnr, ssim
from pushforward.maps.spec import parse
from pushforward.plan.grid import uniform
from pushforward.translation.translate import Method, translate

BATCH = 64
STYLES = ("noto", "twemoji")
CALLS = (8, 15, 28, 50)
GUIDANCE = (1.0, 2.0, 3.0, 5.0)
STARTS = (0.5, 0.7, 0.85, 1.0)  # times of flow matching, at which steps begin
LEVELS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of SSIM, at which methods are compared
TRIED = 32  # first images, on which methods were tried out
CONTRASTS = (1.0, 0.9, 0.8, 0.7, 0.6)  # the first: images as made
PEER = "flowedit"


@dataclass(frozen=True)
class Way:
    """A row.

    Args:
        method: of `translate`.
        solver: of the plan, with its settings in words.
        ends: network evaluations of a step, without guidance's.
        guided: whether guidance takes one more.
        more: evaluations besides those of steps.
        end: time of the last state.
    """

    method: Method
    solver: str = "ddim"
    ends: int = 2
    guided: bool = True
    more: int = 0
    end: float = 0.0

    def steps(self, calls: int, guidance: float) -> int:
        """Of so many calls."""
        return (calls - self.more) // (self.ends + (self.guided and guidance != 1))

    def plan(self, model: Model, steps: int, start: float) -> Plan:
        """Equal steps in the time of flow matching."""
        process = model.process
        times = uniform(process, steps, start=min(start, process.t_max), end=self.end and process.t_min)
        return parse(self.solver).at(model, times)


WAYS: dict[str, Way] = {
    PEER: Way("flowedit"),
    "flowalign": Way("flowalign", ends=3, guided=False),
    "sdedit": Way("sdedit", "ddim:eta=1", ends=1),
    "uni-inv": Way("uni-inv", more=1, end=1.0),
    "direct": Way("direct", more=1, end=1.0),
    "codes along a path": Way("stochastic", "ddim:eta=1"),
    "independent codes": Way("independent", "ddim:eta=1"),
}


class Seen(NamedTuple):
    """How near images are to source and truth at one contrast."""

    contrast: float
    ssim: float
    psnr: float


@dataclass(frozen=True)
class Point:
    """What a way gave."""

    way: str
    calls: int
    guidance: float
    start: float
    steps: int
    seen: list[Seen]
    seconds: float


@dataclass(frozen=True, eq=False)
class Pairs:
    """Sources and partners, `(count, 3, 32, 32)`, captions of both, and the mean image of each partner's style."""

    images: Tensor
    truth: Tensor
    prompts: tuple[list[str], list[str]]
    mean: Tensor

    def seen(self, made: Tensor) -> list[Seen]:
        """How near images are at each contrast."""
        found = []
        for contrast in CONTRASTS:
            x = self.mean + contrast * (made - self.mean)
            found.append(Seen(contrast, float(ssim(x, self.images).mean()), float(psnr(x, self.truth).mean())))
        return found


def measure(name: str, model: Model, pairs: Pairs, calls: int, g: float) -> list[Point]:
    """The points of a way, a start each."""
    way, found = WAYS[name], []
    steps = way.steps(calls, g)
    for start in STARTS if steps else ():
        plan = way.plan(model, steps, start)
        source, target = (
            Diffusion(model, plan).given(text, weight) for text, weight in zip(pairs.prompts, (1.0, g), strict=True)
        )
        began = time.perf_counter()
        made = translate(pairs.images, source, target, method=way.method, rows=BATCH)
        seconds = time.perf_counter() - began
        if g == 1 and made.nfe != way.ends * steps + way.more:
            raise ValueError(f"{name} made {made.nfe:g} calls in {steps} steps.")
        found.append(Point(name, calls, g, start, steps, pairs.seen(made.images), round(seconds, 2)))
    return found


Line = list[tuple[float, float]]


def lines(points: Sequence[Point], way: str, calls: int, copy: list[Seen], *, pale: bool) -> list[Line]:
    """A way's SSIM and PSNR from the copy on, a line for each weight of guidance, and each contrast if `pale`."""
    own = [p for p in points if (p.way, p.calls) == (way, calls)]
    return [
        sorted([copy[k][1:], *(p.seen[k][1:] for p in own if p.guidance == weight)])
        for weight in dict.fromkeys(p.guidance for p in own)
        for k in range(len(CONTRASTS) if pale else 1)
    ]


def at_similarity(some: Sequence[Line], level: float) -> float | None:
    """The best PSNR on any line at an SSIM or above; `None` if no line comes down to it."""
    if not any(line[0][0] <= level for line in some):
        return None
    best = [near for line in some for kept, near in line if kept >= level]
    for line in some:
        for (low, one), (high, other) in itertools.pairwise(line):
            if low <= level <= high and low < high:
                best.append(one + (other - one) * (level - low) / (high - low))
    return max(best)


def compared(points: Sequence[Point], copy: list[Seen], *, pale: bool) -> str:
    """PSNR to the truth of every way at equal similarity, a table for each budget of calls."""
    texts = []
    for calls in dict.fromkeys(p.calls for p in points):
        rows = []
        for name in dict.fromkeys(p.way for p in points):
            own = lines(points, name, calls, copy, pale=pale)
            top = max((spot for line in own for spot in line), key=lambda spot: spot[1], default=None)
            most = "-" if top is None else f"{top[1]:.2f} at {top[0]:.2f}"
            rows.append([name, *(_decibels(at_similarity(own, level)) for level in LEVELS), most])
        head = [f"{calls} calls", *(f"at SSIM {level:g}" for level in LEVELS), "highest"]
        texts.append(table(head, rows))
    return "\n\n".join(texts)


def gains(points: Sequence[Point], copy: list[Seen], *, pale: bool) -> dict[str, dict[str, dict[str, float]]]:
    """By how much each way is nearer to the truth than the peer: by calls and similarity, in dB."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(p.way for p in points if p.way != PEER):
        for calls in dict.fromkeys(p.calls for p in points):
            own, peer = (lines(points, one, calls, copy, pale=pale) for one in (name, PEER))
            for level in LEVELS:
                ends = [at_similarity(some, level) for some in (own, peer)]
                if ends[0] is not None and ends[1] is not None:
                    found.setdefault(name, {}).setdefault(str(calls), {})[f"{level:g}"] = round(ends[0] - ends[1], 3)
    return found


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def picture(name: str, points: Sequence[Point], copy: list[Seen]) -> None:
    """PSNR against SSIM, a panel for each budget: as made, and the best at any contrast."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    budgets = list(dict.fromkeys(p.calls for p in points))
    figure, axes = plt.subplots(2, len(budgets), figsize=(4.2 * len(budgets), 7.5), squeeze=False, sharey="row")
    levels = [k / 200 for k in range(198, 119, -1)]
    for row, pale in zip(axes, (False, True), strict=True):
        for axis, calls in zip(row, budgets, strict=True):
            for k, way in enumerate(dict.fromkeys(p.way for p in points)):
                own = lines(points, way, calls, copy, pale=pale)
                if not pale:
                    dots = zip(*itertools.chain.from_iterable(own), strict=True)
                    axis.scatter(*dots, s=7, color=f"C{k}", alpha=0.5)
                found = [(x, y) for x in levels if (y := at_similarity(own, x)) is not None]
                axis.plot(*zip(*found, strict=True), color=f"C{k}")
                axis.annotate(way, found[-1], color=f"C{k}", fontsize=7, xytext=(3, -3), textcoords="offset points")
            axis.set_title(f"{calls} calls" + (", any contrast" if pale else ""))
            axis.set_xlim(1.01, 0.5)
            axis.set_ylim(copy[0].psnr - 0.2, copy[0].psnr + (2.8 if pale else 1.9))
            axis.grid(visible=True, alpha=0.2)
        row[0].set_ylabel("PSNR to the truth, dB")
    for axis in axes[-1]:
        axis.set_xlabel("SSIM to the source")
    figure.tight_layout()
    with atomic_path(RESULTS / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def emoji(path: Path, count: int) -> Pairs:
    """Held-out pairs, half of them each way."""
    data = np.load(path)
    styles, seen = (
        from_bytes(torch.from_numpy(data[f"x_{split}"]).permute(0, 3, 1, 2)).chunk(2) for split in ("test", "train")
    )
    captions = [str(text).rsplit(", ", 1)[0] for text in data["captions_test"][: len(styles[0])]]
    order = np.random.default_rng(0).permutation(len(captions))[TRIED : TRIED + count]
    ways = [n % 2 for n in range(count)]
    ends = [torch.stack([styles[w ^ side][i] for i, w in zip(order, ways, strict=True)]) for side in (0, 1)]
    told = [[f"{captions[i]}, {STYLES[w ^ side]}" for i, w in zip(order, ways, strict=True)] for side in (0, 1)]
    return Pairs(ends[0], ends[1], (told[0], told[1]), torch.stack([seen[1 - w].mean(0) for w in ways]))


def main() -> None:
    """Measure all ways, and write tables, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help=".npz made by examples/zoo_data.py")
    parser.add_argument("--count", type=int, default=16, help="images")
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS), help="network evaluations of an image")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--name", default="editing", help="of the files in results/")
    options = parser.parse_args()
    pairs, model = emoji(options.emoji, options.count), load("emoji")
    assert isinstance(model.denoiser, Network)
    model = replace(model, denoiser=replace(model.denoiser, autocast=torch.bfloat16)).as_flow()
    copy = pairs.seen(pairs.images)
    points: list[Point] = []
    for calls in options.calls:
        for way in options.ways:
            for weight in GUIDANCE:
                points += measure(way, model, pairs, calls, weight)
            print(f"{way}, {calls} calls: {sum(p.seconds for p in points):.0f} s so far", flush=True)
    report(options.name, points, copy, options.count)


def report(name: str, points: list[Point], copy: list[Seen], count: int) -> None:
    """Tables, JSON and picture."""
    texts = [compared(points, copy, pale=pale) for pale in (False, True)]
    text = f"""# Editing: near the truth, and near the source

PSNR to the true partner, dB, of the best that keeps so much of the source; {count} held-out emoji, half each way.
Calls are network evaluations of an image, guidance's included. The copy has {copy[0].psnr:.2f} dB.

{texts[0]}

## At any contrast

The same where all methods' images, and the copy, may be paler: the best of {", ".join(map(str, CONTRASTS))}.

{texts[1]}"""
    print(text)
    write_text(name, text)
    more = {"gains": gains(points, copy, pale=False), "gains_at_any_contrast": gains(points, copy, pale=True)}
    rows = [{**asdict(p), "seen": [one._asdict() for one in p.seen]} for p in points]
    write_json(name, {"images": count, "copy": [one._asdict() for one in copy], **more, "points": rows})
    picture(name, points, copy)


if __name__ == "__main__":
    main()

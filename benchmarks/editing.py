"""Editing with the truth at hand: how near each method comes to an emoji's true partner, and what it keeps.

    python benchmarks/editing.py --emoji emoji.npz                   # made by examples/zoo_data.py
    python benchmarks/editing.py --emoji emoji.npz --calls 28 --count 64

A held-out emoji in one drawing style is edited into the other by its caption ("grinning face, noto" to "grinning face,
twemoji"); the truth is the same emoji as the other style draws it. The embedded network is run as one of flow matching
(`Model.as_flow`), in which Euler's steps of `flowedit` and `flowalign` are those of the papers, and in 16 bits. With
the default counts that takes ten minutes on one core. `deterministic` is left out: exact inversion takes about ten
evaluations a step.

*Calls* are network evaluations of an image, all of them: both ends' and guidance's second ones. A method takes as many
steps as its budget has room for. Methods differ in how much they change, so each is run from several first times and
with several weights of guidance, and compared at equal similarity (SSIM) to the source: the points of one weight make a
line, and a method's PSNR to the truth at a similarity is that of its best line.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _common import RESULTS, table, write_json, write_text
from torch import Tensor

from pushforward import Diffusion, Model, Network, Plan, load
from pushforward.data.files import atomic_path
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
CHOSEN = 32  # first images, by which flowblend's share was chosen
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
        ours: whether it is a method of ours, or of a paper.
    """

    method: Method
    solver: str = "ddim"
    ends: int = 2
    guided: bool = True
    more: int = 0
    end: float = 0.0
    ours: bool = False

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
    "flowblend": Way("flowblend", ours=True),
    "flowalign": Way("flowalign", ends=3, guided=False),
    "sdedit": Way("sdedit", "ddim:eta=1", ends=1),
    "uni-inv": Way("uni-inv", more=1, end=1.0),
    "direct": Way("direct", more=1, end=1.0),
    "codes along a path": Way("stochastic", "ddim:eta=1"),
    "independent codes": Way("independent", "ddim:eta=1"),
}


@dataclass(frozen=True)
class Point:
    """What a way gave."""

    way: str
    calls: int
    guidance: float
    start: float
    steps: int
    ssim: float
    psnr: float
    error: float
    seconds: float


def measure(
    name: str, model: Model, images: Tensor, truth: Tensor, prompts: tuple[list[str], list[str]], calls: int, g: float
) -> list[Point]:
    """The points of a way, a start each."""
    way, found = WAYS[name], []
    steps = way.steps(calls, g)
    for start in STARTS if steps else ():
        plan = way.plan(model, steps, start)
        source, target = (
            Diffusion(model, plan).given(text, weight) for text, weight in zip(prompts, (1.0, g), strict=True)
        )
        began = time.perf_counter()
        made = translate(images, source, target, method=way.method, rows=BATCH)
        seconds = time.perf_counter() - began
        if g == 1 and made.nfe != way.ends * steps + way.more:
            raise ValueError(f"{name} made {made.nfe:g} calls in {steps} steps.")
        near = psnr(made.images, truth).double()
        kept = float(ssim(made.images, images).mean())
        error = float(near.std() / len(near) ** 0.5)
        found.append(Point(name, calls, g, start, steps, kept, float(near.mean()), error, round(seconds, 2)))
    return found


def at_similarity(points: Sequence[Point], copy: float, level: float) -> float | None:
    """The best PSNR at an SSIM, on the lines from the copy through the points of a weight; `None`: off them all."""
    best: list[float] = []
    for weight in {p.guidance for p in points}:
        line = sorted([(1.0, copy), *((p.ssim, p.psnr) for p in points if p.guidance == weight)])
        for (low, one), (high, other) in itertools.pairwise(line):
            if low <= level <= high and low < high:
                best.append(one + (other - one) * (level - low) / (high - low))
    return max(best, default=None)


def compared(points: Sequence[Point], copy: float) -> str:
    """PSNR to the truth of every way at equal similarity, a table for each budget of calls."""
    texts = []
    for calls in dict.fromkeys(p.calls for p in points):
        rows = []
        for name in dict.fromkeys(p.way for p in points):
            own = [p for p in points if (p.way, p.calls) == (name, calls)]
            label = f"**{name}**" if WAYS[name].ours else name
            rows.append([label, *(_decibels(at_similarity(own, copy, level)) for level in LEVELS), _most(own)])
        head = [f"{calls} calls", *(f"at SSIM {level:g}" for level in LEVELS), "highest"]
        texts.append(table(head, rows))
    return "\n\n".join(texts)


def gains(points: Sequence[Point], copy: float) -> dict[str, dict[str, dict[str, float]]]:
    """By how much each way of ours is nearer to the truth than the peer: by calls and similarity, in dB."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in (name for name, way in WAYS.items() if way.ours):
        for calls in dict.fromkeys(p.calls for p in points):
            own, peer = ([p for p in points if (p.way, p.calls) == (one, calls)] for one in (name, PEER))
            for level in LEVELS:
                ends = [at_similarity(some, copy, level) for some in (own, peer)]
                if ends[0] is not None and ends[1] is not None:
                    row = found.setdefault(name, {}).setdefault(str(calls), {})
                    row[f"{level:g}"] = round(ends[0] - ends[1], 3)
    return found


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _most(points: Sequence[Point]) -> str:
    if not points:
        return "-"
    best = max(points, key=lambda p: p.psnr)
    return f"{best.psnr:.2f} ± {best.error:.2f} at {best.ssim:.2f}"


def picture(points: Sequence[Point], copy: float) -> None:
    """PSNR against SSIM, a panel for each budget; lines are at the weight of guidance that leads highest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    budgets = list(dict.fromkeys(p.calls for p in points))
    figure, axes = plt.subplots(1, len(budgets), figsize=(4.2 * len(budgets), 4), squeeze=False, sharey=True)
    for axis, calls in zip(axes[0], budgets, strict=True):
        for k, name in enumerate(dict.fromkeys(p.way for p in points)):
            own = [p for p in points if (p.way, p.calls) == (name, calls)]
            if not own:
                continue
            colour, best = f"C{k}", max(own, key=lambda p: p.psnr)
            axis.scatter([p.ssim for p in own], [p.psnr for p in own], s=7, color=colour, alpha=0.5)
            line = sorted([(1.0, copy), *((p.ssim, p.psnr) for p in own if p.guidance == best.guidance)])
            axis.plot(*zip(*line, strict=True), color=colour, linewidth=2 if WAYS[name].ours else 1)
            axis.annotate(name, (best.ssim, best.psnr), color=colour, fontsize=7, xytext=(2, 3),
                          textcoords="offset points")  # fmt: skip
        axis.set_title(f"{calls} calls")
        axis.set_xlabel("SSIM to the source")
        axis.set_xlim(1.01, 0.4)
        axis.set_ylim(copy - 1.5, None)
        axis.grid(visible=True, alpha=0.2)
    axes[0][0].set_ylabel("PSNR to the truth, dB")
    figure.tight_layout()
    with atomic_path(RESULTS / "editing.png") as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def emoji(path: Path, count: int) -> tuple[Tensor, Tensor, tuple[list[str], list[str]]]:
    """Sources, half in each style, their partners, and the captions of both."""
    data = np.load(path)
    styles = (torch.from_numpy(data["x_test"]).permute(0, 3, 1, 2).float() / 127.5 - 1).chunk(2)
    captions = [str(text).rsplit(", ", 1)[0] for text in data["captions_test"][: len(styles[0])]]
    order = np.random.default_rng(0).permutation(len(captions))[CHOSEN : CHOSEN + count]
    ends: tuple[list[Tensor], list[Tensor]] = ([], [])
    told: tuple[list[str], list[str]] = ([], [])
    for n, i in enumerate(order):
        for side in (0, 1):
            style = (n + side) % 2
            ends[side].append(styles[style][i])
            told[side].append(f"{captions[i]}, {STYLES[style]}")
    return torch.stack(ends[0]), torch.stack(ends[1]), told


def main() -> None:
    """Measure all ways, and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help=".npz made by examples/zoo_data.py")
    parser.add_argument("--count", type=int, default=16, help="images")
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS), help="network evaluations of an image")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--name", default="editing", help="of the files in results/")
    options = parser.parse_args()
    images, truth, prompts = emoji(options.emoji, options.count)
    model, copy = load("emoji"), float(psnr(images, truth).mean())
    assert isinstance(model.denoiser, Network)
    model = replace(model, denoiser=replace(model.denoiser, autocast=torch.bfloat16)).as_flow()
    points: list[Point] = []
    for calls in options.calls:
        for name in options.ways:
            for weight in GUIDANCE:
                points += measure(name, model, images, truth, prompts, calls, weight)
            print(f"{name}, {calls} calls: {sum(p.seconds for p in points):.0f} s so far", flush=True)
    text = compared(points, copy)
    print(text)
    count = len(images)
    intro = (
        f"PSNR to the true partner, dB, where methods keep as much of the source; {count} held-out emoji, half of them "
        f"each way, of which the copy itself has {copy:.2f} dB. Calls are network evaluations of an image, guidance's "
        "included."
    )
    write_text(options.name, f"# Editing: near the truth, and near the source\n\n{intro}\n\n{text}")
    rows = [asdict(point) for point in points]
    write_json(options.name, {"images": count, "copy": copy, "gains": gains(points, copy), "points": rows})
    picture(points, copy)


if __name__ == "__main__":
    main()

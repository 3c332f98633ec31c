"""Translation between two drawing styles, and between kinds of clothes: what each method keeps, and what it reaches.

    python benchmarks/translation.py --emoji emoji.npz                    # made by examples/zoo_data.py
    python benchmarks/translation.py --emoji emoji.npz --only apart       # two networks trained apart
    python benchmarks/translation.py --fashion fashion.npz
    python benchmarks/translation.py --reconstruction --emoji emoji.npz --fashion fashion.npz

Emoji come in pairs, of which the networks have seen none of the test images, and none as a pair; so translations are
compared with the truth: distance to the true partner, and its place among all emoji of that style by features of
EffNet. The bound is the truth itself, the floor a copy of the input. Methods differ in how much they change, so each
is run from several first times (`start`, a share of the steps), and compared at equal similarity to the source.

For clothes there are no pairs; a classifier of ours (92.4% right on real images) judges how many arrive.

`--reconstruction`, with `--emoji` and `--fashion`, encodes test images under every stochastic plan of every embedded
model, all steps in one round and step by step, and says how far decoding is from the image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, table, write_json, write_text
from torch import Tensor

from pushforward import Diffusion, Model, Network, PushforwardError, load
from pushforward.data.pictures import compared, from_bytes, save_image, to_bytes
from pushforward.evaluation.pairs import ssim
from pushforward.evaluation.translation import Row, compare, space
from pushforward.evaluation.translation import table as comparison
from pushforward.maps.labels import Labels
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.model.zoo import names
from pushforward.translation.translate import Method, sampler_for, translate
from pushforward.vision.features import classify, feature_net

BATCH = 64
PAIRS = {"pullover to coat": ("pullover", "coat"), "sneaker to ankle boot": ("sneaker", "ankle boot")}
PLANS = (
    "ddim:eta=0.1",
    "ddim:eta=1",
    "ddpm",
    "gddim:noise=0.5",
    "exponential:order=1:noise=1",
    "euler-maruyama",
    "sscs",
)


@dataclass(frozen=True)
class Way:
    """A row: a method, its eta, and where it begins."""

    method: Method
    eta: float
    start: float

    @property
    def name(self) -> str:
        """As printed."""
        eta = f" eta {self.eta:g}" if self.method in ("stochastic", "sdedit") else ""
        half = " in half the steps" if self.method == "deterministic" else ""
        return f"{self.method}{eta} from {self.start:g}{half}"

    def steps(self, steps: int) -> int:
        """Of a table with so many: an inversion takes about ten times the calls, so it has half the steps."""
        return steps // 2 if self.method == "deterministic" else steps


def ways(*, few: bool, deterministic: bool = False) -> list[Way]:
    """The rows of a table."""
    if deterministic:
        return [Way("deterministic", 0.0, start) for start in (0.6, 1.0)]
    drawn: list[Way] = [Way("stochastic", 0.1, start) for start in (0.5, 0.6, 0.7, 0.8, 1.0)]
    baseline: list[Way] = [Way("sdedit", 1.0, start) for start in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)]
    if few:
        return [*drawn, *baseline]
    more: list[Way] = [Way("stochastic", eta, start) for eta in (0.5, 1.0) for start in (0.6, 0.8, 1.0)]
    apart: list[Way] = [Way("independent", 1.0, start) for start in (0.6, 0.8, 1.0)]
    return [*drawn, *more, *apart, *baseline]


def fast(model: Model) -> Model:
    """The model compiled and in bfloat16, for batches of `BATCH`."""
    assert isinstance(model.denoiser, Network)
    module = torch.compile(model.denoiser.module, dynamic=False)
    return replace(model, denoiser=replace(model.denoiser, module=module, autocast=torch.bfloat16, max_batch=BATCH))


def exact(model: Model) -> Model:
    """The model in float32 again, and not compiled: the rows of a call of an inversion grow fewer."""
    assert isinstance(model.denoiser, Network)
    module = getattr(model.denoiser.module, "_orig_mod", model.denoiser.module)
    return replace(model, denoiser=replace(model.denoiser, module=module, autocast=None))


def translations(
    images: Tensor, source: tuple[Model, Labels], target: tuple[Model, Labels], rows: list[Way], steps: int
) -> Iterator[tuple[Way, Tensor, dict[str, float]]]:
    """Each way's images, with rounds, network evaluations and seconds."""
    for way in rows:
        settings = {} if way.method == "deterministic" else {"eta": way.eta}
        if way.method == "deterministic":  # a fixed point to 1e-4 is out of reach of 16 bits
            source, target = ((exact(model), labels) for model, labels in (source, target))
        sampler = SamplerSpec("ddim", way.steps(steps), settings, start=way.start)
        one, other = (
            Diffusion(model, sampler_for(model, sampler, way.method).plan(model)).given(labels)
            for model, labels in (source, target)
        )
        if way == rows[0]:  # the network is compiled, unmeasured
            ends = (end.some(slice(BATCH)) for end in (one, other))
            translate(images[:BATCH], *ends, method=way.method, rows=BATCH)
        began, pieces, rounds, nfe = time.perf_counter(), [], 0, 0.0
        for first in range(0, len(images), BATCH):
            some = slice(first, first + BATCH)
            found = translate(
                images[some], one.some(some), other.some(some), method=way.method, first=first, rows=BATCH
            )
            pieces.append(found.images)
            rounds, nfe = max(rounds, found.rounds), nfe + found.nfe * len(found.images) / len(images)
        seconds = time.perf_counter() - began
        print(f"  {way.name}: {seconds:.0f} s", flush=True)
        yield way, torch.cat(pieces), {"rounds": rounds, "nfe": nfe, "seconds": seconds}


def emoji(path: Path, count: int, steps: int, only: str | None, *, deterministic: bool) -> None:
    """The tables of emoji: one network under two words, with and without captions, and two networks trained apart."""
    data = np.load(path)
    every = {split: from_bytes(torch.from_numpy(data[f"x_{split}"]).permute(0, 3, 1, 2))
             for split in ("train", "test")}  # fmt: skip
    half = {split: x.chunk(2) for split, x in every.items()}
    captions = [str(text).rsplit(", ", 1)[0] for text in data["captions_test"][: len(half["test"][0])]]
    order = np.random.default_rng(0).permutation(len(captions))[:count]
    told = [captions[i] for i in order]
    one = fast(load("emoji"))
    apart = [fast(load(f"emoji-{style}")) for style in ("noto", "twemoji")]
    styles = ["noto", "twemoji"]
    cases: dict[str, tuple[int, Model, Model, list[Labels], bool]] = {}
    for k in (0, 1):
        way = f"{styles[k]} to {styles[1 - k]}"
        words: list[Labels] = [[style] * count for style in (styles[k], styles[1 - k])]
        spoken: list[Labels] = [[f"{text}, {style}" for text in told] for style in (styles[k], styles[1 - k])]
        cases[f"one network, {way}"] = (k, one, one, words, k == 1)
        cases[f"one network told the captions, {way}"] = (k, one, one, spoken, True)
        cases[f"two networks trained apart, {way}"] = (k, apart[k], apart[1 - k], [None, None], True)
    network = space(feature_net("effnet"))
    for name, (k, first, second, labels, few) in cases.items():
        if only is not None and only not in name:
            continue
        print(name, flush=True)
        source, truth = (half["test"][i][order] for i in (k, 1 - k))
        targets = torch.cat([half["train"][1 - k], half["test"][1 - k]])
        rows_of = ways(few=few, deterministic=deterministic)
        found = list(translations(source, (first, labels[0]), (second, labels[1]), rows_of, steps))
        rows = compare({way.name: images for way, images, _ in found}, source, truth, targets, network)
        name = f"{name}, deterministic" if deterministic else name
        report(name, rows, found, [source, truth], {"images": count, "steps": steps})


def report(
    name: str, rows: list[Row], found: list[tuple[Way, Tensor, dict[str, float]]], above: list[Tensor], info: dict
) -> None:
    """Table, JSON and sheet of one case."""
    effort = {way.name: {**figures, "method": way.method, "eta": way.eta, "start": way.start}
              for way, _, figures in found}  # fmt: skip
    stem = "translation-" + name.replace(",", "").replace(" ", "-")
    text = comparison(rows)
    print(text)
    write_text(
        stem, f"# Translation: {name}\n\n{info['images']} held-out images, {info['steps']} steps.\n\n```\n{text}\n```\n"
    )
    figures = [
        {"name": row.name, "count": row.count, "space": row.space, **row.measures, **effort.get(row.name, {})}
        for row in rows
    ]
    finite = [{key: None if value == float("inf") else value for key, value in row.items()} for row in figures]
    write_json(stem, {"case": name, **info, "rows": finite})
    shown = [images[:16] for way, images, _ in found if way.start in (0.6, 1.0)]
    save_image(compared([*(x[:16] for x in above), *shown]), RESULTS / f"{stem}.png")


def fashion(path: Path, count: int, steps: int) -> None:
    """Success by a classifier against similarity to the source."""
    data = np.load(path)
    images = from_bytes(torch.from_numpy(data["x_test"].reshape(-1, 1, 28, 28)))
    labels = torch.from_numpy(data["y_test"].astype(np.int64))
    model = fast(load("fashion-vp"))
    rows: list[dict[str, Any]] = []
    for name, (before, after) in PAIRS.items():
        print(name, flush=True)
        a, b = model.classes.index(before), model.classes.index(after)
        source = images[labels == a][:count]
        ends = [(model, torch.full((len(source),), k)) for k in (a, b)]
        for way, result, effort in translations(source, ends[0], ends[1], ways(few=True), steps):
            success = float((classify(to_bytes(result)) == b).float().mean())
            rows.append({"pair": name, "method": way.name, "success": success,
                         "ssim": float(ssim(result, source).mean()), **effort})  # fmt: skip
    cells = table(list(rows[0]), [list(row.values()) for row in rows])
    print(cells)
    write_text(
        "translation-fashion",
        f"# Clothes: how many arrive, and what is kept\n\n{count} test images, {steps} steps.\n\n{cells}",
    )
    write_json("translation-fashion", {"images": count, "steps": steps, "rows": rows})


def reconstruction(files: dict[str, Path | None], steps: int, count: int) -> None:
    """The greatest error of decoding what was encoded, for each embedded model and plan."""
    rows: list[dict[str, Any]] = []
    for name in names():
        path = files[name.partition("-")[0]]
        if path is None:
            continue
        model, images = load(name), torch.from_numpy(np.load(path)["x_test"][:: 400 // count][:count])
        real = from_bytes(images.reshape(count, *images.shape[1:3], -1).permute(0, 3, 1, 2))
        for text in PLANS:
            try:
                plan = replace(parse(text), steps=steps, end=model.process.t_min).plan(model)
                chain = Diffusion(model, plan)
                row: dict[str, Any] = {"model": name, "plan": text}
                for label, sequential in (("one round", False), ("step by step", True)):
                    found = chain.encode(real, sequential=sequential, rows=BATCH)
                    error = float((chain.decode(found.code) - real).abs().max())
                    row |= {f"{label}: rounds": found.rounds, f"{label}: max abs error": error}
            except PushforwardError as error:
                row = {"model": name, "plan": text, "not for this process": str(error)}
            print(row, flush=True)
            rows.append(row)
    kept = [row for row in rows if "one round: rounds" in row]
    cells = table(list(kept[0]), [list(row.values()) for row in kept])
    print(cells)
    write_text("reconstruction", f"# Codes decoded again\n\n{count} images a model, {steps} steps.\n\n{cells}")
    write_json("reconstruction", {"images": count, "steps": steps, "rows": rows})


def main() -> None:
    """Run what there are data for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--reconstruction", action="store_true")
    parser.add_argument("--only", help="cases of emoji with this in their name")
    parser.add_argument("--deterministic", action="store_true", help="emoji by exact inversion, a table of its own")
    parser.add_argument("--count", type=int, default=128, help="images")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    if options.reconstruction:
        reconstruction({"emoji": options.emoji, "fashion": options.fashion}, steps=100, count=4)
        return
    if options.emoji:
        emoji(options.emoji, options.count, options.steps, options.only, deterministic=options.deterministic)
    if options.fashion:
        fashion(options.fashion, options.count, options.steps)


if __name__ == "__main__":
    main()

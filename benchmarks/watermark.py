"""Watermarks: how many bits survive what is done to images, and how often an unmarked image is taken for a marked one.

    python benchmarks/watermark.py [--models fashion-vp emoji] [--changes crop shift] [--count 64] [--keys 400]
    python benchmarks/watermark.py --changes                    # false positives alone

Images are drawn with a message in their codes, by the default solver with the models' own classes or captions, changed,
written as bytes, and read without class or caption. Noise and compression are of the range 0 to 1 (noise .05 is .1 in
[-1, 1]; half of it is told, too). A crop takes a border of unknown place, whose width differs from image to image, and
what is left is brought to the old size; a stretched one takes of height and width each its own part. A shift is of
another place for each image, and repeats the border. Plain inversion is DDIM run forwards in 50 steps, whose signs are
counted.

False positives are of images that carry no mark, and of as many keys as are asked for.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from _common import read_json, table, write_json, write_text
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from pushforward import Diffusion, Model, load
from pushforward.data.pictures import from_bytes, to_bytes
from pushforward.maps.guesses import guesses
from pushforward.maps.passes import last_states, passing
from pushforward.maps.watermark import Bits, Found, Ring, read
from pushforward.plan import solvers
from pushforward.plan.grid import power

RATE = 1e-3
LENGTHS = {"fashion-vp": (2, 4), "emoji": (2, 4)}  # bytes
KEY, MESSAGE = b"benchmark", b"\x9d\x17\xe2\x5b\x34\xc8\x61\xfa"
CROP = {28: 4, 32: 4}  # pixels of a side
SHIFT = 3  # pixels each way
SLOW = ("crop", "crop, stretched", "shift")  # to read, so of the shortest messages alone


def eight_bits(images: Tensor) -> Tensor:
    """Images as they come back from a file."""
    return from_bytes(to_bytes(images))


def noise(deviation: float) -> Callable[[Tensor], Tensor]:
    """White noise, by its deviation in [0, 1]."""

    def change(images: Tensor) -> Tensor:
        return images + 2 * deviation * torch.randn(images.shape, generator=torch.Generator().manual_seed(7))

    return change


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    """Compression, with the colours' usual halving."""

    def change(images: Tensor) -> Tensor:
        again = []
        for image in to_bytes(images):
            grey, file = image.shape[0] == 1, io.BytesIO()
            picture = Image.fromarray((image[0] if grey else image.permute(1, 2, 0)).numpy())
            picture.save(file, "JPEG", quality=quality)
            values = torch.from_numpy(np.array(Image.open(file)))
            again.append(values[None] if grey else values.permute(2, 0, 1))
        return from_bytes(torch.stack(again))

    return change


def crop(images: Tensor, *, stretched: bool = False) -> Tensor:
    """A crop of a place of its own for each image, brought to the old size; if `stretched`, of unequal sides."""
    side, place = images.shape[-1], torch.Generator().manual_seed(7)
    changed = []
    for image in images:
        high = wide = side - int(torch.randint(1, CROP[side] + 1, (), generator=place))
        if stretched:
            wide = side - int(torch.randint(1, CROP[side] + 1, (), generator=place))
        top, left = (int(torch.randint(0, side - kept + 1, (), generator=place)) for kept in (high, wide))
        part = image[None, :, top : top + high, left : left + wide]
        changed.append(interpolate(part, (side, side), mode="bicubic", antialias=True)[0])
    return torch.stack(changed)


def shift(images: Tensor) -> Tensor:
    """Every image moved to a place of its own; its border is repeated."""
    place, moved = torch.Generator().manual_seed(7), []
    for image in images:
        down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=place).tolist()
        moved.append(pad(image[None], (right, -right, down, -down), "replicate")[0])
    return torch.stack(moved)


def resize(images: Tensor) -> Tensor:
    """Made smaller, to three quarters, and large again."""
    side = images.shape[-1]
    small = interpolate(images, (side * 3 // 4,) * 2, mode="bilinear", antialias=True)
    return interpolate(eight_bits(small), (side, side), mode="bilinear")


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x, "noise .025": noise(0.025), "noise .05": noise(0.05), "JPEG 75": jpeg(75), "JPEG 50": jpeg(50),
    "resize": resize, "crop": crop, "crop, stretched": partial(crop, stretched=True), "shift": shift,
}  # fmt: skip


def plain(model: Model, images: Tensor) -> Tensor:
    """The signs of the codes of plain inversion, as a single view."""
    plan = solvers.ddim(model.process, power(model.process, 50, end=model.process.t_min))
    diffusion = Diffusion(model, plan)
    return passing(diffusion, last_states(diffusion, images), "naive")[0].start.sign()[None]


def codes(model: Model, images: Tensor, way: str, change: str) -> Tensor:
    """The codes that a way of reading finds."""
    if way == "plain":
        return plain(model, images)
    there = model.diffusion("ddim", 12)
    crops, shifts = CROP[images.shape[-1]] if "crop" in change else 0, SHIFT if change == "shift" else 0
    return guesses(there, images, crops=crops, shifts=shifts)


def told(found: Found) -> dict[str, float]:
    """What was found, in figures."""
    correct = found.correct
    figures = {"marked": float(found.marked(RATE).double().mean())}
    if correct is not None:
        figures |= {"bits": float(correct.mean()), "whole": float((correct == 1).double().mean())}
    return figures


def survived(name: str, model: Model, count: int, changes: list[str]) -> list[dict[str, Any]]:
    """A row for each message, change and way."""
    rows: list[dict[str, Any]] = []
    for length in (*LENGTHS[name], 0):
        message = MESSAGE[:length] or None
        some = [c for c in changes if c not in SLOW or length == LENGTHS[name][0]]
        images = model.watermark(count, key=KEY, message=message, seed=1).images if some else torch.empty(0)
        for change in some:
            changed = eight_bits(CHANGES[change](images))
            for way in ("ours", "plain"):
                began = time.perf_counter()
                views = codes(model, changed, way, change)
                figures = told(read(Bits(KEY, length) if length else Ring(KEY), views, message))
                if length:
                    unknown = read(Bits(KEY, length), views)
                    figures["marked, message unknown"] = float(unknown.marked(RATE).double().mean())
                rows.append({
                    "model": name, "bits": 8 * length, "change": change, "way": way, "count": count,
                    "figures": figures, "seconds": (time.perf_counter() - began) / count,
                })  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def false_positives(name: str, model: Model, count: int, keys: int) -> list[dict[str, Any]]:
    """How often images without a mark are taken for marked ones, over keys."""
    images = eight_bits(model.sample(count, seed=99))
    rows: list[dict[str, Any]] = []
    for way in ("ours", "plain"):
        views = codes(model, images, way, "none")
        kinds = {
            "message known": (Bits(b"?", LENGTHS[name][0]), MESSAGE[: LENGTHS[name][0]]),
            "message unknown": (Bits(b"?", LENGTHS[name][0]), None),
            "ring": (Ring(b"?"), None),
        }
        for kind, (pattern, message) in kinds.items():
            some = [read(replace(pattern, key=f"other {k}".encode()), views, message).p_value for k in range(keys)]
            p_values = torch.stack(some)
            taken = {str(rate): int((p_values <= rate).sum()) for rate in (0.1, 0.01, RATE)}
            rows.append({"model": name, "way": way, "kind": kind, "tried": p_values.numel(), "taken": taken})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LENGTHS))
    parser.add_argument("--changes", nargs="*", default=list(CHANGES))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--keys", type=int, default=400, help="0: leave false positives as they are")
    asked = parser.parse_args()
    for name in asked.models:
        model = load(name)
        rows = survived(name, model, asked.count, asked.changes)
        false = false_positives(name, model, asked.count, asked.keys) if asked.keys else []
        known = read_json("watermark")
        parts = {
            "rows": (rows, ("model", "bits", "change", "way")),
            "false_positives": (false, ("model", "way", "kind")),
        }
        report(*(list({tuple(row[key] for key in keys): row for row in known.get(part, []) + new}.values())
                 for part, (new, keys) in parts.items()))  # fmt: skip


def report(rows: list[dict[str, Any]], false: list[dict[str, Any]]) -> None:
    """Write the tables."""
    shown = [
        [row["model"], row["bits"] or "ring", row["change"], row["way"], row["count"], *(
            f"{100 * row['figures'][name]:.1f}" if name in row["figures"] else "-"
            for name in ("bits", "whole", "marked", "marked, message unknown")), row["seconds"]]
        for row in rows
    ]  # fmt: skip
    columns = ["model", "bits", "change", "reading", "images", "bits right, %", "whole messages, %", "found at 1e-3, %",
               "found, message unknown, %", "seconds an image"]  # fmt: skip
    rates = [
        [r["model"], r["way"], r["kind"], r["tried"], *(f"{n / r['tried']:.1e}" for n in r["taken"].values())]
        for r in false
    ]
    text = "\n\n".join([
        "# Watermarks",
        "What is done and counted: see `benchmarks/watermark.py`.", table(columns, shown),
        "Images without a mark that are taken for marked ones, over random keys:",
        table(["model", "reading", "looked for", "trials", "at .1", "at .01", "at .001"], rates),
    ])  # fmt: skip
    write_text("watermark", text)
    write_json("watermark", {"rate": RATE, "rows": rows, "false_positives": false})


if __name__ == "__main__":
    main()

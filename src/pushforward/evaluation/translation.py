"""How good translations and edits of images are: near their source, near the truth, among the targets.

Every method gives one image for each source image, and is a row. Two rows are always there: `copy`, the source itself,
is the floor (it keeps everything and changes nothing), and `truth`, where it is known, is the bound. What a measure
says of the truth is the most that any method can be asked for, and a method no better than the copy has done nothing.

Means over images have their standard errors; those of a set's figures (median rank, distances) are of a bootstrap over
the images, the same resamples for all rows. The Fréchet distance of few images is too large, about equally in every
row: compare rows with one another and with the truth, not with distances of other counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pushforward.data.files import digest
from pushforward.data.pictures import to_bytes
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import FEWEST, Reference, Sample, distances, resamples, standard_error
from pushforward.evaluation.pairs import SMALLEST, Metric, greatest, l2, pixels, psnr, ranks, ssim
from pushforward.evaluation.report import aligned, cell, distance_name
from pushforward.vision.clip import Clip, alignment
from pushforward.vision.features import FeatureNet, features
from pushforward.vision.lpips import PairNetwork, lpips

__all__ = ["COPY", "TRUTH", "Row", "Space", "Words", "compare", "space", "table"]

COPY, TRUTH = "copy", "truth"  # the rows that are always there
FIRST = (1, 10)  # places among which the true partner is looked for
Spaces = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Words:
    """What CLIP is told of an edit.

    Args:
        clip: the model.
        source: prompts of the source images, one per image or one for all.
        target: prompts of what they are to become.
    """

    clip: Clip
    source: str | Sequence[str]
    target: str | Sequence[str]


@dataclass(frozen=True, eq=False)
class Space:
    """Features in which images are compared with others than their own source and truth.

    Args:
        name: name to print: `EffNet` for the Fréchet distance FD-EffNet.
        features: images in [-1, 1], `(count, channels, height, width)`, to `(count, d)`.
        metric: by which partners are looked for.
    """

    name: str
    features: Spaces
    metric: Metric = "euclidean"


PIXELS = Space("pixels", pixels)


@dataclass(frozen=True, eq=False)
class Row:
    """One method's figures.

    Args:
        name: name of the method.
        count: number of images.
        space: features that ranks and distances were taken in, by name.
        measures: to the source `psnr`, `ssim`, `l2`, `lpips` and `identity` (the greatest absolute difference over all
            images); to the truth `truth_psnr`, `truth_ssim`, `truth_l2`, `truth_lpips`; of the true partner among the
            candidates `top1`, `top10` (shares) and `rank` (median); to the target set `frechet` and `kernel`; by CLIP
            `clip` and `directional`. `..._error` is a standard error. What cannot be said is left out.
        values: figure per image, `(count,)`, of each measure that is a mean over images, and of `rank`.
        notes: what was left out and why, and what the figures are to be read beside; one sentence each.
    """

    name: str
    count: int
    space: str
    measures: Mapping[str, float]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def space(net: FeatureNet, *, batch: int = 250, device: str = "cpu") -> Space:
    """Return the features of a network, compared by their angle.

    Args:
        net: a network of `vision.features`.
        batch: images per network call.
        device: device to run it on.
    """
    return Space(net.name, lambda images: features(net, to_bytes(images), batch=batch, device=device), "cosine")


@torch.no_grad()
def compare(
    rows: Mapping[str, Tensor],
    source: Tensor,
    truth: Tensor | None = None,
    targets: Tensor | None = None,
    features: Space | Spaces = PIXELS,
    *,
    words: Words | None = None,
    perceptual: str | PairNetwork | None = None,
    times: int = 50,
    seed: int = 0,
    batch: int = 64,
    callback: Callable[[str], None] | None = None,
) -> list[Row]:
    """Return the figures of every method, after those of the copy and of the truth.

    Args:
        rows: images of each method in [-1, 1], `(count, channels, height, width)`, image i being made of source i.
        source: the images that they were made from.
        truth: the images that they should be, or `None`.
        targets: images of the kind they should be, `(m, channels, height, width)`, or `None`. The partner of image i
            is looked for among these and the truths, each image once.
        features: where ranks and distances are taken; by default pixels on an 8 x 8 grid.
        words: CLIP and the prompts, for its figures; `None` to leave them out.
        perceptual: network of LPIPS (see `vision.lpips`), or `None` to leave it out.
        times: resamples of the bootstrap.
        seed: seed of the bootstrap.
        batch: images per call of CLIP and LPIPS.
        callback: function to call with the name of each row that is done.

    Raises:
        PushforwardError: images that do not fit together or are not finite, a method by a name that is taken, or a
            package that is missing.
    """
    _check(rows, source, truth, targets)
    chosen = features if isinstance(features, Space) else Space("features", features)
    every = {COPY: source} | ({} if truth is None else {TRUTH: truth}) | dict(rows)
    draws = resamples(len(source), times, seed)
    candidates = None if truth is None else _candidates(truth, targets, chosen)
    reference, notes = _reference(len(source), targets, chosen)
    if candidates is not None:
        m = len(candidates[0])
        notes += [f"The true partner is looked for among {many(m, 'image')}; by chance its rank is {(m + 1) / 2:g}."]
    if min(source.shape[2:]) < SMALLEST:
        notes.append(f"SSIM is left out: it needs images of at least {SMALLEST}x{SMALLEST}.")
    found = []
    for name, images in every.items():
        values = _nearness(images, source, "", perceptual, batch)
        if truth is not None:
            values |= _nearness(images, truth, "truth_", perceptual, batch)
        if words is not None:
            values |= _told(words, images, source, batch)
        measures = {"identity": float(greatest(images, source).max())}
        for key, figures in values.items():
            measures |= _mean(key, figures)
        if candidates is not None or reference is not None:
            x = chosen.features(images).cpu()
            if candidates is not None:
                values["rank"] = ranks(x, *candidates, metric=chosen.metric)
                measures |= _places(values["rank"], draws)
            if reference is not None:
                measures |= distances(Sample(x, reference), draws, seed)
        found.append(Row(name, len(images), chosen.name, measures, values, tuple(notes)))
        if callback is not None:
            callback(name)
    return found


# -- figures of one row ------------------------------------------------------------------------------------------------


def _nearness(
    images: Tensor,
    other: Tensor,
    prefix: str,
    perceptual: str | PairNetwork | None,
    batch: int,
) -> dict[str, Tensor]:
    """Return how near each image is to its source or truth."""
    found = {"psnr": psnr(images, other), "l2": l2(images, other)}
    if min(images.shape[2:]) >= SMALLEST:
        pairs = zip(images.split(batch), other.split(batch), strict=True)
        found["ssim"] = torch.cat([ssim(one, two) for one, two in pairs])
    if perceptual is not None:
        found["lpips"] = lpips(images, other, perceptual, batch=batch)
    return {prefix + key: figures.cpu() for key, figures in found.items()}


def _told(words: Words, images: Tensor, source: Tensor, batch: int) -> dict[str, Tensor]:
    """Return what CLIP says of each image."""
    clip = words.clip
    seen, before = (torch.cat([clip.images(some).cpu() for some in x.split(batch)]) for x in (images, source))
    said, meant = (clip.fitting(prompts, len(images)).cpu() for prompts in (words.source, words.target))
    return {"clip": (seen * meant).sum(1), "directional": alignment(seen - before, meant - said)}


def _mean(key: str, figures: Tensor) -> dict[str, float]:
    """Return the mean over images and its standard error, where there is one."""
    values = figures.double()
    measures = {key: float(values.mean())}
    if len(values) > 1 and math.isfinite(measures[key]):
        measures[f"{key}_error"] = float(values.std() / len(values) ** 0.5)
    return measures


def _places(places: Tensor, draws: Sequence[Tensor]) -> dict[str, float]:
    measures: dict[str, float] = {}
    for k in FIRST:
        measures |= _mean(f"top{k}", (places <= k).double())
    median = [float(places[rows].quantile(0.5)) for rows in draws]
    return measures | {"rank": float(places.quantile(0.5)), "rank_error": standard_error(median)}


# -- what rows are compared with ---------------------------------------------------------------------------------------


def _candidates(truth: Tensor, targets: Tensor | None, chosen: Space) -> tuple[Tensor, Tensor]:
    """Return features of all different images among truths and targets, and which of them each truth is.

    Images are the same if they are to 8 bits: a target set, as a rule, has the truths in it.
    """
    images = truth if targets is None else torch.cat([truth, targets])
    keys = [digest(image) for image in to_bytes(images)]
    first: dict[str, int] = {}
    for k, key in enumerate(keys):
        first.setdefault(key, k)
    place = {key: k for k, key in enumerate(first)}
    own = torch.tensor([place[key] for key in keys[: len(truth)]], device="cpu")
    return chosen.features(images[list(first.values())]).cpu(), own


def _reference(count: int, targets: Tensor | None, chosen: Space) -> tuple[Reference | None, list[str]]:
    """Return the target set, if there are images enough to compare sets; or a note that there are not."""
    if targets is None:
        return None, []
    if min(count, len(targets)) < FEWEST:
        return None, [
            f"{distance_name(chosen.name)} and KD-{chosen.name} are left out: they need at least {FEWEST} images of "
            f"each kind; there are {count} and {len(targets)}."
        ]
    return Reference.of(chosen.features(targets).cpu()), []


def _check(rows: Mapping[str, Tensor], source: Tensor, truth: Tensor | None, targets: Tensor | None) -> None:
    taken = [name for name in rows if name in (COPY, TRUTH)]
    if taken:
        raise PushforwardError(
            f"The rows {COPY} and {TRUTH} are always made; call the method {taken[0]!r} by another name."
        )
    if source.ndim != 4 or source.shape[1] not in (1, 3) or 0 in source.shape:
        raise PushforwardError(f"Sources are images (count, 1 or 3, height, width); got shape {tuple(source.shape)}.")
    every = {"source": source, **({} if truth is None else {TRUTH: truth}), **rows}
    for name, images in every.items():
        if images.shape != source.shape:
            raise PushforwardError(
                f"The images of {name} are {tuple(images.shape)}, those of the source {tuple(source.shape)}."
            )
        if not bool(images.isfinite().all()):
            raise PushforwardError(f"The images of {name} are not all finite; leave it out, or make them again.")
    if targets is not None and (targets.ndim != 4 or targets.shape[1:] != source.shape[1:] or not len(targets)):
        raise PushforwardError(
            f"Targets are images of the shape {tuple(source.shape[1:])} of the source; got {tuple(targets.shape)}."
        )


# -- showing -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, columns aligned, figures with their standard errors, and the notes below.

    `identity` is the greatest difference to the source; `top 1`, `top 10` and `rank` are of the true partner; `KD` is
    the kernel distance times 1000.
    """
    spaces = list(dict.fromkeys(row.space for row in rows))
    if len(spaces) > 1:
        raise PushforwardError(f"Rows in features {' and '.join(spaces)} do not fit in one table.")
    name = spaces[0] if spaces else ""
    titles = {
        "psnr": "PSNR", "ssim": "SSIM", "l2": "L2", "lpips": "LPIPS", "identity": "identity",
        "truth_psnr": "PSNR truth", "truth_ssim": "SSIM truth", "truth_l2": "L2 truth", "truth_lpips": "LPIPS truth",
        "top1": f"top 1 {name}", "top10": f"top 10 {name}", "rank": f"rank {name}",
        "frechet": distance_name(name), "kernel": f"KD-{name} x1000", "clip": "CLIP", "directional": "CLIP direction",
    }  # fmt: skip
    shown = [key for key in titles if any(key in row.measures for row in rows)]
    lines = [["method", "images", *(titles[key] for key in shown)]]
    lines += [
        [row.name, str(row.count), *(cell(row.measures, key, 1000.0 if key == "kernel" else 1.0) for key in shown)]
        for row in rows
    ]
    return "\n".join([aligned(lines), *dict.fromkeys(note for row in rows for note in row.notes)])

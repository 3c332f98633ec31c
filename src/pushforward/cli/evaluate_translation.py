"""Compare translations and edits of images with their sources, with the truth, and with a target set.

Examples are in `pushforward evaluate-translation --help`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from pushforward.cli._shared.checks import check_outputs, check_split
from pushforward.cli._shared.models import pick_device
from pushforward.cli._shared.options import DeviceOption, FitOption, ReportOptions, grouped
from pushforward.cli._shared.report import command_line, progress, remark, tell_notes
from pushforward.data.datasets import load_images
from pushforward.data.files import atomic_path
from pushforward.data.inputs import Images, read_inputs
from pushforward.data.pictures import from_bytes
from pushforward.errors import PushforwardError
from pushforward.evaluation.translation import PIXELS, Words, compare, space, table
from pushforward.vision.clip import load_clip
from pushforward.vision.features import feature_net

__all__ = ["evaluate_translation", "matches"]


@grouped()
def evaluate_translation(
    outputs: Annotated[
        list[str],
        typer.Argument(help="Results: folders of images named as their sources, or .npz files in the same order."),
    ],
    source: Annotated[str, typer.Option(help="Compare with the images they were made from: a folder or .npz file.")],
    *,
    truth: Annotated[
        str | None, typer.Option(help="Compare with what they should be, under the same names: a folder or .npz file.")
    ] = None,
    target_set: Annotated[
        str | None,
        typer.Option(
            help="Compare with images of the target kind: a folder, an .npz file, or a data set of `datasets`."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Rank and measure by effnet, fashion, inception or a TorchScript file; by default 8 x 8 pixels."
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Score with this CLIP: a folder or hub name such as openai/clip-vit-base-patch32."),
    ] = None,
    source_prompt: Annotated[str | None, typer.Option(help="Tell CLIP what the sources are.")] = None,
    target_prompt: Annotated[str | None, typer.Option(help="Tell CLIP what they should become.")] = None,
    lpips: Annotated[str | None, typer.Option(help="Add LPIPS by this network: alex, vgg or squeeze.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Compare at this side in pixels; by default that of the sources.", min=1)
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Compare in grey (1) or colour (3); by default as the sources are.")
    ] = None,
    fit: FitOption = "crop",
    split: Annotated[
        str, typer.Option(help="Read this split of .npz files and data sets: train, validation or test.")
    ] = "test",
    resamples: Annotated[
        int, typer.Option(help="Draw this many bootstrap samples for some standard errors.", min=2)
    ] = 50,
    seed: Annotated[int, typer.Option(help="Seed the bootstrap.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Show a network this many images per call.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the table to this file, too.")] = None,
    device: DeviceOption = "auto",
    reports: ReportOptions,
) -> None:
    r"""Compare translations and edits of images with their sources, with the truth, and with a target set.

    Each output is a row of the table, beside the copy (the sources as they are) and the truth. Only sources that every
    output (and the truth) has an image of are used. Ranks say where the true image is among all of the target set.

    \b
    pushforward evaluate-translation out/ddim out/edit-friendly --source cats/ --target-set dogs/ --features effnet
    pushforward evaluate-translation out/ --source google/ --truth apple/ --target-set apple-all/ --out table.txt
    pushforward evaluate-translation out/ --source photos/ --clip openai/clip-vit-base-patch32 \
        --source-prompt "a photo of a horse" --target-prompt "a photo of a zebra" --json report.json
    """
    check_outputs({"--out": out, "--json": reports.json}, inputs=[source, truth, target_set, *outputs])
    check_split([place for place in (source, truth, target_set, *outputs) if place is not None])
    where = pick_device(device)
    if len(set(outputs)) < len(outputs):
        raise PushforwardError("An output is named twice.")
    prompts = _prompts(clip, source_prompt, target_prompt)
    net = None if features is None else feature_net(features)
    words = None if clip is None or prompts is None else Words(load_clip(clip, device=where), *prompts)
    like = load_images(source, size=size, channels=channels, split=split, fit=fit).images
    shape, depth = (like.shape[2], like.shape[3]), like.shape[1]
    named = {"": source, **({} if truth is None else {"truth": truth}), **{f"output {o}": o for o in outputs}}
    read = {
        key: read_inputs([Path(place)], shape, depth, split=split, skip=True, fit=fit) for key, place in named.items()
    }
    targets = None
    if target_set is not None:
        found = load_images(target_set, size=shape, channels=depth, split=split, fit=fit)
        targets = from_bytes(found.images)
        tell_notes(found, target_set)
    used, picked = _together(named, read)
    for place, images in zip(named.values(), read.values(), strict=True):
        for note in (*images.notes, *(reason for _, reason in images.skipped)):
            remark(f"{place}: {note}")
        if len(images.names) > len(used):
            remark(f"{place}: {len(used)} of {len(images.names)} images used")
    values = {key: images.values[picked[key]] for key, images in read.items()}
    sources, true = values.pop(""), values.pop("truth", None)
    chosen = PIXELS if net is None else space(net, batch=batch, device=where)
    with progress("comparing", total=len(values) + 1 + (true is not None), unit="row", quiet=reports.quiet) as bar:
        rows = compare(
            {key.removeprefix("output "): images for key, images in values.items()}, sources, true, targets, chosen,
            words=words, perceptual=lpips, times=resamples, seed=seed, batch=batch, callback=lambda _: bar.update(),
        )  # fmt: skip
    text = table(rows)
    report: dict[str, Any] = {
        "command": command_line(),
        "source": source, "truth": truth, "target_set": target_set,
        "target_count": None if targets is None else len(targets),
        "shape": [depth, *shape], "count": len(used), "images": used,
        "available": {named[key]: len(images.names) for key, images in read.items()},
        "features": {"name": chosen.name, "metric": chosen.metric, "digest": None if net is None else net.digest},
        "clip": clip, "source_prompt": source_prompt, "target_prompt": target_prompt, "lpips": lpips,
        "resamples": resamples, "seed": seed,
        "rows": [{"name": row.name, "count": row.count, "measures": row.measures} for row in rows],
        "notes": list(dict.fromkeys(note for row in rows for note in row.notes)),
    }  # fmt: skip
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    reports.write(report)
    if reports.json != "-":
        typer.echo(text)


def matches(source: Sequence[str], other: Sequence[str]) -> dict[int, int]:
    """Which image of another set has the name of each source: by number of the source, where there is one.

    Names are compared whole, then (if none is the same) without folders, then as numbers.

    Args:
        source: names without suffixes, folders parted by `/`.
        other: what its other images are called.

    Raises:
        PushforwardError: two images of one set have the same name.
    """
    ways: tuple[Callable[[str], str | None], ...] = (str, _stem, _number)
    for way in ways:
        mine, others = _by(way, source), _by(way, other)
        if found := {mine[key]: others[key] for key in mine if key in others}:
            return found
    return {}


def _stem(name: str) -> str:
    return PurePosixPath(name).name


def _number(name: str) -> str | None:
    """`7` of `cats/0007` and of `cats-00007`, as images of an .npz file are called; `None` if there is no number."""
    found = re.fullmatch(r"(?:.*-)?(\d+)", _stem(name))
    return str(int(found[1])) if found else None


def _by(way: Callable[[str], str | None], names: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for k, name in enumerate(names):
        key = way(name)
        if key is None:
            continue
        if key in found:
            raise PushforwardError(
                f"Two images of one set are called {key!r} ({names[found[key]]} and {name}); rename one of them."
            )
        found[key] = k
    return found


def _together(named: dict[str, str], read: dict[str, Images]) -> tuple[list[str], dict[str, list[int]]]:
    """Names of the sources that every set has an image of, and the numbers of these images in each set."""
    names = {key: _names(Path(place), read[key].names) for key, place in named.items()}
    found = {key: matches(names[""], own) for key, own in names.items()}
    for key, pairs in found.items():
        if not pairs:
            raise PushforwardError(
                f"No image of {named[key]} has the name of one of {named['']} ({names[key][0]} and {names[''][0]}, for "
                "instance); name images as their sources."
            )
    used = [k for k in range(len(names[""])) if all(k in pairs for pairs in found.values())]
    if not used:
        raise PushforwardError(
            f"There is no image of {named['']} that {', '.join(list(named.values())[1:])} all have one of."
        )
    return [names[""][k] for k in used], {key: [pairs[k] for k in used] for key, pairs in found.items()}


def _names(place: Path, names: Sequence[str]) -> list[str]:
    """Names without suffixes from where they were read; of an .npz file, the images' numbers."""
    if place.suffix.lower() == ".npz" and place.is_file():
        return [str(k) for k in range(len(names))]
    files = [Path(name) for name in names]
    if place.is_dir():
        files = [file.relative_to(place) for file in files]
    return [file.with_suffix("").as_posix() if place.is_dir() else file.stem for file in files]


def _prompts(clip: str | None, source: str | None, target: str | None) -> tuple[str, str] | None:
    if clip is None and source is None and target is None:
        return None
    if clip is None or source is None or target is None:
        raise PushforwardError("CLIP needs all of --clip, --source-prompt and --target-prompt.")
    return source, target

"""Read the watermark of a key from images.

Examples are in `pushforward watermark read --help`.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pushforward.cli._shared.checks import check_outputs, in_vain
from pushforward.cli._shared.models import image_size, open_model
from pushforward.cli._shared.options import (
    BatchOption,
    ConditionOptions,
    ImageOptions,
    ImagesArgument,
    ModelArgument,
    ModelOptions,
    ReportOptions,
    grouped,
)
from pushforward.cli._shared.report import progress
from pushforward.cli._shared.watermarks import KeyOption, key_of, message_of
from pushforward.cli._shared.watermarks import shown as worded
from pushforward.errors import PushforwardError
from pushforward.maps.labels import UNSAID
from pushforward.verbs.watermarks import read_watermark

__all__ = ["watermark_read"]


@grouped(fit="stretch")
def watermark_read(
    model: ModelArgument,
    images: ImagesArgument,
    condition: ConditionOptions,
    *,
    key: KeyOption,
    message: Annotated[
        str | None,
        typer.Option(help="Compare with this message, a text or digits as 0x1f2e, and tell how much is right."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Read a message of this many bytes; 1 to 8 are tried by default.", min=1)
    ] = None,
    ring: Annotated[
        bool, typer.Option("--ring", help="Look for a ring, which images carry that were marked without a message.")
    ] = False,
    rate: Annotated[
        float, typer.Option(help="Take at most this share of images that are not marked for marked.")
    ] = 1e-3,
    crops: Annotated[
        int,
        typer.Option(
            help="Try all crops that took up to this many pixels of each side; 4 take 18 times as long.", min=0
        ),
    ] = 0,
    shifts: Annotated[
        int,
        typer.Option(help="Try all shifts by up to this many pixels each way; 3 take 12 times as long.", min=0),
    ] = 0,
    steps: Annotated[int, typer.Option(help="Take this many steps from an image to its code.", min=1)] = 12,
    batch: BatchOption = 64,
    inputs: ImageOptions,
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Read the watermark of a key from images, and say whether they carry it at a stated rate of false positives.

    The solver, and what the images were told to show, need not be known. The p-value is the probability that an image
    without this mark seems as much marked, whatever was tried; with --message, it counts the bits that are right.

    \b
    pushforward watermark read fashion-vp marked/ --key secret.txt --message me
    pushforward watermark read fashion-vp found.jpg --key secret.txt                # any message of 1 to 8 bytes
    pushforward watermark read fashion-vp found.jpg --key secret.txt --message me --crops 4
    pushforward watermark read fashion-vp found.jpg --key secret.txt --message me --shifts 3
    pushforward watermark read fashion-vp found.jpg --key secret.txt --ring --rate 1e-6
    """
    check_outputs({"--json": reports.json}, inputs=images)
    inputs.check(images)
    condition.check()
    in_vain({"length": "the message says it" if message is not None else None})
    if ring and (message is not None or length is not None):
        raise PushforwardError("A ring carries no message; leave --message and --length out, or --ring.")
    if not 0 < rate < 1:
        raise PushforwardError(f"--rate is a share of images, between 0 and 1; got {rate:g}.")
    secret, told = key_of(key), message_of(message)
    network = open_model(model, place, condition.negative, **place.asked)
    given = inputs.read(images, image_size(network))
    count = len(given.values)
    labels = condition.labels(network, count)
    began = time.perf_counter()
    with progress("reading", unit="call", quiet=reports.quiet) as bar:
        found = read_watermark(network, given.values, key=secret, message=told, length=length, ring=ring, steps=steps,
                               labels=UNSAID if labels is None else labels, guidance=condition.guidance, crops=crops,
                               shifts=shifts, batch=batch, callback=lambda _: bar.update())  # fmt: skip
    seconds = time.perf_counter() - began
    marked = found.marked(rate).tolist()
    correct = [None] * count if found.correct is None else found.correct.tolist()
    rows = [
        {
            "name": given.names[i],
            "marked": marked[i],
            "p_value": float(found.p_value[i]),
            "evidence": float(found.evidence[i]),
            "message": None if ring else worded(found.message[i]),
            "bit_accuracy": correct[i],
        }
        for i in range(count)
    ]
    reports.tell(*given.notes, *map(_line, rows))
    reports.tell(f"{sum(marked)} of {count} marked, at a false-positive rate of {rate:g}; {seconds:.1f} s")
    reports.write({
        "model": model, "process": network.process.name, "kind": "ring" if ring else "bits", "rate": rate,
        "message": None if told is None else worded(told), "length": length, "crops": crops, "shifts": shifts,
        "steps": steps, "count": count, "marked": sum(marked),
        "bit_accuracy": None if found.correct is None else float(found.correct.mean()),
        "seconds": seconds, "notes": given.notes, "images": rows,
    })  # fmt: skip


def _line(row: dict[str, object]) -> str:
    said = f"p = {row['p_value']:.1e}"
    if row["bit_accuracy"] is not None:
        said = f"{100 * float(str(row['bit_accuracy'])):.1f} % of the bits right, {said}"
    if row["message"] is not None:
        said = f"{row['message']}: {said}" if row["marked"] else f"{said} (as it seems, {row['message']})"
    return f"{row['name']}: {'marked' if row['marked'] else 'not marked'}, {said}"

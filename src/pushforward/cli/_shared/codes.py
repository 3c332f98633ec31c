"""Codes as commands read, write, decode and show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.models import check_pictures, open_model, pick_device
from pushforward.cli._shared.options import PlaceOptions, ReportOptions
from pushforward.cli._shared.report import progress, remark
from pushforward.data.files import check_suffix
from pushforward.data.inputs import Images
from pushforward.data.pictures import picture_suffixes, save_image
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.storage import SUFFIX, check_codes, decoder_of, load_codes, save_codes
from pushforward.model.contents import model_digest
from pushforward.plan import Plan
from pushforward.verbs.codes import decode_in_batches
from pushforward.verbs.sheets import reconstructed

__all__ = ["CodesOptions", "decoded", "open_codes", "told"]

SHOWN = 64  # images that a picture of reconstructions shows


def open_codes(path: Path, source: str | None, device: str) -> tuple[Code, dict[str, Any], Diffusion]:
    """Codes of a file, its header, and the map that decodes them.

    Where the model is another than the one they were made with, stderr says so, and so do the header's `notes`; the
    header's `digest` is then this one's.

    Args:
        path: path of the file.
        source: another model than the header's, or `None`.
        device: for the model, as `--device` names it.

    Raises:
        PushforwardError: the file or the model cannot be read, or they do not fit together.
    """
    code, info = load_codes(path)
    try:
        place = PlaceOptions(info.get("size"), str(info.get("dtype", "float32")), device)
        model = open_model(source or info["model"], place, call=info.get("call"), lora=info.get("lora", ()))
    except PushforwardError as error:
        if source is not None:
            raise
        raise PushforwardError(
            f"The codes are of model {info['model']!r}, which cannot be loaded; name it with --model. ({error})"
        ) from None
    check_codes(code, info, model)
    check_pictures(model)
    known, info["notes"] = info.get("digest"), []  # earlier versions wrote no digest
    if known is not None and known != (digest := model_digest(model)):
        note = (
            f"The codes were made with another model than {model.name!r} is now (its weights or its settings differ), "
            "so they decode to other images than those they were made of."
        )
        remark(note)
        info |= {"digest": digest, "notes": [note]}
    return code, info, decoder_of(info, model, device=pick_device(device))


def told(path: Path, source: str | None, info: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """What a report says of codes that are decoded: the arguments of `open_codes`, the header and the plan."""
    kept = {name: info[name] for name in ("solver", "settings", "times", "guidance", "notes")}
    return {"codes": path, "model": source or info["model"], "process": plan.process.name, **kept,
            "steps": len(plan.steps) - 1, "nfe": plan.nfe}  # fmt: skip


def decoded(diffusion: Diffusion, code: Code, batch: int, *, quiet: bool = False) -> Tensor:
    """The images behind codes, batch after batch, on the CPU, with a progress bar."""
    plan = diffusion.plan
    total = None if plan.implicit else plan.nfe * -(-len(code) // batch)
    there = diffusion.run_by(parallel=Parallel(tolerance=1e-5) if plan.implicit else None)
    with torch.no_grad(), progress("decoding", total=total, unit="call", quiet=quiet) as bar:
        return decode_in_batches(there, code, batch, lambda _: bar.update())


@dataclass(frozen=True)
class CodesOptions:
    """Where the codes of images are written, and a picture of what they decode to."""

    out: Annotated[
        Path, typer.Option(help="Write the codes here (.safetensors), for `pushforward decode`.")
    ] = Path("codes.safetensors")  # fmt: skip
    picture: Annotated[
        Path | None,
        typer.Option(help=f"Write a picture of the first {SHOWN} images, each row above its reconstructions."),
    ] = None

    def check(self, images: Sequence[Path], reports: ReportOptions) -> None:
        """Raise unless all can be written, and none of the images is replaced."""
        check_suffix(self.out, {SUFFIX}, "Codes")
        if self.picture is not None:
            check_suffix(self.picture, picture_suffixes())
        check_outputs({"--out": self.out, "--picture": self.picture, "--json": reports.json}, inputs=images)

    def write(
        self, codes: Sequence[Code], info: Mapping[str, Any], images: Images, diffusion: Diffusion, *, batch: int,
        quiet: bool,
    ) -> tuple[Code, Tensor]:  # fmt: skip
        """Write the codes of images, and decode what the file holds.

        Args:
            codes: codes of the images, batch after batch.
            info: the file's header.
            images: that the codes are of.
            diffusion: decodes them, bound to the images' conditions.
            batch: images at a time.
            quiet: show no progress.

        Returns:
            The codes in the file, and the images that they decode to, on the CPU.
        """
        save_codes(self.out, Code.cat(codes), info)
        code, _ = load_codes(self.out)  # what is on disk is what is checked
        again = decoded(diffusion, code, batch, quiet=quiet)
        if self.picture is not None:
            save_image(reconstructed(images.values[:SHOWN], again[:SHOWN]), self.picture)
        return code, again

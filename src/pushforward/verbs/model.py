"""The model of the front door: one that can do all that is done with models."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from pushforward import model as below
from pushforward.verbs.changes import edit, inpaint, translate
from pushforward.verbs.codes import decode, encode, invert, sample
from pushforward.verbs.evaluating import evaluate
from pushforward.verbs.samplers import diffusion, plan
from pushforward.verbs.wishes import guide, steer

__all__ = ["Model", "load"]


@dataclass(frozen=True, eq=False, repr=False)
class Model(below.Model):
    """A diffusion model: a network, its process, and the verbs.

        images = model.sample(16, solver="gddim:order=2", steps=20, seed=0)
        codes = model.invert(images, solver="ddim", steps=50)
        again = codes.decode()

    The verbs are the functions of the same names, with the model as their first argument. What they are made of is
    beneath: `diffusion` is the map from codes to images, and `plan` are the coefficients of a solver. See
    `pushforward.model.model.Model` for the fields; `given` binds a model to classes or prompts, `to` moves it to a
    device.
    """

    sample = sample
    invert = invert
    encode = encode
    decode = decode
    translate = translate
    edit = edit
    inpaint = inpaint
    guide = guide
    steer = steer
    evaluate = evaluate
    plan = plan
    diffusion = diffusion

    @classmethod
    def of(cls, model: below.Model) -> Model:
        """Any model, with the verbs."""
        return model if isinstance(model, cls) else cls(**{one.name: getattr(model, one.name) for one in fields(model)})


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    size: int | tuple[int, int] | None = None,
) -> Model:
    """Load a model that comes with the package, from a folder, or from the hub.

    Args:
        source: a name (`pushforward models` lists them), a folder that `train` made, or a folder or hub name of a
            `diffusers` model.
        device: where the network runs.
        dtype: dtype of its weights; by default float32.
        revision: revision to take from the hub.
        size: side of the images of a `diffusers` model in pixels, or their height and width; by default its own.

    Raises:
        PushforwardError: nothing of that name, or it cannot be read; it makes no images of this size.
    """
    return Model.of(below.load(source, device=device, dtype=dtype, revision=revision, size=size))

"""The model of the front door: one that can do all that is done with models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pushforward import model as below
from pushforward.execute.host import undisturbed
from pushforward.verbs.changes import edit, inpaint, translate
from pushforward.verbs.codes import decode, encode, invert, sample
from pushforward.verbs.evaluating import evaluate, log_likelihood
from pushforward.verbs.samplers import diffusion, plan
from pushforward.verbs.watermarks import read_watermark, watermark
from pushforward.verbs.wishes import guide, steer

__all__ = ["Model", "from_pipeline", "load"]


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
    log_likelihood = log_likelihood
    watermark = watermark
    read_watermark = read_watermark
    plan = plan
    diffusion = diffusion

    @classmethod
    def of(cls, model: below.Model) -> Model:
        """Any model, with the verbs."""
        return model if isinstance(model, cls) else cls(**{one.name: getattr(model, one.name) for one in fields(model)})


@undisturbed
def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    size: int | tuple[int, int] | None = None,
    call: Mapping[str, Any] | None = None,
    lora: str | Path | Sequence[str | Path] = (),
) -> Model:
    """Load a model that comes with the package, from a folder, or from the hub.

    Args:
        source: a name (`pushforward models` lists them), a folder that `train` made, or a folder, a checkpoint
            (`.safetensors`, `.ckpt`) or a hub name of a `diffusers` model.
        device: where the network runs.
        dtype: dtype of its weights; by default float32.
        revision: branch, tag or commit on the hub.
        size: side of the images of a `diffusers` model in pixels, or their height and width; by default its own.
        call: arguments that a `diffusers` pipeline is called with, as for `from_pipeline`; images may be files.
            `control` is the control image, whatever the pipeline calls it.
        lora: LoRA for a `diffusers` pipeline: a file, a folder or a hub name, each with its weight after a colon, as
            `style.safetensors:0.8`, by default 1.

    A pipeline has its own default guidance, until `given` says another.

    Raises:
        PushforwardError: nothing of that name, or it cannot be read; it makes no images of this size.
    """
    return Model.of(below.load(source, device=device, dtype=dtype, revision=revision, size=size, call=call, lora=lora))


def from_pipeline(pipe: Any, **call: Any) -> Model:
    """Make a model of any pipeline of `diffusers` as it is in memory, with its LoRA, control networks and offloading.

        pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
        model = pushforward.from_pipeline(pipe, prompt="a fox in the snow", height=512, width=512)
        images = model.sample(2, solver="ddim", steps=28, parallel=True)
        code = model.invert(images, solver="ddim", steps=28)

    Nothing is copied, and the pipeline can be used as before. It is called some ten times with few steps, to find
    out how many states can be asked about at a time, and to check that its answers depend on state and time alone.
    Make the model anew after changing the pipeline, as by a LoRA: prompts are encoded once. One thread calls at a
    time.

    Args:
        pipe: the pipeline, which may be one of Modular diffusers.
        **call: arguments that the pipeline would be called with, but for those that are a sampler's: `prompt`,
            `image`, `control_image`, `height`, `guidance_scale` and so on. A `generator` seeds what the pipeline draws
            for its conditions. `Model.given` changes prompt (or class) and guidance.

    Raises:
        PushforwardError: `diffusers` is not installed; the pipeline takes no such argument, or raises an error; or it
            cannot be asked about single states and times. The sentence names what is in the way.
    """
    from pushforward.model.diffusers.modular import from_blocks
    from pushforward.model.diffusers.pipeline import from_pipeline as read

    return Model.of(from_blocks(pipe, **call) if hasattr(pipe, "_blocks") else read(pipe, **call))

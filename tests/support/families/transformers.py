"""Pipelines of images whose network is a transformer, made tiny."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from PIL import Image

from support import pipelines
from support.families.parts import picture, roughen, seeded
from support.families.tiny import Tiny

SIZE: dict[str, Any] = {"height": 16, "width": 16}
TEXT: dict[str, Any] = {**SIZE, "prompt": "a red fox"}
GUIDED: dict[str, Any] = {**TEXT, "negative_prompt": "blur", "guidance_scale": 3.0}
SMALL: dict[str, Any] = {"height": 8, "width": 8}
DISTILLED: dict[str, Any] = {**TEXT, "guidance_scale": 3.0}


def made(maker: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    """Make a pipeline that reads a tokenizer from a folder, and answer its parts."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(maker(Path(folder), **settings).components)


def build(cls: Any, parts: dict[str, Any], **more: Any) -> Any:
    """Build a pipeline of those parts that its class takes; its networks get noise where they are constant."""
    taken = inspect.signature(cls.__init__).parameters
    pipe = cls(**{key: part for key, part in {**parts, **more}.items() if key in taken})
    for name in ("transformer", "controlnet"):
        if name in pipe.components:
            roughen(pipe.components[name])
    return pipe


def half() -> Any:
    """Draw a mask that is white on the left."""
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return mask


def sd3(cls: Any, **more: Any) -> Any:
    return build(cls, made(pipelines.stable_diffusion_3), image_encoder=None, feature_extractor=None, **more)


@seeded
def stable_diffusion_3() -> Tiny:
    return Tiny(sd3(diffusers.StableDiffusion3Pipeline), {**GUIDED, **SMALL})


@seeded
def stable_diffusion_3_image() -> Tiny:
    pipe = sd3(diffusers.StableDiffusion3Img2ImgPipeline)
    return Tiny(pipe, {**GUIDED, **SMALL, "image": picture(), "strength": 1.0})


@seeded
def stable_diffusion_3_controlnet() -> Tiny:
    sizes = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4}
    net = diffusers.SD3ControlNetModel(
        sample_size=4, patch_size=2, **sizes, joint_attention_dim=24, caption_projection_dim=8,
        pooled_projection_dim=20, pos_embed_max_size=6,
    )  # fmt: skip
    pipe = sd3(diffusers.StableDiffusion3ControlNetPipeline, controlnet=net)
    return Tiny(pipe, {**GUIDED, **SMALL, "control_image": picture()})


def flux_net(channels: int = 16, distilled: bool = True, cls: Any = None, **settings: Any) -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    return (cls or diffusers.FluxTransformer2DModel)(
        in_channels=channels, **sizes, joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4), **settings,
    )  # fmt: skip


def flux_like(cls: Any, distilled: bool = True, **more: Any) -> Any:
    return build(
        cls, {**made(pipelines.flux, distilled=distilled), "image_encoder": None, "feature_extractor": None}, **more
    )


@seeded
def flux() -> Tiny:
    return Tiny(flux_like(diffusers.FluxPipeline), DISTILLED)


@seeded
def flux_schnell() -> Tiny:
    return Tiny(flux_like(diffusers.FluxPipeline, distilled=False), TEXT)


@seeded
def flux_true_guidance() -> Tiny:
    return Tiny(flux_like(diffusers.FluxPipeline), {**DISTILLED, "negative_prompt": "blur", "true_cfg_scale": 2.0})


@seeded
def flux_image() -> Tiny:
    pipe = flux_like(diffusers.FluxImg2ImgPipeline)
    return Tiny(pipe, {**DISTILLED, "image": picture(0, 16, 16), "strength": 1.0})


@seeded
def flux_inpaint() -> Tiny:
    pipe = flux_like(diffusers.FluxInpaintPipeline)
    return Tiny(pipe, {**DISTILLED, "image": picture(0, 16, 16), "mask_image": half(), "strength": 1.0})


@seeded
def flux_kontext() -> Tiny:
    pipe = flux_like(diffusers.FluxKontextPipeline, vae=pipelines.vae(scaling_factor=3.0, shift_factor=0.1))
    return Tiny(pipe, {**DISTILLED, "image": picture(0, 8, 16), "max_area": 256, "_auto_resize": False})


@seeded
def flux_fill() -> Tiny:
    pipe = flux_like(diffusers.FluxFillPipeline, transformer=flux_net(16 + 16 + 16, out_channels=16))
    return Tiny(pipe, {**DISTILLED, "image": picture(0, 16, 16), "mask_image": half()})


@seeded
def flux_control() -> Tiny:
    pipe = flux_like(diffusers.FluxControlPipeline, transformer=flux_net(16 + 16, out_channels=16))
    return Tiny(pipe, {**DISTILLED, "control_image": picture(0, 16, 16)})


@seeded
def flux_controlnet() -> Tiny:
    pipe = flux_like(diffusers.FluxControlNetPipeline, controlnet=flux_net(cls=diffusers.FluxControlNetModel))
    return Tiny(pipe, {**DISTILLED, "control_image": picture(0, 16, 16), "controlnet_conditioning_scale": 0.5})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Stable Diffusion 3": stable_diffusion_3,
    "Stable Diffusion 3 image to image": stable_diffusion_3_image,
    "Stable Diffusion 3 ControlNet": stable_diffusion_3_controlnet,
    "Flux": flux,
    "Flux schnell": flux_schnell,
    "Flux with a negative prompt": flux_true_guidance,
    "Flux image to image": flux_image,
    "Flux inpainting": flux_inpaint,
    "Flux Kontext": flux_kontext,
    "Flux Fill": flux_fill,
    "Flux Control": flux_control,
    "Flux ControlNet": flux_controlnet,
}

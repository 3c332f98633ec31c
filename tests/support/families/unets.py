"""Pipelines of the U-Net age, and class-conditional ones, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from support.families.parts import picture, roughen, seeded, words
from support.families.tiny import Tiny
from support.pipelines import TABLE, clip, unet, vae

TEXT: dict[str, Any] = {"prompt": "a red fox", "negative_prompt": "blur", "guidance_scale": 3.0}
SQUARE: dict[str, Any] = {**TEXT, "height": 8, "width": 8}


def pndm() -> Any:
    table = {key: value for key, value in TABLE.items() if key != "clip_sample"}
    return diffusers.PNDMScheduler(**table, skip_prk_steps=True)


def stable(cls: Any, net: Any = None, scheduler: Any = None, **more: Any) -> Any:
    """Make a pipeline of the Stable Diffusion 1 kind, by default with PNDM."""
    return cls(
        vae=vae(), text_encoder=clip(), tokenizer=words(), unet=roughen(net or unet()), scheduler=scheduler or pndm(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **more,
    )  # fmt: skip


@seeded
def stable_diffusion_1() -> Tiny:
    return Tiny(stable(diffusers.StableDiffusionPipeline), SQUARE)


@seeded
def stable_diffusion_1_ddim() -> Tiny:
    return Tiny(stable(diffusers.StableDiffusionPipeline, scheduler=diffusers.DDIMScheduler(**TABLE)), SQUARE)


@seeded
def stable_diffusion_2() -> Tiny:
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler(**TABLE, **zero)
    return Tiny(stable(diffusers.StableDiffusionPipeline, scheduler=scheduler), {**SQUARE, "guidance_rescale": 0.7})


@seeded
def stable_diffusion_image() -> Tiny:
    return Tiny(stable(diffusers.StableDiffusionImg2ImgPipeline), {**TEXT, "image": picture(), "strength": 1.0})


def inpainting(channels: int) -> Tiny:
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    pipe = stable(diffusers.StableDiffusionInpaintPipeline, unet(in_channels=channels))
    return Tiny(pipe, {**SQUARE, "image": picture(), "mask_image": mask, "strength": 1.0})


@seeded
def stable_diffusion_inpaint() -> Tiny:
    return inpainting(9)


@seeded
def stable_diffusion_inpaint_plain() -> Tiny:
    return inpainting(4)


@seeded
def instruct_pix2pix() -> Tiny:
    pipe = stable(diffusers.StableDiffusionInstructPix2PixPipeline, unet(in_channels=8))
    return Tiny(pipe, {**TEXT, "image": picture(), "image_guidance_scale": 1.5})


def control(net: Any) -> Any:
    """Make a ControlNet of a U-Net, for images twice the latents' size."""
    return roughen(diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(4, 4)), scale=0.5)


@seeded
def controlnet() -> Tiny:
    net = unet()
    return Tiny(stable(diffusers.StableDiffusionControlNetPipeline, net, controlnet=control(net)),
                {**SQUARE, "image": picture()})  # fmt: skip


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Stable Diffusion 1": stable_diffusion_1,
    "Stable Diffusion 1 with DDIM": stable_diffusion_1_ddim,
    "Stable Diffusion 2": stable_diffusion_2,
    "Stable Diffusion img2img": stable_diffusion_image,
    "Stable Diffusion inpaint": stable_diffusion_inpaint,
    "Stable Diffusion inpaint with 4 channels": stable_diffusion_inpaint_plain,
    "InstructPix2Pix": instruct_pix2pix,
    "ControlNet": controlnet,
}

"""Pipelines of the U-Net age, and class-conditional ones, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import diffusers
import torch
import transformers

from support import pipelines
from support.families.parts import half, picture, roughen, seeded, words
from support.families.tiny import Tiny
from support.pipelines import TABLE, clip, unet, vae

TEXT: dict[str, Any] = {"prompt": "a red fox", "negative_prompt": "blur", "guidance_scale": 3.0}
SQUARE: dict[str, Any] = {**TEXT, "height": 8, "width": 8}


def pndm() -> Any:
    table = {key: value for key, value in TABLE.items() if key != "clip_sample"}
    return diffusers.PNDMScheduler(**table, skip_prk_steps=True)


def stable(cls: Any, net: Any = None, scheduler: Any = None, **more: Any) -> Any:
    """Make a pipeline of the Stable Diffusion 1 kind, by default with PNDM."""
    parts = {"vae": vae(), "text_encoder": clip(), "tokenizer": words(), "unet": roughen(net or unet()), **more}
    return known(
        cls, **parts, scheduler=scheduler or pndm(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def known(cls: Any, **settings: Any) -> Any:
    """Make a pipeline of those of its parts and settings that it knows."""
    return cls(**{name: value for name, value in settings.items() if name in signature(cls.__init__).parameters})


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
    pipe = stable(diffusers.StableDiffusionInpaintPipeline, unet(in_channels=channels))
    return Tiny(pipe, {**SQUARE, "image": picture(), "mask_image": half(8), "strength": 1.0})


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


@seeded
def ip_adapter() -> Tiny:
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**size, projection_dim=8, image_size=8, patch_size=4)
    encoder = transformers.CLIPVisionModelWithProjection(config)
    pipe = stable(diffusers.StableDiffusionPipeline, image_encoder=encoder)
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), subfolder="", weight_name="")
    return Tiny(pipe, {**SQUARE, "ip_adapter_image": picture(1)})


def ip_adapter_weights(net: Any, tokens: int = 4) -> dict[str, Any]:
    """Draw an image adapter's weights, named as in its files: keys and values of each layer, and a projection."""
    width = net.config.cross_attention_dim
    sizes = [module.to_k.out_features for name, module in net.named_modules() if name.endswith("attn2")]
    layers = {
        f"{2 * n + 1}.to_{x}_ip.weight": 0.3 * torch.randn(size, width) for n, size in enumerate(sizes) for x in "kv"
    }
    norm = {"norm.weight": 1 + 0.1 * torch.randn(width), "norm.bias": 0.1 * torch.randn(width)}
    project = {"proj.weight": torch.randn(tokens * width, 8), "proj.bias": torch.randn(tokens * width)}
    return {"image_proj": {**project, **norm}, "ip_adapter": layers}


def extra(ids: int) -> dict[str, Any]:
    """Give the settings of a U-Net that takes a pooled prompt and numbers of the image's size."""
    projection = {"projection_class_embeddings_input_dim": 2 * ids + 8}
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, **projection}


def euler() -> Any:
    table = {key: TABLE[key] for key in ("beta_schedule", "beta_start", "beta_end", "steps_offset")}
    return diffusers.EulerDiscreteScheduler(**table, timestep_spacing="leading")


def stable_xl(cls: Any, net: Any = None, scheduler: Any = None, **more: Any) -> Any:
    """Make a pipeline of the SDXL kind, by default with DDIM."""
    return known(
        cls, vae=vae(), text_encoder=clip(), text_encoder_2=clip(transformers.CLIPTextModelWithProjection, 12),
        tokenizer=words(), tokenizer_2=words(), unet=roughen(net or unet(20, **extra(6))),
        scheduler=scheduler or diffusers.DDIMScheduler(**TABLE), add_watermarker=False, **more,
    )  # fmt: skip


@seeded
def stable_diffusion_xl() -> Tiny:
    return Tiny(stable_xl(diffusers.StableDiffusionXLPipeline), SQUARE)


@seeded
def stable_diffusion_xl_euler() -> Tiny:
    return Tiny(stable_xl(diffusers.StableDiffusionXLPipeline, scheduler=euler()), SQUARE)


@seeded
def stable_diffusion_xl_refiner() -> Tiny:
    second = clip(transformers.CLIPTextModelWithProjection, 12)
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(force_upcast=False), text_encoder=None, text_encoder_2=second, tokenizer=None, tokenizer_2=words(),
        unet=roughen(unet(12, **extra(5))), scheduler=euler(), requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    return Tiny(pipe, {**TEXT, "image": picture(), "strength": 1.0})


@seeded
def controlnet_xl() -> Tiny:
    net = unet(20, **extra(6))
    pipe = stable_xl(diffusers.StableDiffusionXLControlNetPipeline, net, controlnet=control(net))
    return Tiny(pipe, {**SQUARE, "image": picture()})


@seeded
def perturbed_attention() -> Tiny:
    pipe = stable(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    return Tiny(pipe, {**SQUARE, "pag_scale": 3.0})


@seeded
def latent_consistency() -> Tiny:
    scheduler = diffusers.LCMScheduler(**{**TABLE, "steps_offset": 0})
    pipe = stable(diffusers.LatentConsistencyModelPipeline, unet(time_cond_proj_dim=8), scheduler)
    return Tiny(pipe, {"prompt": "a red fox", "guidance_scale": 3.0, "height": 8, "width": 8})


def pixels(channels: int = 3) -> Any:
    """Make a U-Net without text."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4}
    net = diffusers.UNet2DModel(in_channels=channels, out_channels=channels, **sizes, **blocks, norm_num_groups=2)
    return roughen(net)


@seeded
def ddpm() -> Tiny:
    return Tiny(diffusers.DDPMPipeline(pixels(), diffusers.DDPMScheduler()))


@seeded
def ddim() -> Tiny:
    return Tiny(diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler()))


@seeded
def latent_diffusion() -> Tiny:
    pipe = words(pipelines.latent_diffusion)
    roughen(pipe.unet)
    return Tiny(pipe, {"prompt": "a red fox", "guidance_scale": 3.0, "height": 32, "width": 32})


@seeded
def latent_diffusion_unconditional() -> Tiny:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 3, "num_vq_embeddings": 8}
    scheduler = diffusers.DDIMScheduler(**TABLE)
    return Tiny(diffusers.LDMPipeline(diffusers.VQModel(**blocks, **sizes), pixels(), scheduler))


@seeded
def dit() -> Tiny:
    return Tiny(words(pipelines.dit), {"class_labels": [3], "guidance_scale": 3.0})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Stable Diffusion 1": stable_diffusion_1,
    "Stable Diffusion 1 with DDIM": stable_diffusion_1_ddim,
    "Stable Diffusion 2": stable_diffusion_2,
    "Stable Diffusion img2img": stable_diffusion_image,
    "Stable Diffusion inpaint": stable_diffusion_inpaint,
    "Stable Diffusion inpaint with 4 channels": stable_diffusion_inpaint_plain,
    "InstructPix2Pix": instruct_pix2pix,
    "ControlNet": controlnet,
    "IP-Adapter": ip_adapter,
    "SDXL": stable_diffusion_xl,
    "SDXL with Euler": stable_diffusion_xl_euler,
    "SDXL refiner": stable_diffusion_xl_refiner,
    "SDXL ControlNet": controlnet_xl,
    "PAG": perturbed_attention,
    "LCM": latent_consistency,
    "DDPM": ddpm,
    "DDIM": ddim,
    "Latent Diffusion": latent_diffusion,
    "Latent Diffusion without text": latent_diffusion_unconditional,
    "DiT": dit,
}

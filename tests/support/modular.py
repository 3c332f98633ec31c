"""Tiny pipelines of Modular diffusers, of random weights, that are given embeddings of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines import krea2
from diffusers.modular_pipelines import ltx as ltx_blocks

from support import pipelines

SIZE = 16  # of images


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rough(network: Any) -> Any:
    """A network none of whose layers are zeros."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval()


def embedded(images: int, tokens: int, width: int, pooled: int = 0) -> dict[str, torch.Tensor]:
    """Embeddings of as many prompts and of negative ones."""
    found = {}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds"] = drawn(seed, images, tokens, width)
        if pooled:
            found[f"{kind}pooled_prompt_embeds"] = drawn(seed + 2, images, pooled)
    return found


def made(blocks: Any, **components: Any) -> Any:
    """The pipeline of blocks without their encoder of texts."""
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    return pipe


def table(cls: Any = None, **settings: Any) -> Any:
    """A scheduler with Stable Diffusion's table."""
    known = {key: pipelines.TABLE[key] for key in ("beta_schedule", "beta_start", "beta_end", "steps_offset")}
    return (cls or diffusers.DDIMScheduler)(**known, **({"clip_sample": False} if cls is None else {}), **settings)


def flux(images: int = 2) -> tuple[Any, dict[str, Any]]:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    net = diffusers.FluxTransformer2DModel(
        in_channels=16, **sizes, joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_image_seq_len": 2, "max_image_seq_len": 30}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    vae = pipelines.vae(shift_factor=0.1)
    pipe = made(diffusers.FluxAutoBlocks(), transformer=rough(net), vae=vae, scheduler=scheduler)
    told = {"prompt_embeds": drawn(0, images, 5, 24), "pooled_prompt_embeds": drawn(1, images, 8)}
    return pipe, told


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, 0.2, -0.3, 0.4],
        latents_std=[0.5, 0.6, 0.7, 0.8],
    ).eval()  # fmt: skip


def qwen_image(images: int = 2) -> tuple[Any, dict[str, Any]]:
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=2, max_image_seq_len=30, shift_terminal=0.02
    )
    pipe = made(diffusers.QwenImageAutoBlocks(), transformer=rough(net), vae=qwen_vae(), scheduler=scheduler)
    masks = {f"{kind}prompt_embeds_mask": torch.ones(images, 5, dtype=torch.long) for kind in ("", "negative_")}
    return pipe, {**embedded(images, 5, 16), **masks}


def stable_diffusion_xl(images: int = 2) -> tuple[Any, dict[str, Any]]:
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
    net = pipelines.unet(20, **more, projection_class_embeddings_input_dim=2 * 6 + 8)
    pipe = made(diffusers.StableDiffusionXLAutoBlocks(), unet=net, vae=pipelines.vae(), scheduler=table())
    return pipe, embedded(images, 5, 20, pooled=8)


def stable_diffusion_3(images: int = 2) -> tuple[Any, dict[str, Any]]:
    net = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, num_layers=2, attention_head_dim=4, num_attention_heads=2, in_channels=4,
        out_channels=4, joint_attention_dim=24, caption_projection_dim=8, pooled_projection_dim=20,
        pos_embed_max_size=8,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = pipelines.vae(shift_factor=0.1)
    pipe = made(diffusers.StableDiffusion3AutoBlocks(), transformer=rough(net), vae=vae, scheduler=scheduler)
    return pipe, embedded(images, 5, 24, pooled=20)


def z_image(images: int = 2) -> tuple[Any, dict[str, Any]]:
    net = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = pipelines.vae(shift_factor=0.1)
    pipe = made(diffusers.ZImageAutoBlocks(), transformer=rough(net), vae=vae, scheduler=scheduler)
    prompts = {"prompt_embeds": [drawn(k, 5 + k, 16) for k in range(images)]}  # of different lengths
    return pipe, {**prompts, "negative_prompt_embeds": [drawn(9, 3, 16)] * images}


def wan(images: int = 1, experts: bool = False) -> tuple[Any, dict[str, Any]]:
    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    channels = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32}
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    nets = {"transformer": rough(diffusers.WanTransformer3DModel(**sizes, **channels))}
    if experts:
        nets["transformer_2"] = rough(diffusers.WanTransformer3DModel(**sizes, **channels))
        with torch.no_grad():
            nets["transformer_2"].proj_out.weight.mul_(0.5)
    blocks = diffusers.Wan22Blocks() if experts else diffusers.WanBlocks()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = made(blocks, **nets, vae=vae.eval(), scheduler=scheduler)
    return pipe, {**embedded(images, 5, 16), "num_frames": 5}


def wan_experts(images: int = 1) -> tuple[Any, dict[str, Any]]:
    return wan(images, experts=True)


def krea_2(images: int = 2) -> tuple[Any, dict[str, Any]]:
    net = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = made(krea2.Krea2AutoBlocks(), transformer=rough(net), vae=qwen_vae(), scheduler=scheduler)
    told = {}
    for seed, kind in enumerate(("", "negative_")):
        told[f"{kind}prompt_embeds"] = drawn(seed, images, 5, 3, 16)
        told[f"{kind}prompt_embeds_mask"] = torch.ones(images, 5, dtype=torch.bool)
    return pipe, told


def flux_2(images: int = 2) -> tuple[Any, dict[str, Any]]:
    net = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKLFlux2(latent_channels=4, block_out_channels=(4, 4), norm_num_groups=2, **levels)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = made(diffusers.Flux2AutoBlocks(), transformer=rough(net), vae=vae.eval(), scheduler=scheduler)
    return pipe, {"prompt_embeds": drawn(0, images, 5, 24)}


def ltx(images: int = 1) -> tuple[Any, dict[str, Any]]:
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=24,
    )  # fmt: skip
    width, layers = (4, 4, 4, 4), (1, 1, 1, 1, 1)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=width, decoder_block_out_channels=width, layers_per_block=layers,
        decoder_layers_per_block=layers,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = made(ltx_blocks.LTXBlocks(), transformer=rough(net), vae=vae.eval(), scheduler=scheduler)
    masks = {f"{kind}prompt_attention_mask": torch.ones(images, 5, dtype=torch.bool) for kind in ("", "negative_")}
    return pipe, {**embedded(images, 5, 24), **masks, "num_frames": 9, "height": 32, "width": 32}


MADE = (flux, flux_2, krea_2, ltx, qwen_image, stable_diffusion_3, stable_diffusion_xl, wan, wan_experts, z_image)
FAMILIES: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {one.__name__: one for one in MADE}

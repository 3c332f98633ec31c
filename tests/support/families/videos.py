"""Pipelines of videos, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from support import pipelines
from support.families.parts import picture, roughen, seeded, words
from support.families.tiny import Tiny

TEXT: dict[str, Any] = {"prompt": "a red fox", "max_sequence_length": 8}
GUIDED: dict[str, Any] = {**TEXT, "negative_prompt": "blur", "guidance_scale": 3.0}
WAN: dict[str, Any] = {**GUIDED, "height": 16, "width": 16, "num_frames": 5}
EMBEDDED: dict[str, Any] = {"guidance_scale": 3.0, "height": 16, "width": 16, "num_frames": 5}
LTX: dict[str, Any] = {**GUIDED, "height": 32, "width": 32, "num_frames": 9}


def text() -> dict[str, Any]:
    return {"text_encoder": pipelines.t5(), "tokenizer": pipelines.t5_tokenizer()}


def embeds(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (1, 8, 24), generator=torch.Generator().manual_seed(seed))


def image_encoder(size: int = 4) -> Any:
    sizes = {"hidden_size": 4, "projection_dim": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=size, intermediate_size=16, patch_size=2)
    return transformers.CLIPVisionModelWithProjection(config)


def image_processor(size: int = 4) -> Any:
    return transformers.CLIPImageProcessor(crop_size={"height": size, "width": size}, size={"shortest_edge": size})


def wan_vae(**settings: Any) -> Any:
    sizes = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    means = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 1.5, 2.0]}
    return diffusers.AutoencoderKLWan(**{**sizes, **means, "scale_factor_spatial": 4, **settings})


def wan_net(channels: int = 4, cls: Any = None, **settings: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16, "text_dim": 24}
    net = (cls or diffusers.WanTransformer3DModel)(
        patch_size=(1, 2, 2), in_channels=channels, out_channels=4, **sizes, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **settings,
    )  # fmt: skip
    return roughen(net)


def wan_parts(**more: Any) -> dict[str, Any]:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {**text(), "vae": wan_vae(), "scheduler": scheduler, **more}


@seeded
def wan() -> Tiny:
    return Tiny(diffusers.WanPipeline(**wan_parts(transformer=wan_net())), WAN)


@seeded
def wan_experts() -> Tiny:
    nets = {"transformer": wan_net(), "transformer_2": wan_net()}
    pipe = diffusers.WanPipeline(**wan_parts(**nets), boundary_ratio=0.875)
    return Tiny(pipe, {**WAN, "guidance_scale_2": 2.0})


@seeded
def wan_tokens() -> Tiny:
    return Tiny(diffusers.WanPipeline(**wan_parts(transformer=wan_net()), expand_timesteps=True), WAN)


def wan_image_call() -> dict[str, Any]:
    """Give the embeddings of a text, as these pipelines clean texts by a package (ftfy) that may be missing."""
    given = {"prompt_embeds": embeds(1), "negative_prompt_embeds": embeds(2), "image": picture(0, 16, 16)}
    return {**EMBEDDED, **given}


@seeded
def wan_tokens_image() -> Tiny:
    pipe = diffusers.WanImageToVideoPipeline(**wan_parts(transformer=wan_net()), expand_timesteps=True)
    return Tiny(pipe, wan_image_call())


@seeded
def wan_image() -> Tiny:
    encoder = {"image_encoder": image_encoder(), "image_processor": image_processor()}
    parts = wan_parts(transformer=wan_net(12, image_dim=4), **encoder)
    return Tiny(diffusers.WanImageToVideoPipeline(**parts), wan_image_call())


def ltx_parts(shifted: bool = True) -> dict[str, Any]:
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, num_layers=1, caption_channels=24,
    )  # fmt: skip
    width, layers, scaled = (8, 8, 8, 8), (1, 1, 1, 1, 1), (True, True, True, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=width, decoder_block_out_channels=width, layers_per_block=layers,
        decoder_layers_per_block=layers, spatio_temporal_scaling=scaled, decoder_spatio_temporal_scaling=scaled,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifted)
    return {**text(), "transformer": roughen(net), "vae": vae, "scheduler": scheduler}


@seeded
def ltx() -> Tiny:
    return Tiny(diffusers.LTXPipeline(**ltx_parts()), LTX)


@seeded
def ltx_image() -> Tiny:
    return Tiny(diffusers.LTXImageToVideoPipeline(**ltx_parts()), {**LTX, "image": picture(0, 32, 32)})


@seeded
def ltx_condition() -> Tiny:
    return Tiny(diffusers.LTXConditionPipeline(**ltx_parts(shifted=False)), {**LTX, "image": picture(0, 32, 32)})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Wan 2.1": wan,
    "Wan 2.2 two experts": wan_experts,
    "Wan 2.2 5B": wan_tokens,
    "Wan 2.2 5B image": wan_tokens_image,
    "Wan 2.1 image": wan_image,
    "LTX": ltx,
    "LTX image": ltx_image,
    "LTX Condition": ltx_condition,
}

"""Pipelines of images whose transformer is asked by texts of T5, Bert or a language model, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers.guiders import AdaptiveProjectedMixGuidance

from support import pipelines
from support.families.parts import embeds, picture, seeded, words
from support.families.tiny import Tiny
from support.families.transformers import (
    GUIDED,
    MEDIUM,
    SIZE,
    SMALL,
    build,
    byte_tokenizer,
    flow,
    flux2_vae,
    language_model,
    louder,
    qwen_vae,
)

UNBINNED: dict[str, Any] = {**GUIDED, "use_resolution_binning": False}
SHORT: dict[str, Any] = {"max_sequence_length": 16}
NO = "negative_"


def t5_parts(**more: Any) -> dict[str, Any]:
    """Make the parts of a pipeline whose text is read by T5."""
    parts = {
        "text_encoder": pipelines.t5(),
        "tokenizer": pipelines.t5_tokenizer(),
        "vae": pipelines.vae(shift_factor=0.1),
    }
    return {**parts, "image_encoder": None, "feature_extractor": None, **more}


def pixart(cls: Any, size: int, **more: Any) -> Tiny:
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3, "cross_attention_dim": 24}
    net = diffusers.PixArtTransformer2DModel(
        sample_size=size, patch_size=2, in_channels=4, out_channels=8, caption_channels=24, **sizes
    )
    pipe = build(cls, t5_parts(scheduler=diffusers.DDIMScheduler(**pipelines.TABLE), transformer=net, **more))
    return Tiny(pipe, {**UNBINNED, **SHORT, "clean_caption": False})


@seeded
def pixart_alpha() -> Tiny:
    return pixart(diffusers.PixArtAlphaPipeline, 128)  # such networks are told the size of the image


@seeded
def pixart_sigma() -> Tiny:
    return pixart(diffusers.PixArtSigmaPipeline, 8)


@seeded
def pixart_perturbed() -> Tiny:
    tiny = pixart(diffusers.PixArtSigmaPAGPipeline, 8, pag_applied_layers=["blocks.0"])
    return Tiny(tiny.pipe, {**tiny.call, "pag_scale": 2.0})


def hunyuan_dit_parts(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes, initializer_range=0.5))
    net = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=8, cross_attention_dim_t5=24, pooled_projection_dim=8, hidden_size=16,
        activation_fn="gelu-approximate", text_len=77, text_len_t5=256,
    )  # fmt: skip
    second = {"text_encoder_2": pipelines.t5(), "tokenizer_2": pipelines.t5_tokenizer()}
    first = {"text_encoder": bert, "tokenizer": words(pipelines.bert_tokenizer), "vae": pipelines.vae(4)}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {
        **first,
        **second,
        **rest,
        "transformer": net,
        "scheduler": diffusers.DDIMScheduler(**pipelines.TABLE, prediction_type="v_prediction"),
        **more,
    }


@seeded
def hunyuan_dit() -> Tiny:
    return Tiny(build(diffusers.HunyuanDiTPipeline, hunyuan_dit_parts()), {**UNBINNED, **MEDIUM})


@seeded
def hunyuan_dit_controlnet() -> Tiny:
    net = diffusers.HunyuanDiT2DControlNetModel(
        conditioning_channels=4, num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2,
        sample_size=8, hidden_size=16, transformer_num_layers=2, cross_attention_dim=8, cross_attention_dim_t5=24,
        pooled_projection_dim=8, text_len=77, text_len_t5=256,
    )  # fmt: skip
    pipe = build(diffusers.HunyuanDiTControlNetPipeline, hunyuan_dit_parts(controlnet=net))
    return Tiny(pipe, {**UNBINNED, **MEDIUM, "control_image": picture(0, 32, 32)})


def chroma_parts() -> dict[str, Any]:
    net = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(2, 2, 4), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return t5_parts(scheduler=flow(), transformer=net)


@seeded
def chroma() -> Tiny:
    return Tiny(build(diffusers.ChromaPipeline, chroma_parts()), {**GUIDED, **SHORT})


@seeded
def chroma_image() -> Tiny:
    pipe = build(diffusers.ChromaImg2ImgPipeline, chroma_parts())
    return Tiny(pipe, {**GUIDED, **SHORT, "image": picture(0, 16, 16), "strength": 1.0})


@seeded
def cogview3() -> Tiny:
    net = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=24, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=False)
    pipe = build(diffusers.CogView3PlusPipeline, t5_parts(scheduler=scheduler, transformer=net))
    return Tiny(pipe, {**GUIDED, **SHORT})


def cogview4_of(cls: Any, channels: int = 4) -> Any:
    net = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=channels, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    shift: dict[str, Any] = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 2, "max_image_seq_len": 30}
    scheduler = flow(**shift, use_dynamic_shifting=True, time_shift_type="linear")
    parts = {
        "text_encoder": language_model("Glm"),
        "tokenizer": byte_tokenizer(),
        "vae": pipelines.vae(shift_factor=0.1),
    }
    return build(cls, {**parts, "scheduler": scheduler, "transformer": louder(net)})


@seeded
def cogview4() -> Tiny:
    return Tiny(cogview4_of(diffusers.CogView4Pipeline), {**GUIDED, **SHORT})


@seeded
def cogview4_control() -> Tiny:
    pipe = cogview4_of(diffusers.CogView4ControlPipeline, 8)
    return Tiny(pipe, {**GUIDED, **SHORT, "control_image": picture(0, 16, 16)})


def language_parts(name: str = "Qwen3", **more: Any) -> dict[str, Any]:
    """Make the parts of a pipeline whose text is read by a language model without a head."""
    parts = {"text_encoder": language_model(name), "tokenizer": byte_tokenizer()}
    return {**parts, "vae": pipelines.vae(shift_factor=0.1), "scheduler": flow(), **more}


def hunyuan_image_parts(**settings: Any) -> dict[str, Any]:
    net = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=8, text_embed_2_dim=24, rope_axes_dim=(4, 4),
        **settings,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        scaling_factor=0.5, spatial_compression_ratio=2, sample_size=16,
    )  # fmt: skip
    second = {"text_encoder_2": pipelines.t5(), "tokenizer_2": pipelines.t5_tokenizer()}
    return language_parts(**second, vae=vae, transformer=net)


def hunyuan_image_of(parts: dict[str, Any], **call: Any) -> Tiny:
    pipe = build(diffusers.HunyuanImagePipeline, parts)
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 16
    return Tiny(pipe, {**SMALL, "prompt": "a red fox", **call})


@seeded
def hunyuan_image() -> Tiny:
    guider = diffusers.ClassifierFreeGuidance(3.0)
    return hunyuan_image_of({**hunyuan_image_parts(), "guider": guider, "ocr_guider": guider})


@seeded
def hunyuan_image_projected() -> Tiny:
    guider = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
    return hunyuan_image_of({**hunyuan_image_parts(), "guider": guider, "ocr_guider": guider})


@seeded
def hunyuan_image_distilled() -> Tiny:
    parts = hunyuan_image_parts(guidance_embeds=True, use_meanflow=True)
    return hunyuan_image_of({**parts, "guider": None, "ocr_guider": None}, distilled_guidance_scale=3.0)


def bria_net(cls: Any, **settings: Any) -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    return cls(patch_size=1, in_channels=16, **sizes, axes_dims_rope=(0, 4, 4), **settings)


@seeded
def bria() -> Tiny:
    net = bria_net(diffusers.BriaTransformer2DModel, joint_attention_dim=24)
    return Tiny(build(diffusers.BriaPipeline, t5_parts(scheduler=flow(), transformer=net)), {**GUIDED, **SHORT})


@seeded
def bria_table() -> Tiny:
    net = bria_net(diffusers.BriaTransformer2DModel, joint_attention_dim=24)
    scheduler = diffusers.DDIMScheduler(**pipelines.TABLE)
    return Tiny(build(diffusers.BriaPipeline, t5_parts(scheduler=scheduler, transformer=net)), {**GUIDED, **SHORT})


def wan_vae(levels: int = 4) -> Any:
    """Make an autoencoder of images of 16 pixels a latent."""
    sizes = {"base_dim": 4, "z_dim": 16, "dim_mult": [1] * levels, "num_res_blocks": 1}
    means = {"latents_mean": [0.1, 0.2, -0.3, 0.4] * 4, "latents_std": [0.5, 0.6, 0.7, 0.8] * 4}
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    strides = {"temperal_downsample": [False] * (levels - 1), "scale_factor_spatial": 2**levels}
    return diffusers.AutoencoderKLWan(**sizes, **means, **patches, **strides)


@seeded
def bria_fibo() -> Tiny:
    net = bria_net(diffusers.BriaFiboTransformer2DModel, joint_attention_dim=16, text_encoder_dim=8)
    parts = language_parts("SmolLM3", vae=wan_vae(), transformer=net)
    return Tiny(build(diffusers.BriaFiboPipeline, parts), {**GUIDED, "height": 64, "width": 64})


@seeded
def ovis() -> Tiny:
    net = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = build(diffusers.OvisImagePipeline, language_parts(transformer=net))
    return Tiny(pipe, {**GUIDED, "max_sequence_length": 256})


def prx_net(channels: int = 4, **settings: Any) -> Any:
    return diffusers.PRXTransformer2DModel(
        patch_size=2, in_channels=channels, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[4, 4], **settings,
    )  # fmt: skip


def embedded(words: int = 5) -> dict[str, Any]:
    """Give embeddings of a prompt, and of a negative one."""
    one, other = torch.randn((2, 1, words, 8))
    masks = {f"{name}prompt_attention_mask": torch.ones(1, words, dtype=torch.bool) for name in ("", "negative_")}
    return {"prompt_embeds": one, "negative_prompt_embeds": other, **masks}


PRX: dict[str, Any] = {"guidance_scale": 3.0, "use_resolution_binning": False}


@seeded
def prx() -> Tiny:
    pipe = build(diffusers.PRXPipeline, language_parts("Gemma2", transformer=prx_net()))
    return Tiny(pipe, {**PRX, **SIZE, **embedded()})


@seeded
def prx_pixel() -> Tiny:
    parts = {"transformer": prx_net(3, bottleneck_size=8, resolution_embeds=True), "scheduler": flow()}
    parts |= {"text_encoder": language_model("Qwen3"), "tokenizer": byte_tokenizer(), "default_sample_size": 8}
    return Tiny(build(diffusers.PRXPixelPipeline, parts), {**PRX, **SMALL, **embedded()})


@seeded
def krea2() -> Tiny:
    net = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=8, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    parts = language_parts("Qwen3VLText", vae=qwen_vae(), transformer=net, text_encoder_select_layers=(1, 2))
    return Tiny(build(diffusers.Krea2Pipeline, parts), {**GUIDED, "max_sequence_length": 128})


@seeded
def ernie() -> Tiny:
    net = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=1, ffn_hidden_size=16, in_channels=16, out_channels=16,
        text_in_dim=8, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    parts = language_parts("Mistral", vae=flux2_vae(), transformer=net)
    return Tiny(build(diffusers.ErnieImagePipeline, parts), GUIDED)


@seeded
def longcat() -> Tiny:
    net = diffusers.LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 16}
    vae = diffusers.AutoencoderKL(**blocks, **sizes, shift_factor=0.1)
    pipe = build(diffusers.LongCatImagePipeline, {**language_parts(transformer=net, vae=vae), "text_processor": None})
    pipe.tokenizer_max_length = 16
    return Tiny(pipe, {**GUIDED, "enable_prompt_rewrite": False})


@seeded
def hidream() -> Tiny:
    net = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[24, 16], text_emb_dim=16, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=(0, 1),
    )  # fmt: skip
    parts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")}
    parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": pipelines.vae(shift_factor=0.1)}
    pipe = build(diffusers.HiDreamImagePipeline, parts, transformer=net)
    pipe.default_sample_size = 8
    texts = {"prompt_embeds_t5": (1, 8, 24), "prompt_embeds_llama3": (2, 1, 8, 16), "pooled_prompt_embeds": (1, 16)}
    told = {f"{sign}{name}": embeds(len(sign + name), *shape) for name, shape in texts.items() for sign in ("", NO)}
    return Tiny(pipe, {**SIZE, **told, "guidance_scale": 3.0})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "PixArt-α": pixart_alpha,
    "PixArt-Σ": pixart_sigma,
    "PixArt-Σ PAG": pixart_perturbed,
    "HunyuanDiT": hunyuan_dit,
    "HunyuanDiT ControlNet": hunyuan_dit_controlnet,
    "Chroma": chroma,
    "Chroma image to image": chroma_image,
    "CogView3+": cogview3,
    "CogView4": cogview4,
    "CogView4 Control": cogview4_control,
    "HunyuanImage 2.1": hunyuan_image,
    "HunyuanImage 2.1 with projected guidance": hunyuan_image_projected,
    "HunyuanImage 2.1 distilled": hunyuan_image_distilled,
    "Bria": bria,
    "Bria with DDIM": bria_table,
    "Bria Fibo": bria_fibo,
    "Ovis-Image": ovis,
    "PRX": prx,
    "PRX in pixels": prx_pixel,
    "Krea 2": krea2,
    "ERNIE-Image": ernie,
    "LongCat-Image": longcat,
    "HiDream": hidream,
}

"""Pipelines of images whose transformer is asked by texts of T5, Bert or a language model, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from support import pipelines
from support.families.parts import picture, seeded, words
from support.families.tiny import Tiny
from support.families.transformers import (
    GUIDED,
    MEDIUM,
    build,
    byte_tokenizer,
    flow,
    language_model,
    louder,
)

UNBINNED: dict[str, Any] = {**GUIDED, "use_resolution_binning": False}
SHORT: dict[str, Any] = {"max_sequence_length": 16}


def t5_parts(**more: Any) -> dict[str, Any]:
    """Make the parts of a pipeline whose text is read by T5."""
    parts = {
        "text_encoder": pipelines.t5(),
        "tokenizer": pipelines.t5_tokenizer(),
        "vae": pipelines.vae(shift_factor=0.1),
    }
    return {**parts, "image_encoder": None, "feature_extractor": None, **more}


def pixart(cls: Any, size: int) -> Tiny:
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3, "cross_attention_dim": 24}
    net = diffusers.PixArtTransformer2DModel(
        sample_size=size, patch_size=2, in_channels=4, out_channels=8, caption_channels=24, **sizes
    )
    pipe = build(cls, t5_parts(scheduler=diffusers.DDIMScheduler(**pipelines.TABLE), transformer=net))
    return Tiny(pipe, {**UNBINNED, **SHORT, "clean_caption": False})


@seeded
def pixart_alpha() -> Tiny:
    return pixart(diffusers.PixArtAlphaPipeline, 128)  # such networks are told the size of the image


@seeded
def pixart_sigma() -> Tiny:
    return pixart(diffusers.PixArtSigmaPipeline, 8)


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
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
        **more,
    }


@seeded
def hunyuan_dit() -> Tiny:
    return Tiny(build(diffusers.HunyuanDiTPipeline, hunyuan_dit_parts()), {**UNBINNED, **MEDIUM})


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


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "PixArt-α": pixart_alpha,
    "PixArt-Σ": pixart_sigma,
    "HunyuanDiT": hunyuan_dit,
    "Chroma": chroma,
    "Chroma image to image": chroma_image,
    "CogView3+": cogview3,
    "CogView4": cogview4,
    "CogView4 Control": cogview4_control,
}

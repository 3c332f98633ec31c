"""The families of networks that can be read: the inputs of each, and the pipelines that draw with it.

A network of `diffusers` is identified by its class. `FAMILIES` has a line for each: a module that calls the network as
`model.network.Network` does, the pipelines that draw with nothing else, and what reads its prompts or names its
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pushforward.model.diffusers import folders
from pushforward.model.diffusers.folders import Folder
from pushforward.model.diffusers.networks import Dit, Flux, StableDiffusion3, TextUnet, Unet
from pushforward.model.diffusers.tables import Settings
from pushforward.model.diffusers.text import Text, Tower, clip_and_t5, joint, last, penultimate

__all__ = ["FAMILIES", "Family", "numbered"]

BERT_TOKENS, SD3_TOKENS, FLUX_TOKENS = 77, 256, 512  # lengths of prompts for BERT and T5


def _text_unet(network: Any, pixels: tuple[int, int], _: float) -> nn.Module:
    return TextUnet(network, (*pixels, 0, 0, *pixels) if network.config["addition_embed_type"] else ())


def _towers(folder: Folder, dtype: torch.dtype | None, *parts: tuple[str, str, str, int | None]) -> list[Tower]:
    """Load text encoders, given the part of each, its tokenizer's part, its class and its number of tokens."""
    encoders = [folders.load_encoder(folder, encoder, name, dtype) for encoder, _, name, _ in parts]
    tokenizers = [folders.load_tokenizer(folder, tokenizer) for _, tokenizer, _, _ in parts]
    return [Tower(tokenizers[k], encoder, parts[k][3]) for k, encoder in enumerate(encoders)]


def _unet_text(folder: Folder, settings: Settings, dtype: torch.dtype | None) -> Text:
    if folder.has("bert"):
        return Text(_towers(folder, dtype, ("bert", "tokenizer", "LDMBertModel", BERT_TOKENS)), last)
    first = ("text_encoder", "tokenizer", "CLIPTextModel", None)
    if settings.get("addition_embed_type") is None:
        return Text(_towers(folder, dtype, first), last)
    second = ("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", None)
    towers = _towers(folder, dtype, *([first] if folder.has("text_encoder") else []), second)
    return Text(towers, penultimate, bool(folder.index.get("force_zeros_for_empty_prompt", True)))


def _sd3_text(folder: Folder, settings: Settings, dtype: torch.dtype | None) -> Text:
    parts = [(f"text_encoder{k}", f"tokenizer{k}", "CLIPTextModelWithProjection", None) for k in ("", "_2")]
    towers = _towers(folder, dtype, *parts)
    if folder.has("text_encoder_3"):
        towers += _towers(folder, dtype, ("text_encoder_3", "tokenizer_3", "T5EncoderModel", SD3_TOKENS))
    return Text(towers, joint(settings.get("joint_attention_dim", 4096), SD3_TOKENS))


def _flux_text(folder: Folder, _: Settings, dtype: torch.dtype | None) -> Text:
    first = ("text_encoder", "tokenizer", "CLIPTextModel", None)
    second = ("text_encoder_2", "tokenizer_2", "T5EncoderModel", FLUX_TOKENS)
    return Text(_towers(folder, dtype, first, second), clip_and_t5)


def numbered(settings: Settings) -> tuple[str, ...]:
    """Return numbers as the names of the classes of a network that has a table of them."""
    if settings.get("class_embed_type") is not None:
        return ()
    return tuple(map(str, range(settings.get("num_class_embeds") or 0)))


def _named(index: Settings, settings: Settings) -> tuple[str, ...]:
    """List the first name of each class, if the pipeline has names."""
    names = index.get("id2label") or {}
    count = settings["num_embeds_ada_norm"]
    return tuple(str(names.get(str(k), k)).split(",")[0].strip() for k in range(count))


@dataclass(frozen=True)
class Family:
    """How networks of one class are read.

    Args:
        module: function from the network, the images' height and width, and the embedded guidance to the module to use.
        text: function from the pipeline, the network's settings and the weights' dtype to the encoder of prompts.
        classes: function that names the labels; after them comes one that stands for no class.
        pipelines: pipelines of `diffusers` that draw with such a network as it is read here, and with nothing else.
        packed: whether four neighbouring pixels are the channels of one token.
        not_its_grid: settings in which the pipeline differs from its scheduler.
        only: settings by which the network takes inputs besides a prompt or class, with the values of each that can be
            read here.
    """

    module: Callable[[Any, tuple[int, int], float], nn.Module]
    pipelines: tuple[str, ...]
    text: Callable[[Folder, Settings, torch.dtype | None], Text] | None = None
    classes: Callable[[Settings, Settings], tuple[str, ...]] | None = None
    packed: bool = False
    not_its_grid: tuple[str, ...] = ()
    only: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)


def _tasks(name: str) -> tuple[str, ...]:
    """List the pipelines that begin at noise, at an image, and at one with a hole: the network is the same."""
    return tuple(f"{name}{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))


_DIT = Family(lambda network, *_: Dit(network), ("DiTPipeline",), classes=_named)
FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(  # images, or latents of a VQModel or AutoencoderKL
        lambda network, *_: Unet(network),
        ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline", "KarrasVePipeline", "LDMPipeline"),
    ),
    "UNet2DConditionModel": Family(  # Stable Diffusion 1, 2 and XL, and text-to-image latent diffusion
        _text_unet,
        (*_tasks("StableDiffusion"), *_tasks("StableDiffusionXL"), "LDMTextToImagePipeline", "CycleDiffusionPipeline"),
        _unet_text,
        only={
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None,),
            "time_cond_proj_dim": (None,),
            "addition_embed_type": (None, "text_time"),
        },
    ),
    "DiTTransformer2DModel": _DIT,  # images by class
    "Transformer2DModel": replace(_DIT, only={"norm_type": ("ada_norm_zero",)}),
    "SD3Transformer2DModel": Family(
        lambda network, *_: StableDiffusion3(network), _tasks("StableDiffusion3"), _sd3_text
    ),
    "FluxTransformer2DModel": Family(
        lambda network, _, guidance: Flux(network, guidance),
        _tasks("Flux"),
        _flux_text,
        packed=True,
        not_its_grid=("last",),
    ),
}

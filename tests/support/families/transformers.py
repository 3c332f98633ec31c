"""Pipelines of images whose network is a transformer, made tiny."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
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


def louder(net: Any, factor: float = 2.0) -> Any:
    """Scale the matrices of a network whose text or time would else hardly be heard."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter *= factor
    return net


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


@seeded
def stable_diffusion_3_perturbed() -> Tiny:
    pipe = sd3(diffusers.StableDiffusion3PAGPipeline, pag_applied_layers=["blocks.0"])
    return Tiny(pipe, {**GUIDED, **SMALL, "pag_scale": 2.0})


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


def byte_tokenizer() -> Any:
    """Make a tokenizer of a language model: one token a byte, a chat template, and long texts cut on the left."""
    marks = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    signs = [*marks, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    own = tokenizers.Tokenizer(tokenizers.models.BPE({sign: k for k, sign in enumerate(signs)}, []))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    chat = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.content is string %}{{ m.content }}"
        "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=marks[2:],
        truncation_side="left", chat_template=chat,
    )  # fmt: skip


WORDS = 7 + 256  # tokens that `byte_tokenizer` knows


def language_model(name: str, width: int = 8, **settings: Any) -> Any:
    """Make a language model without a head, of a class of `transformers` that is called name + "Model"."""
    sizes = {"vocab_size": WORDS, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, initializer_range=0.5, **settings)
    return getattr(transformers, f"{name}Model")(config)


def flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def flux2_vae() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKLFlux2(**blocks, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4)


def flux2_parts(distilled: bool, language: str) -> dict[str, Any]:
    net = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=distilled,
    )  # fmt: skip
    parts = {"text_encoder": language_model(language), "tokenizer": byte_tokenizer()}
    return {**parts, "scheduler": flow(), "vae": flux2_vae(), "transformer": louder(net)}


FLUX2: dict[str, Any] = {**DISTILLED, "max_sequence_length": 24, "text_encoder_out_layers": (1, 2)}


@seeded
def flux2() -> Tiny:
    return Tiny(build(diffusers.Flux2Pipeline, flux2_parts(True, "Mistral")), FLUX2)


@seeded
def flux2_edit() -> Tiny:
    pipe = build(diffusers.Flux2Pipeline, flux2_parts(True, "Mistral"))
    return Tiny(pipe, {**FLUX2, "image": picture(0, 64, 64)})


@seeded
def flux2_klein() -> Tiny:
    return Tiny(build(diffusers.Flux2KleinPipeline, flux2_parts(False, "Qwen3")), FLUX2)


def qwen_vae() -> Any:
    means = {"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [0.5, 0.6, 0.7, 0.8]}
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **means
    )


def qwen_parts() -> dict[str, Any]:
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    parts = {"text_encoder": language_model("Qwen2"), "tokenizer": byte_tokenizer()}
    return {**parts, "scheduler": flow(), "vae": qwen_vae(), "transformer": net}


QWEN: dict[str, Any] = {**TEXT, "negative_prompt": "blur", "true_cfg_scale": 3.0}


def qwen(cls: Any, **more: Any) -> Any:
    """Make a pipeline of Qwen-Image whose prompt is not wrapped in a system message."""
    pipe = build(cls, {**qwen_parts(), **more})
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe


@seeded
def qwen_image() -> Tiny:
    return Tiny(qwen(diffusers.QwenImagePipeline), QWEN)


@seeded
def qwen_image_of_image() -> Tiny:
    return Tiny(qwen(diffusers.QwenImageImg2ImgPipeline), {**QWEN, "image": picture(0, 16, 16), "strength": 1.0})


@seeded
def qwen_controlnet() -> Tiny:
    net = diffusers.QwenImageControlNetModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    pipe = qwen(diffusers.QwenImageControlNetPipeline, controlnet=net)
    return Tiny(pipe, {**QWEN, "control_image": picture(0, 16, 16), "controlnet_conditioning_scale": 0.5})


def qwen_edit_of(cls: Any, **call: Any) -> Tiny:
    """Make a pipeline of edits that brings images to 32 by 32 pixels, where its class would to a million."""
    whole = cls.__call__.__wrapped__
    names = dict(whole.__globals__)
    near = names["calculate_dimensions"]
    names["calculate_dimensions"] = lambda _, ratio: near(32 * 32, ratio)
    small = torch.no_grad()(FunctionType(whole.__code__, names, "__call__", whole.__defaults__))
    pipe = qwen(type(cls.__name__, (cls,), {"__call__": small, "__module__": cls.__module__}), processor=None)
    one, other = torch.randn((2, 1, 5, 8))
    return Tiny(pipe, {**SIZE, "true_cfg_scale": 3.0, "prompt_embeds": one, "negative_prompt_embeds": other, **call})


@seeded
def qwen_edit() -> Tiny:
    return qwen_edit_of(diffusers.QwenImageEditPipeline, image=picture(0, 16, 16))


@seeded
def qwen_edit_plus() -> Tiny:
    return qwen_edit_of(diffusers.QwenImageEditPlusPipeline, image=[picture(0, 16, 16), picture(1, 16, 16)])


def z_image_of(cls: Any, **call: Any) -> Tiny:
    net: Any = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 2, 2], axes_lens=[64, 32, 32],
    )  # fmt: skip
    for token in (net.x_pad_token, net.cap_pad_token):  # these are made without values
        torch.nn.init.normal_(token)
    parts = {
        "text_encoder": language_model("Qwen3"),
        "tokenizer": byte_tokenizer(),
        "vae": pipelines.vae(shift_factor=0.1),
    }
    pipe = build(cls, {**parts, "scheduler": flow(shift=3.0), "transformer": net})
    return Tiny(pipe, {**GUIDED, "max_sequence_length": 24, **call})


@seeded
def z_image() -> Tiny:
    return z_image_of(diffusers.ZImagePipeline)


@seeded
def z_image_of_image() -> Tiny:
    return z_image_of(diffusers.ZImageImg2ImgPipeline, image=picture(0, 16, 16), strength=1.0)


def sana_parts(**settings: Any) -> dict[str, Any]:
    net = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=4, patch_size=1, **settings,
    )  # fmt: skip
    blocks, scales = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (), (5,))
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(4, 4, 8, 8), decoder_block_out_channels=(4, 4, 8, 8),
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales, encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    parts = {"text_encoder": language_model("Gemma2"), "tokenizer": byte_tokenizer()}
    return {**parts, "vae": vae, "transformer": net}


MEDIUM: dict[str, Any] = {"height": 32, "width": 32}
PLAIN: dict[str, Any] = {**MEDIUM, "use_resolution_binning": False, "max_sequence_length": 16}


@seeded
def sana() -> Tiny:
    pipe = build(diffusers.SanaPipeline, {**sana_parts(), "scheduler": flow(shift=3.0)})
    return Tiny(pipe, {**GUIDED, **PLAIN, "complex_human_instruction": None})


@seeded
def sana_controlnet() -> Tiny:
    net = diffusers.SanaControlNetModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=4, patch_size=1,
    )  # fmt: skip
    parts = {**sana_parts(), "scheduler": flow(shift=3.0), "controlnet": net}
    pipe = build(diffusers.SanaControlNetPipeline, parts)
    return Tiny(pipe, {**GUIDED, **PLAIN, "complex_human_instruction": None, "control_image": picture(0, 32, 32)})


@seeded
def sana_sprint() -> Tiny:
    parts = sana_parts(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    pipe = build(diffusers.SanaSprintPipeline, {**parts, "scheduler": diffusers.SCMScheduler()})
    return Tiny(pipe, {**DISTILLED, **PLAIN, "complex_human_instruction": None})


@seeded
def auraflow() -> Tiny:
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=24,
        pos_embed_max_size=16,
    )  # fmt: skip
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 24, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    parts = {"text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)), "vae": pipelines.vae()}
    pipe = build(
        diffusers.AuraFlowPipeline,
        {**parts, "tokenizer": pipelines.t5_tokenizer(), "scheduler": flow(), "transformer": louder(net)},
    )
    return Tiny(pipe, {**GUIDED, "max_sequence_length": 16})


def lumina_like(cls: Any, net: Any, language: str, **settings: Any) -> Any:
    parts = {
        "text_encoder": language_model(language),
        "tokenizer": byte_tokenizer(),
        "vae": pipelines.vae(shift_factor=0.1),
    }
    return build(cls, {**parts, "scheduler": flow(**settings), "transformer": net})


@seeded
def lumina() -> Tiny:
    net: Any = diffusers.LuminaNextDiT2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=8,
    )  # fmt: skip
    louder(net.time_caption_embed.timestep_embedder, 10.0)
    pipe = lumina_like(diffusers.LuminaPipeline, net, "Gemma")
    return Tiny(pipe, {**GUIDED, **MEDIUM})


@seeded
def lumina2() -> Tiny:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    pipe = lumina_like(diffusers.Lumina2Pipeline, net, "Gemma2", use_dynamic_shifting=True)
    return Tiny(pipe, {**GUIDED, **MEDIUM, "max_sequence_length": 16})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Stable Diffusion 3": stable_diffusion_3,
    "Stable Diffusion 3 image to image": stable_diffusion_3_image,
    "Stable Diffusion 3 ControlNet": stable_diffusion_3_controlnet,
    "Stable Diffusion 3 PAG": stable_diffusion_3_perturbed,
    "Flux": flux,
    "Flux schnell": flux_schnell,
    "Flux with a negative prompt": flux_true_guidance,
    "Flux image to image": flux_image,
    "Flux inpainting": flux_inpaint,
    "Flux Kontext": flux_kontext,
    "Flux Fill": flux_fill,
    "Flux Control": flux_control,
    "Flux ControlNet": flux_controlnet,
    "Flux 2": flux2,
    "Flux 2 with an image": flux2_edit,
    "Flux 2 Klein": flux2_klein,
    "Qwen-Image": qwen_image,
    "Qwen-Image image to image": qwen_image_of_image,
    "Qwen-Image ControlNet": qwen_controlnet,
    "Qwen-Image Edit": qwen_edit,
    "Qwen-Image Edit Plus": qwen_edit_plus,
    "Z-Image": z_image,
    "Z-Image image to image": z_image_of_image,
    "Sana": sana,
    "Sana ControlNet": sana_controlnet,
    "Sana Sprint": sana_sprint,
    "AuraFlow": auraflow,
    "Lumina": lumina,
    "Lumina 2": lumina2,
}

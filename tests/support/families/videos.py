"""Pipelines of videos, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from support import pipelines
from support.families.parts import embeds, picture, roughen, seeded, words
from support.families.tiny import Tiny

TEXT: dict[str, Any] = {"prompt": "a red fox", "max_sequence_length": 8}
GUIDED: dict[str, Any] = {**TEXT, "negative_prompt": "blur", "guidance_scale": 3.0}
SIZE: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 5}
WAN: dict[str, Any] = {**GUIDED, **SIZE}
PLAIN: dict[str, Any] = {"template": "{}", "crop_start": 0}
LOUD: dict[str, Any] = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
LTX: dict[str, Any] = {**GUIDED, "height": 32, "width": 32, "num_frames": 9}


def text() -> dict[str, Any]:
    return {"text_encoder": pipelines.t5(), "tokenizer": pipelines.t5_tokenizer()}


def image_encoder(size: int = 4, patch: int = 2) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 4, "projection_dim": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=size, intermediate_size=16, patch_size=patch)
    return transformers.CLIPVisionModelWithProjection(config)


def image_processor(size: int = 4) -> Any:
    return transformers.CLIPImageProcessor(crop_size={"height": size, "width": size}, size={"shortest_edge": size})


def wan_vae(**settings: Any) -> Any:
    sizes = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    means = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.05, 0.1, 0.15, 0.2]}
    return diffusers.AutoencoderKLWan(**{**sizes, **means, "scale_factor_spatial": 4, **settings})


def wan_net(channels: int = 4, cls: Any = None, scale: float = 0.1, **settings: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16, "text_dim": 24}
    net = (cls or diffusers.WanTransformer3DModel)(
        patch_size=(1, 2, 2), in_channels=channels, out_channels=4, **sizes, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **settings,
    )  # fmt: skip
    return roughen(net, scale=scale)


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


def wan_call() -> dict[str, Any]:
    """Give the embeddings of a text, as some pipelines clean texts by a package (ftfy) that may be missing."""
    return {**SIZE, "prompt_embeds": embeds(1), "negative_prompt_embeds": embeds(2), "guidance_scale": 3.0}


@seeded
def wan_tokens_image() -> Tiny:
    pipe = diffusers.WanImageToVideoPipeline(**wan_parts(transformer=wan_net()), expand_timesteps=True)
    return Tiny(pipe, {**wan_call(), "image": picture(0, 16, 16)})


@seeded
def wan_image() -> Tiny:
    encoder = {"image_encoder": image_encoder(), "image_processor": image_processor()}
    parts = wan_parts(transformer=wan_net(12, image_dim=4), **encoder)
    return Tiny(diffusers.WanImageToVideoPipeline(**parts), {**wan_call(), "image": picture(0, 16, 16)})


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


def hunyuan_vae(**settings: Any) -> Any:
    blocks = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 3, "up_block_types": ("HunyuanVideoUpBlock3D",) * 3}
    sizes = {"latent_channels": 4, "block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    ratios = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 4, "scaling_factor": 4.0}
    return diffusers.AutoencoderKLHunyuanVideo(**blocks, **sizes, **ratios, mid_block_add_attention=True, **settings)


def llama() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    return transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=40, pad_token_id=0))


def clip() -> Any:
    """Make the text encoder of CLIP for 77 tokens, the length that these pipelines write in their code."""
    config = pipelines.clip().config
    config.max_position_embeddings = 77
    return transformers.CLIPTextModel(config)


def hunyuan_net(channels: int = 4, distilled: bool = True, **settings: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1}
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=channels, out_channels=4, **sizes, num_refiner_layers=1, patch_size=1, patch_size_t=1,
        guidance_embeds=distilled, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 2, 4), **settings,
    )  # fmt: skip
    return roughen(net)


def hunyuan_parts(**more: Any) -> dict[str, Any]:
    first = {"text_encoder": llama(), "tokenizer": pipelines.t5_tokenizer()}
    second = {"text_encoder_2": clip(), "tokenizer_2": words()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return {**first, **second, "vae": hunyuan_vae(), "scheduler": scheduler, **more}


@seeded
def hunyuan() -> Tiny:
    pipe = diffusers.HunyuanVideoPipeline(**hunyuan_parts(transformer=hunyuan_net()))
    return Tiny(pipe, {**TEXT, **SIZE, "prompt_template": PLAIN, "guidance_scale": 3.0})


@seeded
def hunyuan_guided() -> Tiny:
    pipe = diffusers.HunyuanVideoPipeline(**hunyuan_parts(transformer=hunyuan_net()))
    return Tiny(pipe, {**GUIDED, **SIZE, "prompt_template": PLAIN, "true_cfg_scale": 2.0})


@seeded
def hunyuan_15() -> Tiny:
    net: Any = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=24, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    net.cond_type_embed.weight.data *= 0.1  # the kinds of tokens would drown what they say
    net.context_embedder_2 = HunyuanVideo15ByT5TextProjection(24, 16, 16)  # the model's own is 2048 wide
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe: Any = diffusers.HunyuanVideo15Pipeline(
        **dict.fromkeys(names), transformer=roughen(net), vae=vae, guider=diffusers.ClassifierFreeGuidance(3.0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 4
    call = dict(SIZE)
    for k, sign in enumerate(("", "negative_")):
        call |= {f"{sign}prompt_embeds": embeds(k, 1, 8, 16), f"{sign}prompt_embeds_mask": torch.ones(1, 8)}
        call |= {f"{sign}prompt_embeds_2": embeds(k, 1, 4, 24), f"{sign}prompt_embeds_mask_2": torch.ones(1, 4)}
    return Tiny(pipe, call)


def cog_parts(**settings: Any) -> dict[str, Any]:
    sizes = {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "time_embed_dim": 8, "text_embed_dim": 24}
    net = diffusers.CogVideoXTransformer3DModel(**{
        **sizes, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "num_layers": 1, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 8, **settings,
    })  # fmt: skip
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 3, "up_block_types": ("CogVideoXUpBlock3D",) * 3}
    widths = {"block_out_channels": (8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    vae = diffusers.AutoencoderKLCogVideoX(**blocks, **widths, temporal_compression_ratio=4)
    table = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.CogVideoXDDIMScheduler(**table, set_alpha_to_one=True)
    return {**text(), "transformer": roughen(net), "vae": vae, "scheduler": scheduler}


@seeded
def cog() -> Tiny:
    return Tiny(diffusers.CogVideoXPipeline(**cog_parts()), {**GUIDED, **SIZE})


@seeded
def cog_image() -> Tiny:
    rotary = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    pipe = diffusers.CogVideoXImageToVideoPipeline(**cog_parts(in_channels=8, **rotary))
    return Tiny(pipe, {**GUIDED, **SIZE, "image": picture(0, 16, 16)})


@seeded
def mochi() -> Tiny:
    net = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=24, time_embed_dim=4, max_sequence_length=8,
    )  # fmt: skip
    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    vae = diffusers.AutoencoderKLMochi(latent_channels=12, layers_per_block=(1, 1, 1, 1, 1), **widths)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(**text(), transformer=roughen(net), vae=vae, scheduler=scheduler)
    return Tiny(pipe, {**GUIDED, "height": 32, "width": 32, "num_frames": 7})


def kandinsky(cls: Any, vae: Any, channels: int, visual_cond: bool = False, **more: Any) -> Tiny:
    net = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=channels, out_visual_dim=channels, in_text_dim=24, in_text_dim2=8, time_dim=16,
        patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(1, 1, 2),
        visual_cond=visual_cond, attention_type="regular",
    )  # fmt: skip
    scheduler, names = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), ("text_encoder", "tokenizer")
    missing = {f"{name}{number}": None for name in names for number in ("", "_2")}
    pipe = cls(**missing, transformer=roughen(net), vae=vae, scheduler=scheduler)
    call = {"guidance_scale": 3.0, **more}
    for k, sign in enumerate(("", "negative_")):
        call |= {f"{sign}prompt_embeds_qwen": embeds(k, 1, 8, 24), f"{sign}prompt_embeds_clip": embeds(k, 1, 8)}
        call[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 8], dtype=torch.int32)
    return Tiny(pipe, call)


@seeded
def kandinsky_video() -> Tiny:
    return kandinsky(diffusers.Kandinsky5T2VPipeline, hunyuan_vae(), 4, **SIZE)


@seeded
def kandinsky_image() -> Tiny:
    tiny = kandinsky(diffusers.Kandinsky5T2IPipeline, pipelines.vae(4), 4, height=32, width=32)
    tiny.pipe.resolutions = [(32, 32)]  # sizes are rounded to these
    return tiny


@seeded
def allegro() -> Tiny:
    net = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=4, sample_height=4, sample_frames=2, caption_channels=24,
    )  # fmt: skip
    blocks = {"down_block_types": ("AllegroDownBlock3D",) * 4, "up_block_types": ("AllegroUpBlock3D",) * 4}
    widths = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    vae: Any = diffusers.AutoencoderKLAllegro(**blocks, **widths, temporal_compression_ratio=4)
    vae.enable_tiling()  # it decodes in no other way
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    parts = {**text(), "transformer": roughen(net), "vae": vae, "scheduler": scheduler}
    size = {"height": 32, "width": 32, "num_frames": 8, "clean_caption": False}
    return Tiny(diffusers.AllegroPipeline(**parts), {**GUIDED, **size})


@seeded
def latte() -> Tiny:
    net = diffusers.LatteTransformer3DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=24,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    parts = {**text(), "transformer": roughen(net), "vae": pipelines.vae(), "scheduler": scheduler}
    guided = {"prompt": "a red fox", "negative_prompt": "blur", "guidance_scale": 3.0, "clean_caption": False}
    return Tiny(diffusers.LattePipeline(**parts), {**guided, "height": 8, "width": 8, "video_length": 2})


@seeded
def skyreels() -> Tiny:
    parts = wan_parts(transformer=wan_net(cls=diffusers.SkyReelsV2Transformer3DModel))
    return Tiny(diffusers.SkyReelsV2Pipeline(**parts), wan_call())


@seeded
def wan_vace() -> Tiny:
    more: dict[str, Any] = {"vace_layers": [0, 1], "vace_in_channels": 24, "scale": 0.3}
    pipe = diffusers.WanVACEPipeline(**wan_parts(transformer=wan_net(cls=diffusers.WanVACETransformer3DModel, **more)))
    mask = [frame.convert("L") for frame in film()]
    return Tiny(pipe, {**wan_call(), "video": film(), "mask": mask})


@seeded
def hunyuan_image() -> Tiny:
    return hunyuan_pictured(hunyuan_net(9, False, image_condition_type="latent_concat"), true_cfg_scale=3.0)


@seeded
def hunyuan_image_replaced() -> Tiny:
    return hunyuan_pictured(hunyuan_net(image_condition_type="token_replace"), guidance_scale=3.0)


def hunyuan_pictured(net: Any, **more: Any) -> Tiny:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_processor")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = {**dict.fromkeys(names), "vae": hunyuan_vae(), "scheduler": scheduler, "transformer": net}
    call = {**SIZE, "image": picture(0, 16, 16), **more}
    for k, sign in enumerate(("", "negative_") if "true_cfg_scale" in more else ("",)):
        call |= {f"{sign}prompt_embeds": embeds(k, 1, 8, 16), f"{sign}pooled_prompt_embeds": embeds(k, 1, 8)}
        call[f"{sign}prompt_attention_mask"] = torch.ones(1, 8)
    return Tiny(diffusers.HunyuanVideoImageToVideoPipeline(**parts), call)


def masked(width: int) -> dict[str, Any]:
    """Give embeddings of a text and of what is to be avoided, each with its mask."""
    call: dict[str, Any] = {"guidance_scale": 3.0}
    for k, sign in enumerate(("", "negative_")):
        call |= {f"{sign}prompt_embeds": embeds(k, 1, 8, width)}
        call |= {f"{sign}prompt_attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    return call


def sana_of(cls: Any) -> Tiny:
    net = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=24,
        mlp_ratio=2.5, sample_size=4, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    parts = {"text_encoder": None, "tokenizer": None, "vae": wan_vae(), "scheduler": scheduler}
    pipe = cls(**parts, transformer=roughen(net))
    size = {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False}
    return Tiny(pipe, {**masked(24), **size, "negative_prompt": None})


@seeded
def sana() -> Tiny:
    return sana_of(diffusers.SanaVideoPipeline)


@seeded
def easy_animate() -> Tiny:
    net = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=1, sample_width=4, sample_height=4, patch_size=2,
    )  # fmt: skip
    blocks = ["Spatial{}Block3D", *["SpatialTemporal{}Block3D"] * 2]
    vae = diffusers.AutoencoderKLMagvit(
        in_channels=3, out_channels=3, down_block_types=tuple(name.format("Down") for name in blocks),
        up_block_types=tuple(name.format("Up") for name in blocks), block_out_channels=(8,) * 3, latent_channels=4,
        layers_per_block=1, norm_num_groups=2, spatial_group_norm=False,
    )  # fmt: skip
    pipe = diffusers.EasyAnimatePipeline(vae, None, None, roughen(net), diffusers.FlowMatchEulerDiscreteScheduler())
    return Tiny(pipe, {**masked(24), **SIZE})


class Unchecked(torch.nn.Module):
    """Take the place of the checker of texts and videos that these pipelines ask for."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos_parts(channels: int = 4, **more: Any) -> dict[str, Any]:
    net = diffusers.CosmosTransformer3DModel(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 8, 8), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False, extra_pos_embed_type="learnable",
    )  # fmt: skip
    return {**text(), "transformer": roughen(net), "safety_checker": Unchecked(), **more}


@seeded
def cosmos() -> Tiny:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, scaling_factor=1.0,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    pipe = diffusers.CosmosTextToWorldPipeline(**cosmos_parts(vae=vae, scheduler=scheduler))
    return Tiny(pipe, {**GUIDED, **SIZE})


@seeded
def cosmos_2() -> Tiny:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipe = diffusers.Cosmos2TextToImagePipeline(**cosmos_parts(vae=wan_vae(), scheduler=scheduler))
    return Tiny(pipe, {**GUIDED, "height": 16, "width": 16})


def film() -> list[Any]:
    return [picture(k, 16, 16) for k in range(5)]


@seeded
def wan_experts_image() -> Tiny:
    parts = wan_parts(transformer=wan_net(12), transformer_2=wan_net(12))
    pipe = diffusers.WanImageToVideoPipeline(**parts, boundary_ratio=0.9)
    return Tiny(pipe, {**wan_call(), "image": picture(0, 16, 16), "guidance_scale_2": 2.0})


@seeded
def wan_video() -> Tiny:
    call = {key: value for key, value in wan_call().items() if key != "num_frames"}
    pipe = diffusers.WanVideoToVideoPipeline(**wan_parts(transformer=wan_net()))
    return Tiny(pipe, {**call, "video": film(), "strength": 1.0})


@seeded
def skyreels_image() -> Tiny:
    encoder = {"image_encoder": image_encoder(), "image_processor": image_processor()}
    net = wan_net(12, diffusers.SkyReelsV2Transformer3DModel, image_dim=4)
    pipe = diffusers.SkyReelsV2ImageToVideoPipeline(**wan_parts(transformer=net, **encoder))
    return Tiny(pipe, {**wan_call(), "image": picture(0, 16, 16)})


@seeded
def kandinsky_film() -> Tiny:
    size = {
        **SIZE,
        "num_frames": 17,
        "image": picture(0, 16, 16),
    }  # the first four latent frames are fitted to the fifth
    return kandinsky(diffusers.Kandinsky5I2VPipeline, hunyuan_vae(), 4, visual_cond=True, **size)


@seeded
def sana_image() -> Tiny:
    tiny = sana_of(diffusers.SanaImageToVideoPipeline)
    return Tiny(tiny.pipe, {**tiny.call, "image": picture(0, 32, 32)})


@seeded
def cog_video() -> Tiny:
    call = {**GUIDED, "height": 16, "width": 16, "video": film(), "strength": 1.0}
    return Tiny(diffusers.CogVideoXVideoToVideoPipeline(**cog_parts()), call)


@seeded
def cog_control() -> Tiny:
    call = {**GUIDED, "height": 16, "width": 16, "control_video": film()}
    return Tiny(diffusers.CogVideoXFunControlPipeline(**cog_parts(in_channels=8)), call)


@seeded
def cosmos_2_image() -> Tiny:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = cosmos_parts(5, vae=wan_vae(), scheduler=scheduler)
    return Tiny(diffusers.Cosmos2VideoToWorldPipeline(**parts), {**GUIDED, **SIZE, "image": picture(0, 16, 16)})


@seeded
def stable_video() -> Tiny:
    kinds = {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    kinds |= {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 8, "num_attention_heads": 2}
    net = diffusers.UNetSpatioTemporalConditionModel(
        in_channels=8, out_channels=4, **kinds, **sizes, cross_attention_dim=4, addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        sigma_max=700.0, sigma_min=0.002, timestep_type="continuous", use_karras_sigmas=True, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=image_encoder(224, 56), unet=roughen(net), scheduler=scheduler,
        feature_extractor=image_processor(224),
    )  # fmt: skip
    return Tiny(pipe, {**SIZE, "num_frames": 2, "image": picture(0, 16, 16), "max_guidance_scale": 2.5})


@seeded
def ltx_2() -> Tiny:
    """With a sound beside the pictures."""
    heads, deep, split = {"num_attention_heads": 2, "audio_num_attention_heads": 2}, {"num_layers": 1}, "split"
    net = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, **heads, **deep, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, caption_channels=24, rope_double_precision=False, rope_type=split,
    )  # fmt: skip
    each = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=24, text_proj_in_factor=3, rope_double_precision=False, rope_type=split,
        connector_rope_base_seq_len=32, rope_theta=10000.0, causal_temporal_positioning=False,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in each.items()},
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1, patch_size_t=1,
    )  # fmt: skip
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, resolution=32, latent_channels=2,
        mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    missing = dict.fromkeys(("text_encoder", "tokenizer", "processor", "prompt_enhancer", "duration_head"))
    pipe = diffusers.LTX2Pipeline(
        transformer=roughen(net), vae=vae, audio_vae=audio, vocoder=vocoder, connectors=connectors,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **missing,
    )  # fmt: skip
    texts = {"prompt_embeds": embeds(1, 1, 8, 72), "prompt_attention_mask": torch.ones(1, 8, dtype=torch.long)}
    size = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0}
    kinds = {f"{kind}{name}": value for kind in ("", "audio_") for name, value in LOUD.items()}
    return Tiny(pipe, {**texts, **size, **kinds, "use_cross_timestep": False})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Wan 2.1": wan,
    "Wan 2.2 two experts": wan_experts,
    "Wan 2.2 5B": wan_tokens,
    "Wan 2.2 5B image": wan_tokens_image,
    "Wan 2.1 image": wan_image,
    "LTX": ltx,
    "LTX image": ltx_image,
    "LTX Condition": ltx_condition,
    "HunyuanVideo": hunyuan,
    "HunyuanVideo true guidance": hunyuan_guided,
    "HunyuanVideo 1.5": hunyuan_15,
    "CogVideoX": cog,
    "CogVideoX image": cog_image,
    "Mochi": mochi,
    "Kandinsky 5 video": kandinsky_video,
    "Kandinsky 5 image": kandinsky_image,
    "Allegro": allegro,
    "Latte": latte,
    "SkyReels-V2": skyreels,
    "Wan VACE": wan_vace,
    "HunyuanVideo image": hunyuan_image,
    "HunyuanVideo image replaced": hunyuan_image_replaced,
    "Sana Video": sana,
    "EasyAnimate": easy_animate,
    "Cosmos": cosmos,
    "Cosmos 2": cosmos_2,
    "Cosmos 2 image": cosmos_2_image,
    "Wan 2.2 two experts image": wan_experts_image,
    "Wan video": wan_video,
    "SkyReels-V2 image": skyreels_image,
    "Kandinsky 5 video of an image": kandinsky_film,
    "Sana Video image": sana_image,
    "CogVideoX video": cog_video,
    "CogVideoX Fun control": cog_control,
    "Stable Video Diffusion": stable_video,
    "LTX 2": ltx_2,
}

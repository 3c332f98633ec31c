"""Pipelines that are a stage of several, and those that make one picture of another, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from support import pipelines
from support.families.parts import embeds, half, picture, roughen, seeded, words
from support.families.tiny import Tiny
from support.families.unets import euler, extra, pndm, stable, stable_xl
from support.pipelines import TABLE, clip, unet, vae

SIZE: dict[str, Any] = {"height": 16, "width": 16}
GUIDED: dict[str, Any] = {"prompt": "a red fox", "negative_prompt": "blur", "guidance_scale": 3.0}


def vq(levels: int = 2) -> Any:
    """Make an autoencoder with a book of vectors, which halves images at each level but the first."""
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    sizes = {"block_out_channels": (32,) * levels, "norm_num_groups": 2, "latent_channels": 4, "vq_embed_dim": 4}
    return diffusers.VQModel(
        down_block_types=down, up_block_types=up, **sizes, num_vq_embeddings=12, norm_type="spatial"
    )


def added(channels: int, outputs: int, **settings: Any) -> Any:
    """Make a U-Net whose attention adds keys and values of a text or an image to those of its pixels."""
    net = diffusers.UNet2DConditionModel(
        in_channels=channels, out_channels=outputs, sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), norm_num_groups=2,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", **settings,
    )  # fmt: skip
    return roughen(net)


def kandinsky_2(cls: Any, condition: str = "image", channels: int = 4, levels: int = 2) -> Any:
    encoded = {"addition_embed_type": condition, "encoder_hid_dim": 24, "encoder_hid_dim_type": "image_proj"}
    net = added(channels, 8, cross_attention_dim=24, **encoded)
    scheduler = diffusers.DDIMScheduler(**{**TABLE, "beta_schedule": "linear"})
    return cls(unet=net, scheduler=scheduler, movq=vq(levels))


def of_an_image() -> dict[str, Any]:
    return {"image_embeds": embeds(1, 1, 24), "negative_image_embeds": embeds(2, 1, 24), "guidance_scale": 3.0, **SIZE}


@seeded
def kandinsky_1_image() -> Tiny:
    """It adds noise to its image by a table of its own."""
    encoder = MultilingualCLIP(
        MCLIPConfig(numDims=24, transformerDimensions=24, hidden_size=24, intermediate_size=32, num_attention_heads=2,
                    num_hidden_layers=1, vocab_size=1005)
    )  # fmt: skip
    encoded = {"addition_embed_type": "text_image", "encoder_hid_dim": 24, "encoder_hid_dim_type": "text_image_proj"}
    net = added(4, 8, cross_attention_dim=24, addition_embed_type_num_heads=2, **encoded)
    scheduler = diffusers.DDIMScheduler(**{**TABLE, "beta_schedule": "linear"})
    pipe = diffusers.KandinskyImg2ImgPipeline(
        unet=net, scheduler=scheduler, movq=vq(), text_encoder=encoder, tokenizer=words()
    )
    return Tiny(pipe, {**of_an_image(), "prompt": "a red fox", "image": picture(0, 16, 16), "strength": 1.0})


@seeded
def kandinsky_2_decoder() -> Tiny:
    return Tiny(kandinsky_2(diffusers.KandinskyV22Pipeline), of_an_image())


@seeded
def kandinsky_2_image() -> Tiny:
    pipe = kandinsky_2(diffusers.KandinskyV22Img2ImgPipeline)
    return Tiny(pipe, {**of_an_image(), "image": picture(0, 16, 16), "strength": 1.0})


@seeded
def kandinsky_2_control() -> Tiny:
    pipe = kandinsky_2(diffusers.KandinskyV22ControlnetPipeline, "image_hint", 8, 4)
    return Tiny(pipe, {**of_an_image(), "hint": embeds(3, 1, 3, 64, 64).tanh()})


@seeded
def kandinsky_2_inpaint() -> Tiny:
    """It blends its image into the states, with the noise that it began with."""
    pipe = kandinsky_2(diffusers.KandinskyV22InpaintPipeline, channels=9)
    return Tiny(pipe, {**of_an_image(), "image": picture(0, 16, 16), "mask_image": half(16)})


@seeded
def kandinsky_3() -> Tiny:
    net = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(8, 16), cross_attention_dim=4, encoder_hid_dim=24,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2")
    text = {"text_encoder": pipelines.t5(), "tokenizer": pipelines.t5_tokenizer()}
    return Tiny(diffusers.Kandinsky3Pipeline(**text, unet=roughen(net), scheduler=scheduler, movq=vq()),
                {**GUIDED, **SIZE})  # fmt: skip


def floyd(cls: Any, channels: int = 3, thresholding: bool = False, **settings: Any) -> Any:
    net = added(
        channels, 6, cross_attention_dim=32, encoder_hid_dim=24, addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", act_fn="gelu", **settings,
    )  # fmt: skip
    cosine = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
    scheduler = diffusers.DDPMScheduler(**cosine, thresholding=thresholding, clip_sample=False)
    more = {"image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")}
    return cls(
        tokenizer=pipelines.t5_tokenizer(), text_encoder=pipelines.t5(), unet=net, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
        **(more if channels == 6 else {}),
    )  # fmt: skip


@seeded
def floyd_first() -> Tiny:
    return Tiny(floyd(diffusers.IFPipeline), {**GUIDED, "height": 8, "width": 8, "clean_caption": False})


@seeded
def floyd_inpaint() -> Tiny:
    call = {**GUIDED, "image": picture(), "mask_image": half(8), "strength": 1.0, "clean_caption": False}
    return Tiny(floyd(diffusers.IFInpaintingPipeline), call)


@seeded
def floyd_second() -> Tiny:
    pipe = floyd(diffusers.IFSuperResolutionPipeline, 6, class_embed_type="timestep", time_embedding_dim=8)
    call = {**GUIDED, "image": picture(), "height": 16, "width": 16, "noise_level": 50, "clean_caption": False}
    return Tiny(pipe, call)


@seeded
def upscale() -> Tiny:
    net = unet(in_channels=7, num_class_embeds=100)
    low = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    pipe = stable(diffusers.StableDiffusionUpscalePipeline, net, low_res_scheduler=low, max_noise_level=99)
    return Tiny(pipe, {**GUIDED, "image": picture(), "noise_level": 20})


@seeded
def upscale_latents() -> Tiny:
    """It reckons with its scheduler's noise levels; its prediction has a channel more, of a variance."""
    net = unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + 8)
    pipe = stable(diffusers.StableDiffusionLatentUpscalePipeline, net, scheduler=euler())
    return Tiny(pipe, {**GUIDED, "image": picture()})


def marigold(cls: Any, **settings: Any) -> Tiny:
    table = {**TABLE, "prediction_type": "v_prediction"}
    pipe = cls(
        vae=vae(), text_encoder=clip(), tokenizer=words(), unet=roughen(unet(in_channels=8)),
        scheduler=diffusers.DDIMScheduler(**table), default_denoising_steps=4, default_processing_resolution=0,
        **settings,
    )  # fmt: skip
    return Tiny(pipe, {"image": picture()})


@seeded
def marigold_depth() -> Tiny:
    return marigold(diffusers.MarigoldDepthPipeline, prediction_type="depth")


@seeded
def marigold_normals() -> Tiny:
    return marigold(diffusers.MarigoldNormalsPipeline, prediction_type="normals")


@seeded
def marigold_intrinsics() -> Tiny:
    targets = {"target_names": ["albedo", "roughness"], "albedo": {"prediction_space": "srgb", "up_to_scale": False},
               "roughness": {"prediction_space": "linear", "up_to_scale": False}}  # fmt: skip
    net = unet(in_channels=12, out_channels=8)
    table = {**TABLE, "prediction_type": "v_prediction"}
    pipe = diffusers.MarigoldIntrinsicsPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=words(), unet=roughen(net), target_properties=targets,
        scheduler=diffusers.DDIMScheduler(**table), prediction_type="intrinsics", default_denoising_steps=4,
        default_processing_resolution=0,
    )  # fmt: skip
    return Tiny(pipe, {"image": picture()})


@seeded
def instruct_pix2pix_xl() -> Tiny:
    net = unet(20, in_channels=8, **extra(6))
    pipe = stable_xl(diffusers.StableDiffusionXLInstructPix2PixPipeline, net)
    return Tiny(pipe, {**GUIDED, "image": picture(), "image_guidance_scale": 1.5, "height": 8, "width": 8})


def adapter() -> Any:
    return diffusers.T2IAdapter(in_channels=3, channels=[4, 8], num_res_blocks=1, downscale_factor=2)


@seeded
def adapted() -> Tiny:
    pipe = stable(diffusers.StableDiffusionAdapterPipeline, adapter=adapter())
    return Tiny(pipe, {**GUIDED, "image": picture(), "height": 8, "width": 8})


@seeded
def adapted_xl() -> Tiny:
    pipe = stable_xl(diffusers.StableDiffusionXLAdapterPipeline, adapter=adapter())
    return Tiny(pipe, {**GUIDED, "image": picture(), "height": 8, "width": 8})


@seeded
def grounded() -> Tiny:
    pipe = stable(diffusers.StableDiffusionGLIGENPipeline, unet(attention_type="gated"))
    where = {"gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.9]], "gligen_scheduled_sampling_beta": 1.0}
    return Tiny(pipe, {**GUIDED, **where, "height": 8, "width": 8})


@seeded
def image_variation() -> Tiny:
    encoder = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      projection_dim=8, image_size=8, patch_size=4)
    )  # fmt: skip
    processor = transformers.CLIPImageProcessor(crop_size={"height": 8, "width": 8}, size={"shortest_edge": 8})
    pipe = diffusers.StableDiffusionImageVariationPipeline(
        vae=vae(), image_encoder=encoder, unet=roughen(unet()), scheduler=pndm(), safety_checker=None,
        feature_extractor=processor, requires_safety_checker=False,
    )  # fmt: skip
    return Tiny(pipe, {"image": picture(), "guidance_scale": 3.0, "height": 8, "width": 8})


@seeded
def depth_to_image() -> Tiny:
    pipe = diffusers.StableDiffusionDepth2ImgPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=words(), unet=roughen(unet(in_channels=5)), scheduler=pndm(),
        depth_estimator=None, feature_extractor=None,
    )  # fmt: skip
    return Tiny(pipe, {**GUIDED, "image": picture(), "depth_map": embeds(1, 1, 8, 8), "strength": 1.0})


@seeded
def color_and_depth() -> Tiny:
    """Its pictures have channels for depth, too."""
    colors = vae(in_channels=6, out_channels=6)
    pipe = stable(diffusers.StableDiffusionLDM3DPipeline, vae=colors, image_encoder=None)
    return Tiny(pipe, {**GUIDED, "height": 8, "width": 8, "output_type": "np"})


@seeded
def perturbed_attention_xl() -> Tiny:
    pipe = stable_xl(diffusers.StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"])
    return Tiny(pipe, {**GUIDED, "pag_scale": 3.0, "height": 8, "width": 8})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Kandinsky 2.1 image to image": kandinsky_1_image,
    "Kandinsky 2.2": kandinsky_2_decoder,
    "Kandinsky 2.2 image to image": kandinsky_2_image,
    "Kandinsky 2.2 ControlNet": kandinsky_2_control,
    "Kandinsky 2.2 inpainting": kandinsky_2_inpaint,
    "Kandinsky 3": kandinsky_3,
    "DeepFloyd IF": floyd_first,
    "DeepFloyd IF inpainting": floyd_inpaint,
    "DeepFloyd IF super-resolution": floyd_second,
    "Stable Diffusion upscaler": upscale,
    "Stable Diffusion latent upscaler": upscale_latents,
    "Marigold depth": marigold_depth,
    "Marigold normals": marigold_normals,
    "Marigold intrinsics": marigold_intrinsics,
    "InstructPix2Pix SDXL": instruct_pix2pix_xl,
    "T2I-Adapter": adapted,
    "T2I-Adapter SDXL": adapted_xl,
    "GLIGEN": grounded,
    "Stable Diffusion image variation": image_variation,
    "Stable Diffusion depth to image": depth_to_image,
    "Stable Diffusion of color and depth": color_and_depth,
    "PAG SDXL": perturbed_attention_xl,
}

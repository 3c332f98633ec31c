"""Pipelines of sounds, made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

from support import pipelines
from support.families.parts import embeds, roughen, seeded
from support.families.tiny import Tiny
from support.pipelines import TABLE, vae

TEXT: dict[str, Any] = {"prompt": "a red fox", "negative_prompt": "noise", "guidance_scale": 3.0}


def oobleck(channels: int) -> Any:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=channels, decoder_input_channels=channels,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip


@seeded
def stable_audio() -> Tiny:
    net = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=3, num_layers=2, attention_head_dim=4, num_key_value_attention_heads=2,
        num_attention_heads=4, out_channels=3, cross_attention_dim=4, time_proj_dim=8, global_states_input_dim=8,
        cross_attention_input_dim=4,
    )  # fmt: skip
    autoencoder = oobleck(3)
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=24, conditioning_dim=4, min_value=0, max_value=32
    )
    tokenizer = pipelines.t5_tokenizer()
    tokenizer.model_max_length = 8
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0)
    pipe = diffusers.StableAudioPipeline(
        vae=autoencoder, text_encoder=pipelines.t5(), projection_model=projection, tokenizer=tokenizer,
        transformer=roughen(net), scheduler=scheduler,
    )  # fmt: skip
    return Tiny(pipe, {**TEXT, "audio_end_in_s": 2.0})


def vocoder() -> Any:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], normalize_before=False, sampling_rate=64,
    )  # fmt: skip
    return transformers.SpeechT5HifiGan(config)


@seeded
def audio_2() -> Tiny:
    net = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=8, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(8, 16),
    )  # fmt: skip
    sizes = {"n_embd": 8, "n_head": 1, "n_layer": 1, "vocab_size": 20, "n_positions": 20}
    language = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    pipe = diffusers.AudioLDM2Pipeline(
        vae=vae(in_channels=1, out_channels=1), text_encoder=None, text_encoder_2=pipelines.t5(), projection_model=None,
        language_model=language, tokenizer=None, tokenizer_2=None, feature_extractor=None, unet=roughen(net),
        scheduler=diffusers.DDIMScheduler(**TABLE), vocoder=vocoder(),
    )  # fmt: skip
    given = {
        "prompt_embeds": embeds(1, 1, 6, 16), "negative_prompt_embeds": embeds(2, 1, 6, 16),
        "generated_prompt_embeds": embeds(3, 1, 8, 16), "negative_generated_prompt_embeds": embeds(4, 1, 8, 16),
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
        "negative_attention_mask": torch.ones(1, 6, dtype=torch.long),
    }  # fmt: skip
    return Tiny(pipe, {**given, "guidance_scale": 3.0, "audio_length_in_s": 0.5})


@seeded
def ace_step() -> Tiny:
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    net = diffusers.AceStepTransformer1DModel(**sizes, num_hidden_layers=1, in_channels=12, audio_acoustic_hidden_dim=4)
    layers = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
    conditions = AceStepConditionEncoder(**sizes, **layers, text_hidden_dim=8, timbre_hidden_dim=4)
    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    autoencoder = oobleck(4)
    pipe = diffusers.AceStepPipeline(
        vae=autoencoder, text_encoder=transformers.Qwen3Model(config), tokenizer=pipelines.t5_tokenizer(),
        transformer=roughen(net), condition_encoder=roughen(conditions),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )  # fmt: skip
    return Tiny(pipe, {"prompt": "a red fox", "audio_duration": 8.0, "guidance_scale": 3.0})


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "Stable Audio": stable_audio,
    "AudioLDM 2": audio_2,
}

"""Tiny pipelines of `diffusers`, of random weights; their tokenizers are written here too."""

import json
import string
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from diffusers.pipelines.latent_diffusion import LDMBertModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig

LENGTH = 9  # tokens that the tokenizers take
TABLE: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def clip_tokenizer(folder: Path) -> Any:
    letters = [*string.ascii_lowercase, ",", "!"]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁," + string.ascii_lowercase)]
    own = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    own.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    return transformers.T5TokenizerFast(tokenizer_object=own, **settings)


def bert_tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *(f"##{c}" for c in "abcdefghij")]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


def clip(cls: Any = transformers.CLIPTextModel, width: int = 8, projection: int = 8) -> Any:
    settings = {"vocab_size": 58, "bos_token_id": 56, "eos_token_id": 57, "pad_token_id": 57}
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        **settings, **sizes, projection_dim=projection, max_position_embeddings=LENGTH, initializer_factor=5.0
    )
    return cls(config).eval()


def t5() -> Any:
    sizes = {"vocab_size": 40, "d_model": 24, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def bert() -> Any:
    sizes = {"vocab_size": 50, "encoder_layers": 2, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
    return LDMBertModel(LDMBertConfig(**sizes, head_dim=4, d_model=8, init_std=0.5)).eval()


def vae(levels: int = 2, **settings: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": (4,) * levels, "norm_num_groups": 2, "latent_channels": 4}
    return diffusers.AutoencoderKL(**blocks, **sizes, **settings).eval()


def unet(width: int = 8, **settings: Any) -> Any:
    sizes = {"sample_size": 4, "block_out_channels": (4, 8), "layers_per_block": 1, "attention_head_dim": 2}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(
        **sizes, **blocks, norm_num_groups=2, cross_attention_dim=width, **settings
    ).eval()


def stable_diffusion(folder: Path, **settings: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae(), clip(), clip_tokenizer(folder / "words"), unet(), diffusers.DDIMScheduler(**TABLE, **settings),
        None, None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path, first: bool = True, **settings: Any) -> Any:
    tokenizer, second = clip_tokenizer(folder / "words"), clip(transformers.CLIPTextModelWithProjection, 12)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
    net = unet(20 if first else 12, **more, projection_class_embeddings_input_dim=2 * 6 + 8)
    means = {"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [0.5, 0.6, 0.7, 0.8], "force_upcast": True}
    return diffusers.StableDiffusionXLPipeline(
        vae(**means), clip() if first else None, second, tokenizer if first else None, tokenizer, net,
        diffusers.DDIMScheduler(**TABLE), force_zeros_for_empty_prompt=first, add_watermarker=False,
    )  # fmt: skip


def latent_diffusion(folder: Path) -> Any:
    scheduler = diffusers.DDIMScheduler(**TABLE)
    return diffusers.LDMTextToImagePipeline(vae(4), bert(), bert_tokenizer(folder / "words"), unet(), scheduler)


def dit(folder: Path) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    net = diffusers.DiTTransformer2DModel(**sizes, sample_size=4, patch_size=2, num_embeds_ada_norm=1000)
    for parameter in net.parameters():  # its last layers are zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return diffusers.DiTPipeline(net.eval(), vae(), diffusers.DDIMScheduler(clip_sample=False))


def stable_diffusion_3(folder: Path, third: bool = True) -> Any:
    tokenizer, cls = clip_tokenizer(folder / "words"), transformers.CLIPTextModelWithProjection
    sizes = {"num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4}
    net = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, **sizes, joint_attention_dim=24, caption_projection_dim=8,
        pooled_projection_dim=20, pos_embed_max_size=6,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        net.eval(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae(shift_factor=0.1),
        clip(cls), tokenizer, clip(cls, 12, 12), tokenizer, t5() if third else None, t5_tokenizer() if third else None,
    )  # fmt: skip


def flux(folder: Path, distilled: bool = True) -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    net = diffusers.FluxTransformer2DModel(
        in_channels=16, **sizes, joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_image_seq_len": 2, "max_image_seq_len": 30} if distilled else {}
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(**shift), vae(shift_factor=0.1),
        clip(), clip_tokenizer(folder / "words"), t5(), t5_tokenizer(), net.eval(),
    )  # fmt: skip

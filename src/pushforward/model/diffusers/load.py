"""Models in the format of `diffusers`: a folder or a name on the hub.

A network does not say what it predicts, or for which diffusion: its scheduler does (`model.diffusers.schedules`). A
model of latents brings an autoencoder, one that is told in words what to draw its text encoders
(`model.diffusers.text`). No pipeline of `diffusers` is run: what each tells its network is written in
`model.diffusers.networks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian
from pushforward.model.diffusers import folders
from pushforward.model.diffusers.folders import CONFIG, ENCODERS, TOKENIZERS, Folder
from pushforward.model.diffusers.networks import Decoder, Dit, Encoder, Flux, Rescaled, StableDiffusion3, TextUnet, Unet
from pushforward.model.diffusers.schedules import Settings, read_schedule
from pushforward.model.diffusers.text import Text, Tower, clip_and_t5, joint, last, penultimate
from pushforward.model.model import Model, read_json
from pushforward.model.network import Network

__all__ = ["diffusers_model"]

FLUX_SIZE = 128  # height and width of its latents, which its configuration does not say
BERT_TOKENS, SD3_TOKENS, FLUX_TOKENS = 77, 256, 512  # of a prompt, for BERT and for T5


def diffusers_model(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    size: int | tuple[int, int] | None = None,
    embedded_guidance: float = 3.5,
) -> Model:
    """A model from a folder or a hub repository of `diffusers`.

    It may be a pipeline (`model_index.json`) around one of these networks, or the folder of a UNet2DModel with
    `scheduler_config.json` in it or in `scheduler/`:

    - UNet2DModel: images, or latents of a VQModel or AutoencoderKL;
    - UNet2DConditionModel: Stable Diffusion 1, 2 and XL, and text-to-image latent diffusion;
    - DiTTransformer2DModel: images by class;
    - SD3Transformer2DModel, FluxTransformer2DModel: text to image by flow matching.

    Args:
        source: a folder, or a name on the hub, `owner/model`.
        device: where the networks go.
        dtype: of their weights, by default float32; states keep a dtype of their own. An autoencoder that overflows in
            float16 (`force_upcast`) stays in float32.
        revision: branch, tag or commit on the hub.
        size: of the images in pixels, or their height and width; by default what the configuration says.
        embedded_guidance: told to a Flux network that was distilled from guided ones, besides the guidance of
            `Model.given`.

    Raises:
        PushforwardError: `diffusers` or `transformers` is not installed; the source is not there, lacks a part, is
            damaged, or is a model of another kind; it has no images of this size.
    """
    local = Path(source).expanduser()
    folder = folders.find(local if local.is_dir() else folders.download(str(source), revision))
    config = read_json(folder.scheduler)
    place = folder.place(folder.network)
    settings, kind = read_json(place / CONFIG), folders.class_of(place)
    _check_kind(settings, kind, folder, place)
    reader = _KINDS[kind]
    text = None if reader.text is None else reader.text(folder, settings, dtype).to(device)
    _check_pipeline(folder, kind)
    vae = None if folder.decoder is None else _autoencoder(folder.place(folder.decoder), dtype).to(device)
    network = folders.load_network(place, (kind,), dtype).to(device)
    settings = network.config
    factor = 1 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
    patch = 2 if reader.packed else settings.get("patch_size") or 1
    height, width = _field({"sample_size": FLUX_SIZE, **settings}, place, size, factor, patch)
    schedule = read_schedule(config, folder.scheduler, height * width // patch**2)
    varied = reader.classes is not None or "learned" in str(config.get("variance_type"))
    channels = _channels(settings, source, reader.packed, varied)
    module = reader.module(network, (height * factor, width * factor), embedded_guidance).eval()
    units = schedule.gain, schedule.scale, schedule.shift
    if units != (1, 1, 0):
        module = Rescaled(module, *units)
    classes = _numbered(settings) if reader.classes is None else reader.classes(folder.index, settings)
    return Model(
        local.name if local.is_dir() else str(source),
        schedule.process,
        Network(
            module,
            unconditional=torch.tensor([len(classes)]) if reader.classes is not None else None,
            **schedule.network,
        ),
        (channels, height, width),
        schedule.reference or Gaussian(0.25 if vae is None else 1.0),  # latents are scaled to unit variance
        classes,
        None if vae is None else Decoder(vae),
        {key: value for key, value in schedule.grid.items() if key not in reader.not_its_grid},
        {"source": str(source), "scheduler": config["_class_name"]},
        text=text,
        encoder=None if vae is None else Encoder(vae),
        image_shape=None if vae is None else (vae.config["out_channels"], height * factor, width * factor),
        solvers=schedule.solvers,
    )


# -- networks and what they are told --------------------------------------------------------------------------------


def _text_unet(network: Any, pixels: tuple[int, int], _: float) -> nn.Module:
    return TextUnet(network, (*pixels, 0, 0, *pixels) if network.config["addition_embed_type"] else ())


def _towers(folder: Folder, dtype: torch.dtype | None, *parts: tuple[str, str, str, int | None]) -> list[Tower]:
    """Text encoders, given each one's part, its tokenizer's, its class and its number of tokens."""
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


def _numbered(settings: Settings) -> tuple[str, ...]:
    """Names of the classes of a network that has a table of them."""
    if settings.get("class_embed_type") is not None:
        return ()
    return tuple(map(str, range(settings.get("num_class_embeds") or 0)))


def _named(index: Settings, settings: Settings) -> tuple[str, ...]:
    """The first name of each class, where the pipeline has names."""
    names = index.get("id2label") or {}
    count = settings["num_embeds_ada_norm"]
    return tuple(str(names.get(str(k), k)).split(",")[0].strip() for k in range(count))


@dataclass(frozen=True)
class _Kind:
    """How networks of one class are read.

    Args:
        module: made of the network, the images' height and width, and the embedded guidance.
        text: the encoder of prompts, made of the pipeline and the network's settings.
        classes: names of the labels, after which comes one that says nothing.
        pipelines: of `diffusers` that draw with such a network as it is read here, and with nothing else.
        packed: four neighbours are the channels of one token.
        not_its_grid: what the pipeline has otherwise than the scheduler by itself.
    """

    module: Callable[[Any, tuple[int, int], float], nn.Module]
    pipelines: tuple[str, ...]
    text: Callable[[Folder, Settings, torch.dtype | None], Text] | None = None
    classes: Callable[[Settings, Settings], tuple[str, ...]] | None = None
    packed: bool = False
    not_its_grid: tuple[str, ...] = ()


def _tasks(name: str) -> tuple[str, ...]:
    """The pipelines that begin at noise, at an image, and at one with a hole: the network is the same."""
    return tuple(f"{name}{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))


_DIT = _Kind(lambda network, *_: Dit(network), ("DiTPipeline",), classes=_named)
_KINDS: dict[str, _Kind] = {
    "UNet2DModel": _Kind(
        lambda network, *_: Unet(network),
        ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline", "KarrasVePipeline", "LDMPipeline"),
    ),
    "UNet2DConditionModel": _Kind(
        _text_unet,
        (*_tasks("StableDiffusion"), *_tasks("StableDiffusionXL"), "LDMTextToImagePipeline", "CycleDiffusionPipeline"),
        _unet_text,
    ),
    "DiTTransformer2DModel": _DIT,
    "Transformer2DModel": _DIT,
    "SD3Transformer2DModel": _Kind(
        lambda network, *_: StableDiffusion3(network), _tasks("StableDiffusion3"), _sd3_text
    ),
    "FluxTransformer2DModel": _Kind(
        lambda network, _, guidance: Flux(network, guidance),
        _tasks("Flux"),
        _flux_text,
        packed=True,
        not_its_grid=("last",),
    ),
}
_WITHOUT_EFFECT = ("safety_checker", "feature_extractor")  # parts that judge a finished image
_UNREAD: dict[
    str, dict[str, tuple[str | None, ...]]
] = {  # settings by which a network is told of other things than a prompt or a class, and what may stand there
    "UNet2DConditionModel": {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
        "addition_embed_type": (None, "text_time"),
    },
    "Transformer2DModel": {"norm_type": ("ada_norm_zero",)},
}


def _check_kind(settings: Settings, kind: str, folder: Folder, place: Path) -> None:
    if kind not in _KINDS:
        raise PushforwardError(f"{place / CONFIG} describes a {kind}; only {', '.join(_KINDS)} can be read here.")
    if not folder.index and kind != "UNet2DModel":
        raise PushforwardError(
            f"{folder.root} is a {kind} alone; give the folder of its whole pipeline, with model_index.json."
        )
    _check_parts(folder, kind)
    for key, known in _UNREAD.get(kind, {}).items():
        if settings.get(key) not in known:
            raise PushforwardError(
                f"{place / CONFIG} has {key} {settings.get(key)!r}; such a {kind} cannot be read here."
            )
    if folder.index.get("requires_aesthetics_score"):
        raise PushforwardError(
            f"{folder.root} is a refiner, told of scores besides prompts; give the model whose images it refines."
        )


def _check_parts(folder: Folder, kind: str) -> None:
    """Raise if the pipeline has parts that are not run here."""
    reader = _KINDS[kind]
    run = {"scheduler", folder.network, folder.decoder, *_WITHOUT_EFFECT}
    run |= {*ENCODERS, *TOKENIZERS} if reader.text is not None else set()
    others = [name for name in folder.index if folder.has(name) and name not in run]
    if others:
        parts = ", ".join(f"{name} ({folder.index[name][1]})" for name in others)
        raise PushforwardError(
            f"{folder.root} draws with parts that are not run here, {parts}; its images would be others without them."
        )


def _check_pipeline(folder: Folder, kind: str) -> None:
    """Raise unless the pipeline draws with these parts as it is done here."""
    reader, pipeline = _KINDS[kind], folder.index.get("_class_name")
    if folder.index and pipeline not in reader.pipelines:
        known = ", ".join(reader.pipelines)
        raise PushforwardError(
            f"{folder.root} is a {pipeline}; of a {kind}, only the pipelines {known} are drawn here as they draw."
        )


def _channels(settings: Settings, source: str | Path, packed: bool, varied: bool) -> int:
    """Of what is denoised; a variance may follow it in the answer."""
    channels, given = settings["in_channels"], settings.get("out_channels") or settings["in_channels"]
    if given not in ((channels, 2 * channels) if varied else (channels,)):
        raise PushforwardError(
            f"The network of {source} takes {channels} channels and gives {given}; only networks that need no other "
            "image besides the noisy one can be read."
        )
    return channels // 4 if packed else channels


def _field(
    settings: Settings, place: Path, size: int | tuple[int, int] | None, factor: int, patch: int
) -> tuple[int, int]:
    """Height and width of what is denoised."""
    sample = settings["sample_size"]
    if size is not None:
        pixels = (size, size) if isinstance(size, int) else size
        if any(n < 1 or n % (factor * patch) for n in pixels):
            raise PushforwardError(
                f"Images of this model have sides that are multiples of {factor * patch} pixels; got {size}."
            )
        height, width = (n // factor for n in pixels)
    elif sample is None:
        raise PushforwardError(
            f"{place / CONFIG} does not say its sample_size; add it, the height and width of what it denoises."
        )
    else:
        height, width = (sample, sample) if isinstance(sample, int) else sample
    most = settings.get("pos_embed_max_size")
    if most and max(height, width) > most * patch:
        raise PushforwardError(f"Images of this model have no side above {most * patch * factor} pixels; got {size}.")
    return height, width


def _autoencoder(place: Path, dtype: torch.dtype | None) -> Any:
    """In float32 where it overflows in float16."""
    kl = folders.class_of(place) == "AutoencoderKL"
    if dtype == torch.float16 and kl and read_json(place / CONFIG).get("force_upcast", True):
        dtype = torch.float32
    return folders.load_network(place, ("VQModel", "AutoencoderKL"), dtype)

"""Folders and hub repositories in the format of `diffusers`: their parts, and the networks in them.

A pipeline is a `model_index.json`, which names its parts and their classes, and a folder for each part. Networks are
made by their own packages, from files on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.package import MISSING, import_diffusers, reason
from pushforward.model.diffusers.tables import Settings
from pushforward.model.storage import read_json

__all__ = ["CONFIG", "Folder", "download", "find", "load_encoder", "load_network", "load_tokenizer"]

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
NETWORKS, DECODERS = ("unet", "transformer"), ("vqvae", "vae")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "bert")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
OF_DIFFUSERS = ("diffusion_pytorch_model", "diffusion_pytorch_model")  # .safetensors, .bin
OF_TRANSFORMERS = ("model", "pytorch_model")
VARIANTS = (
    "fp16",
    "bf16",
)  # of weights, `stem.fp16.safetensors`, that are taken for the plain ones where there are none
MISSING_TEXT = "Models that read prompts need the package transformers: pip install 'pushforward[diffusers]'."
FAULTS = (  # what damaged files raise
    ArithmeticError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    SafetensorError, UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A model on disk.

    Args:
        root: the folder.
        index: content of a pipeline's index; empty for a network with its scheduler.
        network: name of the part that denoises.
    """

    root: Path
    index: Settings
    network: str = ""

    @property
    def decoder(self) -> str | None:
        """The part that turns latents into images, if there is one."""
        return next((name for name in DECODERS if self.has(name)), None)

    @property
    def scheduler(self) -> Path:
        """The scheduler's file."""
        return self.place("scheduler", SCHEDULER) / SCHEDULER

    def has(self, part: str) -> bool:
        """Say whether the pipeline has a part: `[library, class]`, or `[null, null]` where it is left out."""
        return isinstance(self.index.get(part), list) and None not in self.index[part]

    def place(self, part: str, file: str = CONFIG) -> Path:
        """Find the folder of a part's configuration: its own, or the root, as in old repositories.

        Raises:
            PushforwardError: it is in neither.
        """
        for place in (self.root / part, self.root):
            if (place / file).is_file():
                return place
        raise PushforwardError(f"{self.root} has no {part}/{file}; fetch the model again.")


def find(root: Path) -> Folder:
    """Find the model in a folder.

    Raises:
        PushforwardError: there is none, or none of its parts denoises.
    """
    if (root / INDEX).is_file():
        index = read_json(root / INDEX)
        network = next((name for name in NETWORKS if Folder(root, index).has(name)), None)
        if network is None:
            raise PushforwardError(
                f"The pipeline in {root}, a {index.get('_class_name')}, has no {' or '.join(NETWORKS)} to denoise with."
            )
        return Folder(root, index, network)
    if (root / CONFIG).is_file():
        return Folder(root, {})
    raise PushforwardError(f"{root} holds no model: neither {INDEX} (a pipeline) nor {CONFIG} (a network).")


def download(source: str, revision: str | None) -> Path:
    """Download a hub repository's configurations, tokenizers and weights to a folder of the hub's cache.

    Raises:
        PushforwardError: there is no such repository or revision or no connection, or `huggingface_hub` is missing.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise PushforwardError(MISSING) from error

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            at = f" at revision {revision!r}" if revision else ""
            raise PushforwardError(
                f"No folder {source!r}, and the hub gives no model of that name{at}: {reason(error)}."
            ) from error

    stems = {"": OF_DIFFUSERS[0], **{f"{name}/": OF_DIFFUSERS[0] for name in (*NETWORKS, *DECODERS)}}
    stems |= {f"{name}/": OF_TRANSFORMERS[0] for name in ENCODERS}
    wanted = [INDEX, CONFIG, SCHEDULER, f"scheduler/{SCHEDULER}"]
    for place, stem in stems.items():
        wanted += [f"{place}{CONFIG}", f"{place}{stem}.safetensors", f"{place}{stem}.safetensors.index.json"]
        wanted += [f"{place}{stem}-*-of-*.safetensors"]
    wanted += [f"{name}/*.{end}" for name in TOKENIZERS for end in ("json", "txt", "model")]
    root = fetch(wanted)
    folder = find(root)
    networks = {folder.place(name) for name in (folder.network, folder.decoder) if name is not None}
    encoders = {folder.place(name) for name in ENCODERS if folder.has(name)}
    parts = [(place, OF_DIFFUSERS) for place in networks] + [(place, OF_TRANSFORMERS) for place in encoders]
    for asked in (_pickled, _variant):  # what is still missing
        lacking = [(place, stems) for place, stems in parts if None not in _variants(place, stems)]
        more = [f"{place.relative_to(root)}/{name}" for place, stems in lacking for name in asked(stems)]
        root = fetch([*wanted, *more]) if more else root
    return root


def _pickled(stems: tuple[str, str]) -> list[str]:
    return [f"{stems[1]}{end}" for end in (".bin.index.json", "-*-of-*.bin", ".bin")]


def _variant(stems: tuple[str, str]) -> list[str]:
    ends = (".{}.safetensors", ".safetensors.index.{}.json", ".{}-*-of-*.safetensors")
    return [stems[0] + end.format(variant) for variant in VARIANTS for end in ends]


def load_network(folder: Path, classes: Sequence[str], dtype: torch.dtype | None) -> Any:
    """Load a network of one of several classes of `diffusers` from its part's folder.

    Raises:
        PushforwardError: it is of another class, or files are missing or damaged.
    """
    name = class_of(folder)
    if name not in classes:
        raise PushforwardError(f"{folder / CONFIG} describes a {name}; only {' or '.join(classes)} can be read here.")
    cls = getattr(import_diffusers(), name, None)
    if cls is None:
        raise PushforwardError(
            f"{folder / CONFIG} describes a {name}, which this version of diffusers lacks; install a newer one."
        )
    return _pretrained(cls, folder, OF_DIFFUSERS, dtype)


def class_of(folder: Path) -> str:
    """Read the class that a network's configuration names."""
    return str(read_json(folder / CONFIG).get("_class_name"))


def load_encoder(folder: Folder, part: str, wanted: str, dtype: torch.dtype | None) -> Any:
    """Load a text encoder of a pipeline.

    Args:
        folder: the pipeline.
        part: the encoder's name there.
        wanted: the class that it must have.
        dtype: dtype of its weights.

    Raises:
        PushforwardError: `transformers` is not installed; the pipeline has no such part, or it has another class; or
            files are missing or damaged.
    """
    transformers = import_transformers()
    _check(folder, part, (wanted,))
    if wanted == "LDMBertModel":
        transformers = import_diffusers().pipelines.latent_diffusion
    return _pretrained(getattr(transformers, wanted), folder.place(part), OF_TRANSFORMERS, dtype)


def load_tokenizer(folder: Folder, part: str) -> Any:
    """Load a tokenizer of a pipeline.

    Raises:
        PushforwardError: for the reasons of `load_encoder`.
    """
    transformers = import_transformers()
    _check(folder, part)
    place, name = folder.root / part, folder.index[part][1]
    if not place.is_dir():
        raise PushforwardError(f"{folder.root} has no {part}; fetch the model again.")
    try:
        return getattr(transformers, name).from_pretrained(place, local_files_only=True)
    except FAULTS as error:
        raise PushforwardError(
            f"The {name} in {place} cannot be read: {reason(error)}; fetch the model again."
        ) from error


def import_transformers() -> Any:
    """Import the package `transformers`.

    Raises:
        PushforwardError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise PushforwardError(MISSING_TEXT) from error
    return transformers


def _check(folder: Folder, part: str, classes: Sequence[str] = ()) -> None:
    kind = folder.index.get("_class_name", "network alone")
    if not folder.has(part):
        raise PushforwardError(
            f"The model in {folder.root}, a {kind}, has no {part} to read its prompts; fetch the model again."
        )
    name = folder.index[part][1]
    if classes and name not in classes:
        raise PushforwardError(
            f"The {part} of {folder.root} is a {name}; for a {kind}, only {' or '.join(classes)} can be read."
        )


def _weights(folder: Path, stems: tuple[str, str]) -> tuple[bool, str | None]:
    """Say whether a network's weights are `.safetensors` (or `.bin`), and of which variant, `None` for the plain ones.

    Raises:
        PushforwardError: there are no weights, or several variants of which none is known.
    """
    found = _variants(folder, stems)
    for variant in (None, *VARIANTS, *(found if len(found) == 1 else ())):
        if variant in found:
            return found[variant], variant
    if found:
        names = ", ".join(sorted(map(str, found)))
        raise PushforwardError(
            f"{folder} has weights of the variants {names} and no plain ones; leave one variant there."
        )
    raise PushforwardError(f"{folder} lacks its weights, {stems[0]}.safetensors; fetch the model again.")


def _variants(folder: Path, stems: tuple[str, str]) -> dict[str | None, bool]:
    """List the variants of a network's weights, whole or in indexed pieces, and whether each is `.safetensors`."""
    found: dict[str | None, bool] = {}
    for stem, end, safe in ((stems[1], "bin", False), (stems[0], "safetensors", True)):
        name = re.compile(rf"{stem}(\.[^.]+)?\.{end}|{stem}\.{end}\.index(\.[^.]+)?\.json")
        matches = [name.fullmatch(file.name) for file in folder.glob(f"{stem}*")]
        found |= {(match[1] or match[2] or "")[1:] or None: safe for match in matches if match is not None}
    return found


def _pretrained(cls: Any, folder: Path, stems: tuple[str, str], dtype: torch.dtype | None) -> Any:
    safe, variant = _weights(folder, stems)
    try:
        network, report = cls.from_pretrained(
            folder,
            torch_dtype=dtype or torch.float32,
            use_safetensors=safe,
            variant=variant,
            local_files_only=True,
            output_loading_info=True,
        )
    except FAULTS as error:
        raise PushforwardError(
            f"The {cls.__name__} in {folder} cannot be read: {reason(error)}; fetch the model again."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise PushforwardError(
            f"The weights in {folder} lack {len(missing)} of the network's tensors, among them {missing[0]}; "
            "fetch the model again."
        )
    return network.eval().requires_grad_(False)

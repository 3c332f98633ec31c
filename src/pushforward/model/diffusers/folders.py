"""Folders and hub repositories in the format of `diffusers`: their parts, and the networks in them.

A pipeline is a `model_index.json`, which names its parts and their classes, and a folder for each part. Networks are
made by their own packages, from files on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pushforward.data.faults import FAULTS, reason
from pushforward.errors import PushforwardError
from pushforward.model.diffusers.package import MISSING, import_diffusers, import_transformers
from pushforward.model.diffusers.tables import Settings
from pushforward.model.storage import read_json

__all__ = ["CONFIG", "INDEX", "Folder", "class_of", "download", "fetch", "find", "load_network", "load_part"]

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
DECODERS = ("vqvae", "vae")
JUDGES = ("safety_checker",)  # parts that judge a finished image; they are not run
OF_DIFFUSERS = ("diffusion_pytorch_model", "diffusion_pytorch_model")  # .safetensors, .bin
OF_TRANSFORMERS = ("model", "pytorch_model")
VARIANTS = ("fp16", "bf16")  # of weights (`stem.fp16.safetensors`): taken for the plain ones where there are none
LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Folder:
    """A model on disk.

    Args:
        root: the folder.
        index: content of a pipeline's index; empty for a network with its scheduler.
    """

    root: Path
    index: Settings

    @property
    def decoder(self) -> str | None:
        """The part that turns latents into images, if there is one."""
        return next((name for name in DECODERS if self.has(name)), None)

    @property
    def scheduler(self) -> Path:
        """The scheduler's file."""
        return self.place("scheduler", SCHEDULER) / SCHEDULER

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """The library and the class of each part that is run."""
        return {name: (kind[0], kind[1]) for name, kind in self.index.items() if self.has(name) and name not in JUDGES}

    @property
    def models(self) -> dict[str, type[Any]]:
        """The classes of the parts that have weights, and are read as their package reads them."""
        found = {name: _class(self, name, *kind) for name, kind in self.parts.items()}
        return {
            name: cls for name, cls in found.items()
            if cls is not None and issubclass(cls, nn.Module) and not cls.__name__.startswith("Multi")
        }  # fmt: skip

    def has(self, part: str) -> bool:
        """Say whether the pipeline has a part: `[library, class]`, or `[null, null]` where it is left out."""
        named = self.index.get(part)
        return isinstance(named, list) and not part.startswith("_") and list(map(type, named)) == [str, str]

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
        PushforwardError: there is none.
    """
    if (root / INDEX).is_file():
        return Folder(root, read_json(root / INDEX))
    if (root / CONFIG).is_file():
        return Folder(root, {})
    if (root / LORA).is_file():
        raise PushforwardError(
            f"{root} holds a LoRA alone; name the model that it changes, and this folder as its LoRA: --lora {root}, "
            "or load(..., lora=...)."
        )
    raise PushforwardError(f"{root} holds no model: neither {INDEX} (a pipeline) nor {CONFIG} (a network).")


def fetch(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download a hub repository's files of these patterns to a folder of the hub's cache.

    Raises:
        PushforwardError: there is no such repository or revision or no connection, or `huggingface_hub` is missing.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise PushforwardError(MISSING) from error
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise PushforwardError(
            f"No folder {source!r}, and the hub gives no model of that name{at}: {reason(error)}."
        ) from error


def download(source: str, revision: str | None) -> Path:
    """Download a hub repository's model: the parts that its index names, with one kind of weights of each.

    Raises:
        PushforwardError: as `fetch`, or it holds no model.
    """
    wanted = [INDEX, SCHEDULER, f"scheduler/{SCHEDULER}", *_files("", OF_DIFFUSERS)]
    root = fetch(source, revision, wanted)
    folder = find(root)
    stems = {name: _stems(cls) for name, cls in folder.models.items()} if folder.index else {"": OF_DIFFUSERS}
    if folder.index:
        wanted += [pattern for name in stems for pattern in _files(f"{name}/", stems[name])]
        wanted += [f"{name}/*" for name in folder.parts if name not in stems]
        root = fetch(source, revision, wanted)
    places = [(folder.place(name), own) for name, own in stems.items()]
    for asked in (_pickled, _variant):  # what is still missing
        lacking = [(place, own) for place, own in places if None not in _variants(place, own)]
        more = [f"{place.relative_to(root)}/{name}" for place, own in lacking for name in asked(own)]
        root = fetch(source, revision, [*wanted, *more]) if more else root
    return root


def _files(place: str, stems: tuple[str, str]) -> list[str]:
    ends = (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors")
    return [f"{place}*{CONFIG}", *(f"{place}{stems[0]}{end}" for end in ends)]


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


def load_part(folder: Folder, name: str, dtype: torch.dtype | None) -> Any:
    """Load a part of a pipeline that has weights.

    Raises:
        PushforwardError: files are missing or damaged.
    """
    cls = folder.models[name]
    return _pretrained(cls, folder.place(name), _stems(cls), dtype)


def _stems(cls: type[Any]) -> tuple[str, str]:
    return OF_TRANSFORMERS if hasattr(cls, "get_input_embeddings") else OF_DIFFUSERS


def _class(folder: Folder, part: str, library: str, name: str) -> type[Any] | None:
    """Find the class of a part; `None` if it is of another library, which is left to `diffusers`.

    Raises:
        PushforwardError: its package is not installed, or lacks it.
    """
    diffusers = import_diffusers()
    known = {"diffusers": diffusers, "transformers": import_transformers() if library == "transformers" else None}
    module = known[library] if library in known else getattr(diffusers.pipelines, library, None)
    if module is None:
        return None
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        raise PushforwardError(
            f"The {part} of {folder.root} is a {name}, which this version of {library} lacks; install a newer one."
        )
    return cls


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

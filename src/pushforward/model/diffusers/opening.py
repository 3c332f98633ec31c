"""Opening pipelines of `diffusers`: of a folder, of a checkpoint in one file, with LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pushforward.data.faults import FAULTS, reason
from pushforward.errors import PushforwardError
from pushforward.model.diffusers.folders import INDEX, JUDGES, Folder, fetch, find, load_part
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.tables import Settings

__all__ = ["add_lora", "open_checkpoint", "open_pipeline"]


def open_pipeline(folder: Folder, dtype: torch.dtype) -> Any:
    """Open a folder's pipeline, without parts that only judge its images.

    Weights are the plain ones of each part, or its half-precision ones where there are no others.

    Raises:
        PushforwardError: a package is not installed; this version of `diffusers` has no such pipeline; files are
            missing or damaged.
    """
    cls = _class_of(folder)
    for name in folder.parts:
        if not (folder.root / name).is_dir() and name not in folder.models:
            raise PushforwardError(f"{folder.root} has no {name}; fetch the model again.")
    parts = {name: load_part(folder, name, dtype) for name in folder.models}
    settings = {"torch_dtype": dtype, "local_files_only": True}
    pipe = _made(cls, folder, folder.root, parts | _left_out(folder.index), **settings)
    if "id2label" in folder.index:  # which the pipeline does not keep as it was
        pipe.register_to_config(id2label=folder.index["id2label"])
    return pipe


def open_checkpoint(path: Path, dtype: torch.dtype) -> Any:
    """Open a checkpoint in one file, with the settings of the pipeline around it: its folder's, or those on the hub.

    Raises:
        PushforwardError: as `open_pipeline`, or the settings are not beside it and cannot be fetched.
    """
    import_diffusers()
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    place = path.parent
    if not (place / INDEX).is_file():
        try:
            found = fetch_diffusers_config(load_single_file_checkpoint(str(path)))
        except FAULTS as error:
            raise PushforwardError(f"{path} cannot be read as a checkpoint of a pipeline: {reason(error)}.") from error
        name = found["pretrained_model_name_or_path"]
        try:
            place = fetch(name, None, ["*.json", "*.txt", "*.model"])
        except PushforwardError as error:
            raise PushforwardError(
                f"{path} is a checkpoint alone, and the settings of its pipeline, {name}, cannot be fetched; put the "
                f"file into that pipeline's folder, beside {INDEX}. ({error})"
            ) from error
    folder = find(place)
    cls = _class_of(folder)
    if not hasattr(cls, "from_single_file"):
        raise PushforwardError(f"A {cls.__name__} is not read from one file; name the folder of the pipeline.")
    settings = {"config": str(place), "local_files_only": True, "torch_dtype": dtype}
    return _made(cls, folder, path, _left_out(folder.index), **settings)


def add_lora(pipe: Any, lora: Sequence[str]) -> None:
    """Add LoRA to a pipeline: each a file, a folder or a hub name, and its weight after a colon, by default 1.

    Raises:
        PushforwardError: the pipeline takes none, or one cannot be read or does not fit.
    """
    kind = type(pipe).__name__
    if lora and not hasattr(pipe, "load_lora_weights"):
        raise PushforwardError(f"{kind} takes no LoRA; leave it out.")
    weights: dict[str, float] = {}
    for number, text in enumerate(lora):
        source, weight = _weighed(text)
        path, name = Path(source).expanduser(), f"lora{number}"
        if path.is_file():
            where: dict[str, Any] = {"pretrained_model_name_or_path_or_dict": path.parent, "weight_name": path.name}
        else:
            where = {"pretrained_model_name_or_path_or_dict": path if path.is_dir() else source}
        try:
            pipe.load_lora_weights(**where, adapter_name=name)
            known = {adapter for adapters in pipe.get_list_adapters().values() for adapter in adapters}
        except FAULTS as error:
            raise PushforwardError(f"The LoRA {source} cannot be added to {kind}: {reason(error)}.") from error
        if name not in known:
            raise PushforwardError(f"The LoRA {source} has no weights for the networks of {kind}.")
        weights[name] = weight
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))


def _weighed(text: str) -> tuple[str, float]:
    """Split a LoRA's source and weight."""
    source, colon, last = text.rpartition(":")
    try:
        return (source, float(last)) if colon and source else (text, 1.0)
    except ValueError:
        return text, 1.0


def _class_of(folder: Folder) -> Any:
    name = folder.index.get("_class_name")
    if not isinstance(name, str):
        raise PushforwardError(
            f"{folder.root} is a pipeline with code of its own ({name}), which is not run; open it with diffusers and "
            "give it to pushforward.from_pipeline."
        )
    cls = getattr(import_diffusers(), name, None)
    if cls is None:
        raise PushforwardError(
            f"{folder.root} is a {name}, which this version of diffusers lacks; install one that has it."
        )
    return cls


def _left_out(index: Settings) -> dict[str, Any]:
    """Arguments that leave out the parts that the pipeline does not have, and those that judge images."""
    left: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None] or name in JUDGES}
    return left | ({"requires_safety_checker": False} if "requires_safety_checker" in index else {})


def _made(cls: Any, folder: Folder, place: Path, parts: dict[str, Any], **settings: Any) -> Any:
    make = cls.from_pretrained if place == folder.root else cls.from_single_file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that torch_dtype is now also called dtype
            pipe = make(str(place), **settings, **parts)
    except FAULTS as error:
        raise PushforwardError(
            f"The {cls.__name__} in {place} cannot be read: {reason(error)}; fetch the model again."
        ) from error
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""Modules compiled by `torch.jit.save`: networks of other programs that run without their code."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from pushforward.data.faults import FAULTS
from pushforward.errors import PushforwardError

__all__ = ["SUFFIXES", "is_torchscript", "load_torchscript"]

SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")


def is_torchscript(path: Path) -> bool:
    """Say whether a file is a compiled module, not a state of `torch.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_torchscript(path: Path, device: torch.device | str = "cpu") -> Any:
    """Load a module in evaluation mode, without gradients of its weights.

    Raises:
        PushforwardError: the file does not exist, is damaged, or is of another kind.
    """
    if not path.is_file():
        raise PushforwardError(f"There is no file {path}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the format is out of favour, its files are not
        try:
            module = torch.jit.load(path, map_location=device)
        except FAULTS as error:
            raise PushforwardError(f"{path} is not a TorchScript file, or is damaged; write it again.") from error
    for parameter in module.parameters():  # a compiled module has no `requires_grad_`
        parameter.requires_grad_(False)
    return module.eval()

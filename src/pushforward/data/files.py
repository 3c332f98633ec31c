"""Atomic writing of files, the cache folder, and digests of content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEAD = "pushforward"
NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EPIPE, errno.ESPIPE}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, whose file takes the place of `path` when the block ends well.

        with atomic_path("grid.png") as temporary:
            image.save(temporary)

    The temporary file lies in the same folder, which is created if needed, and has the same suffix, by which writers
    choose a format. If the block fails, the temporary file is removed and `path` stays as it was. Links are followed;
    a device or pipe is written to directly, since there is nothing to replace.

    Args:
        path: The file to write.

    Raises:
        OSError: The folder or the file cannot be written; `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    direct = target.exists() and not target.is_file()
    temporary = target if direct else _beside(_followed(target), target.suffix)
    try:
        yield temporary
        if not direct:
            os.replace(temporary, _followed(target))
    except BaseException as error:
        if not direct:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NOT_WRITTEN and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None  # a failed write knows no name, or one that is gone
        raise


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to errors of failed writes in the block, which lack it."""
    try:
        yield
    except OSError as error:
        if error.errno in NOT_WRITTEN and error.filename is None:
            error.filename = str(path)
        raise


def check_writable(path: Path) -> None:
    """Raise unless a file can be written: write a small file beside it and remove that again.

    Missing folders are not created. Pipes are not checked.

    Args:
        path: the file that `atomic_path` is to write.

    Raises:
        OSError: its name is too long, it is a folder, a part of its path is not a folder, permission is missing, or
            the disk is full; the error names the path.
    """
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            if not path.is_fifo():
                with path.open("wb", buffering=0) as device:
                    device.write(b"")
            return
        target = _followed(path)
        folder = next(parent for parent in target.parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        most = os.pathconf(folder, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > most for part in target.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        probe = _beside(folder / "probe")
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _followed(path: Path) -> Path:
    """Resolve the links of a path.

    Raises:
        OSError: the links lead in a circle.
    """
    try:
        return path.resolve(strict=False)
    except RuntimeError:  # Python 3.11 raises this for a circle of links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def _beside(target: Path, suffix: str = "") -> Path:
    """Return a new name in the folder of a file, and create the folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{secrets.token_hex(8)}{suffix}")


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically to a `.safetensors` file that every user may read.

    Args:
        path: the file to write.
        tensors: the tensors by name, on any device and with any strides.
        metadata: entries of the file's header.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save, save_file

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    about = None if metadata is None else dict(metadata)
    with atomic_path(path) as temporary:
        if temporary == Path(path):  # a device, which `save_file` would replace
            temporary.write_bytes(save(plain, about))
            return
        try:
            save_file(plain, temporary, about)
        except SafetensorError as error:  # it mentions the system's error only in its text
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error
        temporary.chmod(0o644)  # by default only its owner may read it


def load_tensors(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a `.safetensors` file, and its metadata.

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: it is damaged, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_tensors(path: Path, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read as `load_tensors` does, with errors in a sentence.

    Args:
        path: path of the file.
        what: what such a file is, for messages.
        remedy: what to do if it is not, likewise.

    Raises:
        PushforwardError: no such file, another kind of file, or a damaged one.
    """
    if not path.is_file():
        raise PushforwardError(f"There is no {what} {path}; {remedy}.")
    try:
        return load_tensors(path)
    except (OSError, ValueError) as error:
        raise PushforwardError(f"{path} is damaged or no {what} ({error}); {remedy}.") from None


def save_headed(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> None:
    """Write tensors as `save_tensors` does, with a header that JSON can say; its `format` names and counts the form."""
    save_tensors(path, tensors, {_HEAD: json.dumps(head, allow_nan=False)})


def load_headed(path: Path, form: str, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_headed`: its tensors and its header.

    Args:
        path: as for `read_tensors`.
        form: the format that is read.
        what: as for `read_tensors`.
        remedy: as for `read_tensors`.

    Raises:
        PushforwardError: as `read_tensors`, or another format.
    """
    tensors, metadata = read_tensors(path, what, remedy)
    try:
        head = json.loads(metadata[_HEAD])
        found = head["format"]
    except (KeyError, TypeError, ValueError):
        raise PushforwardError(f"{path} is a safetensors file, but no {what}; {remedy}.") from None
    if found != form:
        raise PushforwardError(f"{path} has format {found!r}; this version of Pushforward reads {form!r}.")
    return tensors, head


def check_suffix(path: str | os.PathLike[str], known: Collection[str], what: str = "Pictures") -> None:
    """Raise unless a file of this suffix can be written; call it before long work.

    Args:
        path: the file to be written.
        known: the suffixes of what is to be written, in lower case; of many, the message names a few.
        what: is to be written, for the message.

    Raises:
        PushforwardError: the suffix is unknown.
    """
    if Path(path).suffix.lower() not in known:
        shown = sorted(known if len(known) < 9 else {".png", ".jpg", ".webp", ".gif", ".tiff"})
        raise PushforwardError(f"{what} are written to a file that ends in {' or '.join(shown)}; got {path}.")


def cache_folder() -> Path:
    """Return the user's cache folder: `$XDG_CACHE_HOME/pushforward` or `~/.cache/pushforward`."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "pushforward"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "pushforward"


def held_by(text: str) -> bytes | None:
    """Read the file that a text names; `None` if it names none that can be read, and so is a text and nothing else."""
    try:
        return Path(text).read_bytes() if Path(text).is_file() else None
    except (OSError, ValueError):  # no name: too long, or with a zero byte
        return None


def digest(*parts: object) -> str:
    """Hash the content of values, in order, by SHA-256; stored results are told apart by it, never by names alone.

    The digest does not depend on the process, the device or where files lie.

    Args:
        parts: `None`, numbers, text, bytes, tensors, arrays; sequences, sets and mappings of these, by their elements;
            paths, by the content of the file or of all files in the folder. For other objects, see `model.contents`.

    Raises:
        OSError: a file cannot be read.
        TypeError: a value is of another kind.
    """
    seen: dict[int, bytes] = {}
    return _hash("parts", *(_digest(part, seen) for part in parts)).hex()


def _digest(value: Any, seen: dict[int, bytes]) -> bytes:
    for kind in (bool, int, float, complex, str):
        if isinstance(value, kind):
            return _hash(kind.__name__, kind.__repr__(value))
    if id(value) not in seen:  # a value that occurs several times is hashed once
        seen[id(value)] = _digest_of_one(value, seen)
    return seen[id(value)]


def _digest_of_one(value: Any, seen: dict[int, bytes]) -> bytes:
    match value:
        case None | bytes():
            return _hash(type(value).__name__, value or b"")
        case Mapping():
            return _hash("mapping", *sorted(_digest(key, seen) + _digest(item, seen) for key, item in value.items()))
        case list() | tuple():
            return _hash("sequence", *(_digest(item, seen) for item in value))
        case set() | frozenset():
            return _hash("set", *sorted(_digest(item, seen) for item in value))
        case Path() if value.is_dir():
            below = sorted(file.relative_to(value) for file in value.rglob("*") if file.is_file())
            return _hash("folder", *(part for name in below for part in (name.as_posix(), _digest(value / name, {}))))
        case Path():
            with value.open("rb") as file:
                return _hash("file", hashlib.file_digest(file, "sha256").digest())
    if hasattr(value, "detach"):
        return _digest_of_tensor(value)
    if hasattr(value, "__array_interface__") and value.dtype != object:
        return _hash("array", value.dtype.str, str(value.shape), value.tobytes())
    raise TypeError(f"Digests are made of plain values; got {type(value).__name__}.")


def _digest_of_tensor(tensor: Tensor) -> bytes:
    import torch

    plain = tensor.detach()
    plain = (plain.to_dense() if plain.layout != torch.strided else plain).resolve_conj().resolve_neg()
    data = plain.cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return _hash("tensor", str(tensor.dtype), str(tuple(tensor.shape)), data)


def _hash(*parts: str | bytes | memoryview) -> bytes:
    """Hash parts such that their borders count."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.digest()

import errno
import os
from pathlib import Path

import pytest

from pushforward.files import atomic_path


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "grid.png"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"image")
        assert temporary.suffix == ".png"
        assert temporary.parent == target.parent
        assert not target.exists()
    assert [file.name for file in target.parent.iterdir()] == ["grid.png"]
    assert target.read_bytes() == b"image"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    assert target.read_bytes() == b"old"


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(target)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_a_device_is_written_and_not_replaced() -> None:
    with atomic_path(os.devnull) as temporary:
        assert temporary == Path(os.devnull)


def test_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path):
        pytest.fail("the block ran")

import errno
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from pushforward.cli._shared.report import write_json
from pushforward.data.files import atomic_path, check_writable, digest, save_tensors
from pushforward.data.locks import alone
from pushforward.data.pictures import save_image
from pushforward.errors import PushforwardError


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
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    with atomic_path(tmp_path / "link.png") as temporary:
        assert temporary.suffix == ".png"  # by which writers choose a format, wherever the link leads
        temporary.touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_a_device_is_written_and_not_replaced() -> None:
    with atomic_path(os.devnull) as temporary:
        assert temporary == Path(os.devnull)


def test_tensors_go_to_a_device_that_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_tensors(pipe, {"x": torch.ones(3)})
    assert pipe.is_fifo()
    assert load(os.read(reader, 10_000))["x"].tolist() == [1, 1, 1]
    os.close(reader)


def test_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path):
        pytest.fail("the block ran")


# -- what tells one content from others


def test_digests_are_of_content() -> None:
    """No two of these are alike, and each is like its copy; what only looks alike when written down differs."""
    x = torch.arange(6.0)
    values = [
        None, 0, 0.0, False, "", "0", b"", b"0", [], {}, set(), [[]], ["a", "b"], ["ab"], ["a", ["b"]], {"a": "b"},
        {"a": None}, {"a"}, "\udce9", x, x.view(2, 3), x.half(), x.int(), x.int().view(torch.float32), x + 0j, -x,
        x[:0], x.numpy(), x.numpy().view(np.int32), [x, x], [x],
    ]  # fmt: skip
    found = [digest(value) for value in values]
    assert len(set(found)) == len(found)
    assert digest({"a": 1, "b": [x.flip(0).flip(0), {2, 1}]}) == digest({"b": (x.clone(), {1, 2}), "a": 1})
    strided = torch.stack([x, x], 1)[:, 0]
    assert digest(strided) == digest(x) == digest(torch.nn.Parameter(x))
    assert digest(x, -x) != digest(-x, x)
    with pytest.raises(TypeError, match="plain values"):
        digest(object())


def test_digests_of_paths_are_of_what_lies_there(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> Path:
        for file, text in files.items():
            (tmp_path / name / file).mkdir(parents=True)
            (tmp_path / name / file / "x").write_text(text)
        return tmp_path / name

    one, copy = folder("one", a="1", b="2"), folder("copy", a="1", b="2")
    others = [folder("swapped", a="2", b="1"), folder("fewer", a="1"), folder("renamed", a="1", c="2")]
    assert digest(one) == digest(copy)
    assert len({digest(each) for each in (one, *others, one / "a" / "x", one / "b" / "x")}) == 6
    assert digest(one / "a" / "x") == digest(copy / "a" / "x") == digest(others[0] / "b" / "x")


# -- one process at a time


def holding(out: Path) -> "subprocess.Popen[str]":
    """Another process at work on a result, once it says that it is."""
    code = "import sys, time\nfrom pushforward.data.locks import alone\n"
    code += "with alone(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


@pytest.mark.parametrize("kind", ["folder", "file", "new"])
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path, kind: str) -> None:
    """Under whatever name; and a killed process leaves nothing that must be removed by hand."""
    out = tmp_path / "deep" / "out"
    if kind != "new":
        out.parent.mkdir()
        out.mkdir() if kind == "folder" else out.write_text("old")
    (tmp_path / "link").symlink_to(out)
    with holding(out) as first:
        for name in (out, tmp_path / "link", tmp_path / "deep" / ".." / "deep" / "out"):
            with pytest.raises(PushforwardError, match=f"Another process is at work on {name}"), alone(name):
                pytest.fail("two at once")
        with alone(out.with_name("other")):
            pass
        first.send_signal(signal.SIGKILL)
    with alone(out):
        assert out.exists() is (kind != "new")
    left = {path.name for path in tmp_path.rglob("*")} - {"link"}
    assert left == ({"deep"} if kind == "new" else {"deep", "out"})
    with alone(tmp_path / "newer" / "out"):
        pass
    assert not (tmp_path / "newer").exists()


def test_what_cannot_be_locked_is_worked_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", fails)
    with alone(tmp_path / "new" / "out"), alone("/dev/null"):
        (tmp_path / "new" / "out").write_text("done")
    assert (tmp_path / "new" / "out").read_text() == "done"


def test_ranks_of_one_run_do_not_lock_one_another_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def enter(*ranks: int) -> None:
        for rank in ranks:
            monkeypatch.setenv("RANK", str(rank))
            with alone(tmp_path / "out"):
                enter(*ranks[1:])
            return

    for ranks in itertools.permutations([0, 1, 2]):
        enter(*ranks)
    with pytest.raises(PushforwardError, match="Another process"):
        enter(0, 0)


@contextmanager
def full() -> Iterator[None]:
    """Files can have no more than 1000 bytes, even what pytest writes to: the system fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_whatever_writes_a_full_disk_names_the_file(tmp_path: Path) -> None:
    writers = {
        "a.png": lambda path: save_image(Image.effect_noise((99, 99), 50), path),
        "b.safetensors": lambda path: save_tensors(path, {"x": torch.zeros(9999)}),
        "c.json": lambda path: write_json({"x": "y" * 9999}, str(path)),
    }
    for name, write in writers.items():
        with full(), pytest.raises(OSError, match=r"File too large") as caught:
            write(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    with full(), pytest.raises(OSError, match=r"File too large"):
        check_writable(tmp_path / "d.png")
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    check_writable(tmp_path / "new" / "deep" / "a.png")
    check_writable(tmp_path / ("n" * 251 + ".png"))
    wrong = {
        tmp_path: errno.EISDIR,
        tmp_path / "file" / "a.png": errno.ENOTDIR,
        tmp_path / ("é" * 130): errno.ENAMETOOLONG,  # 260 bytes
        tmp_path / ("d" * 300) / "a.png": errno.ENAMETOOLONG,
        tmp_path / "loop": errno.ELOOP,
        Path("/dev/full"): errno.ENOSPC,
    }
    for path, number in wrong.items():
        with pytest.raises(OSError) as caught:
            check_writable(path)
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert {file.name for file in tmp_path.iterdir()} == {"file", "loop"}


def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path: Path) -> None:
    with atomic_path(tmp_path / ("n" * 251 + ".png")) as temporary:
        temporary.touch()
    assert [len(file.name) for file in tmp_path.iterdir()] == [255]

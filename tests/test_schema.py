"""Files of ours that are wrong: one sentence names the file and the entry."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pushforward.data.schema import check, check_tensors, parse, read
from pushforward.errors import PushforwardError
from pushforward.model import load, zoo


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    weight: float = 1.0
    more: dict[str, Any] = field(default_factory=dict)


def test_what_is_right_is_read_as_the_dataclass(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"inner": {"sizes": [1, 2]}, "weight": 3, "more": {"any": [null, "\\udcff"]}}')
    found = read(path, Outer, "mend it")
    assert found == Outer(Inner((1, 2)), 3.0, {"any": [None, "?"]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "should be an object; got []"),
        ("{}", "lacks the entry 'inner'"),
        ('{"inner": {}}', "lacks the entry 'inner.sizes'"),
        ('{"inner": {"sizes": [1, "2"]}}', "wrong entry 'inner.sizes'[1]"),
        ('{"inner": {"sizes": [true]}}', "wrong entry 'inner.sizes'[0]"),
        ('{"inner": {"sizes": [1.5]}}', "wrong entry 'inner.sizes'[0]"),
        ('{"inner": {"sizes": 1}}', "wrong entry 'inner.sizes'"),
        ('{"inner": {"sizes": [], "size": 1}}', "unknown entry 'inner.size'"),
        ('{"inner": {"sizes": []}, "weights": 1}', "unknown entry 'weights'"),
        ('{"inner": {"sizes": []}, "weight": NaN}', "wrong entry 'weight'"),
        ('{"inner": {"sizes": []}, "weight": 1e999}', "wrong entry 'weight'"),
        ('{"inner": {"sizes": []}, "weight": "1"}', "wrong entry 'weight'"),
        ('{"inner": {"sizes": []}, "weight": ' + "9" * 5000 + "}", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"inner"', "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_entry(text: str | bytes, said: str) -> None:
    with pytest.raises(PushforwardError) as caught:
        parse(text, Outer, "a.json", "mend it")
    message = str(caught.value)
    assert said in message
    assert message.startswith("a.json")
    assert message.endswith("mend it.")
    assert "\n" not in message


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "loop", "pipe", "."):
        with pytest.raises(PushforwardError, match=r"is missing|is not a file"):
            read(tmp_path / name, Outer, "mend it")


def test_tensors_are_checked_by_the_names_of_their_axes() -> None:
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(3), "c": torch.zeros(2, 5, 5)}
    shapes = {"a": "n m", "b": "m", "c": "n ..."}
    check_tensors(good, shapes, "file", "remove it", m=3)
    for name, wrong in (
        ("a", torch.zeros(3, 2)),
        ("b", torch.zeros(())),
        ("c", torch.zeros(1, 5)),
        ("b", good["b"] * 1j),
    ):
        with pytest.raises(PushforwardError, match=rf"has '({name}|b|c)', torch.* does not fit"):
            check_tensors({**good, name: wrong}, shapes, "file", "remove it")
    with pytest.raises(PushforwardError, match="lacks 'b'"):
        check_tensors({"a": good["a"]}, shapes, "file", "remove it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo.FOLDER / "fashion-vp", tmp_path / "model"))


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "lacks the entry 'network'": lambda c: c.pop("network"),
    "unknown entry 'colour'": lambda c: c.update(colour=1),
    "unknown entry 'network.colour'": lambda c: c["network"].update(colour=1),
    "wrong entry 'network.layers'": lambda c: c["network"].update(layers=10**9),  # it would never be built
    "wrong entry 'network.widths'": lambda c: c["network"].update(widths=[]),
    "wrong entry 'network.widths'[0]": lambda c: c["network"].update(widths=[0, 96]),
    "'network' of": lambda c: c["network"].update(groups=7),
    "does not fit the network": lambda c: c["network"].update(words=2**24, classes=0) or c.update(classes=[]),
    "'network.in_channels' of": lambda c: c["network"].update(in_channels=2),
    "'network.classes' of": lambda c: c.update(classes=["a"]),
    "'shape' of": lambda c: c.update(shape=[1, 27, 28]),
    "wrong entry 'shape'": lambda c: c.update(shape=[1, 28]),
    "wrong entry 'variance'": lambda c: c.update(variance=-1),
    "wrong entry 'prediction'": lambda c: c.update(prediction="x"),
    "wrong entry 'name'": lambda c: c.update(name=None),
    "wrong entry 'info'": lambda c: c.update(info=[]),
    "wrong entry 'beta_max'": lambda c: c["process"].update(beta_max="20"),
    "is no diffusion from data to noise": lambda c: c["process"].update(t_max=0.0),
    "Unknown process []": lambda c: c["process"].update(name=[]),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_config_is_refused_before_memory_is_taken(said: str, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    WRONG[said](config)
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(PushforwardError) as caught:
        load(str(folder))
    assert said in str(caught.value)


@pytest.mark.parametrize("said", ["lacks", "unknown", "another shape of", "not finite numbers"])
def test_wrong_weights_are_refused(said: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    first = min(weights)
    match said:
        case "lacks":
            del weights[first]
        case "unknown":
            weights["more"] = torch.zeros(1)
        case "another shape of":
            weights[first] = weights[first][:1].clone()
        case _:
            weights[first] = weights[first] * float("nan")
    save_file(weights, path)
    with pytest.raises(PushforwardError, match=said):
        load(str(folder))


def test_names_that_are_no_text_may_stand_in_a_file() -> None:
    assert check({"a": "\udcff"}, dict, "file", "mend it") == {"a": "?"}

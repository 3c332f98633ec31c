"""Sizes that no memory has are refused at once, wherever a number of things can be asked for."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pushforward as pf
from pushforward.cli import app
from pushforward.cli._shared.report import waiting
from pushforward.data.datasets import ImageData, load_images
from pushforward.data.memory import check_memory, free_memory
from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import resamples
from pushforward.execute.system import System
from pushforward.guidance.dynamics import Schedule
from pushforward.linear import VP
from pushforward.plan import Builder
from pushforward.plan.recurrence import repeated
from pushforward.training.trainer import TrainConfig, train

BILLION = 10**9


def a_model(shape: tuple[int, ...] = (3, 16, 16)) -> pf.Model:
    return pf.Model("none", VP(), pf.Network(lambda u, *_: 0 * u, prediction="epsilon"), shape=shape)


def a_diffusion() -> pf.Diffusion:
    model = a_model()
    return pf.Diffusion(model, pf.SOLVERS["ddim"](model.process, pf.grid.uniform(model.process, 2)))


def grey(count: int = 2) -> ImageData:
    return ImageData(torch.full((count, 1, 8, 8), 128, dtype=torch.uint8))


ASKED = {
    "images": lambda _: a_diffusion().sample(BILLION),
    "images of a GAN": lambda _: pf.gan(torch.nn.Unflatten(1, (1, 1, 4)), 4, image_shape=(1, 1, 4)).sample(10**11),
    "codes": lambda _: a_diffusion().draw(BILLION),
    "steps": lambda _: pf.grid.uniform(VP(), BILLION),
    "steps of a grid": lambda _: pf.grid.shifted(VP(), BILLION, last=0.1),
    "steps over frequencies": lambda _: Builder(pf.linear.Blurring((2048, 2048)), "none", torch.linspace(1, 0, 1000)),
    "repeats": lambda _: repeated(pf.SOLVERS["ddim"], VP(), torch.tensor([1.0, 0.5, 0.0]), BILLION),
    "states at once": lambda _: System(a_diffusion().plan, None, torch.empty(1).expand(BILLION, 3, 64, 64)),
    "draws": lambda _: Schedule(steps=10 * BILLION, draws=BILLION),
    "resamples": lambda _: resamples(1000, BILLION),
    "a batch": lambda path: train(TrainConfig(steps=1, batch=BILLION, network="tiny", precision="no"), grey(), path),
    "a size": lambda path: load_images(path, size=10**6),
    "sizes": lambda path: load_images(path, size=10_000),
}  # fmt: skip


@pytest.mark.parametrize("what", ASKED)
def test_what_no_memory_has_is_refused_before_any_is_taken(tmp_path: Path, what: str) -> None:
    for k in range(1000 if what == "sizes" else 1):
        (tmp_path / f"{k}.png").touch()
    started = time.perf_counter()
    with pytest.raises(PushforwardError, match=r"would take .* GiB of memory; .* GiB are free") as error:
        ASKED[what](tmp_path)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "fashion-vp", "--count", BILLION],
        ["sample", "fashion-vp", "--count", BILLION, "--label", "sneaker", "--label", "coat"],
        ["sample", "fashion-vp", "--steps", BILLION],
        ["guide", "fashion-vp", "--energy", "colour:#808080", "--chains", BILLION],
    ],
)
def test_the_command_line_refuses_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, PushforwardError)
    assert "GiB are free" in str(result.exception)


def test_what_there_is_room_for_is_not_refused() -> None:
    free = free_memory()
    assert 2**20 < free < 2**50
    check_memory(free / 2, "half of it")
    with pytest.raises(PushforwardError, match="Twice as much would take"):
        check_memory(2 * free, "Twice as much")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1, 2], 3),
        ([0, 1, 999], 1000),  # a part of ImageNet, numbered as in the whole
        (list(range(2000)), 2000),
        ([0, 1, 2**62], None),
        ([0, 1, 5000], None),
        (np.array([0, 2**63 + 1], np.uint64), None),
    ],
)
def test_labels_make_as_many_classes_as_they_can_mean(tmp_path: Path, labels: list[int], classes: int | None) -> None:
    y = np.asarray(labels)
    np.savez(tmp_path / "d.npz", x=np.zeros((len(y), 2, 2), np.uint8), y=y)
    if classes is not None:
        assert len(load_images(tmp_path / "d.npz").classes) == classes
        return
    with pytest.raises(PushforwardError, match="labels"):
        load_images(tmp_path / "d.npz")


@pytest.mark.parametrize("labels", [[0, 2**62], [0, 2], [-1, 0], [0], [0.0, 1.0]])
def test_labels_from_python_must_be_classes(tmp_path: Path, labels: list[float]) -> None:
    data = ImageData(grey().images, torch.tensor(labels), ("a", "b"))
    with pytest.raises(PushforwardError, match="from 0 to 1"):
        train(TrainConfig(steps=1, network="tiny"), data, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_long_preparation_shows_that_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("making the plan"):
        pass
    with waiting("making the plan", quiet=True):
        time.sleep(1.3)
    assert capsys.readouterr().err == ""
    with waiting("making the plan"):
        time.sleep(1.3)
    assert "making the plan ..." in capsys.readouterr().err

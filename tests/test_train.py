import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from pushforward.cli import app
from pushforward.data.datasets import ImageData, load_images, read_image
from pushforward.errors import PushforwardError
from pushforward.linear import PROCESSES as EVERY
from pushforward.linear import Gaussian, Process, process_from_config
from pushforward.model import load
from pushforward.model.prediction import PREDICTIONS, denoising, is_image
from pushforward.training import stopping
from pushforward.training.batches import BatchDraws
from pushforward.training.config import Card
from pushforward.training.stopping import Clock
from pushforward.training.targets import TIMES, TargetTable
from pushforward.training.trainer import Interrupted, TrainConfig, train
from support.pictures import save_png
from support.training import SIDE, TINY, some_data

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = [name for name in EVERY if name != "discrete"]


def a_process(name: str) -> Process:
    return process_from_config({"name": name, **({"field": (SIDE, SIDE)} if "blurring" in name else {})})


# -- data


def test_a_folder_gives_labels_and_reports_the_broken_file(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png"):
        save_png(tmp_path / name)
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "dog" / "half.png").write_bytes((tmp_path / "dog" / "1.png").read_bytes()[:45])
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = load_images(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    assert data.images.shape == (3, 3, SIDE, SIDE)
    assert [Path(name).name for name, _ in data.skipped] == ["broken.jpg", "half.png"]


def test_images_come_out_upright_on_white_in_8_bits(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (read_image(save_png(tmp_path / "clear.png", clear)) == 255).all()
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "L").convert("P")
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png") == 255).all()
    deep = np.array([[0, 257], [128 * 257, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0].tolist() == [[0, 1], [128, 255]]
    wide = Image.fromarray(np.array([[0, 255]], np.uint8).repeat(8, 0).repeat(8, 1))
    exif = wide.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    wide.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")[0]
    assert turned.shape == (16, 8)
    assert turned[0].max() == 0
    assert turned[-1].min() == 255
    assert read_image(tmp_path / "turned.png", size=(4, 4), channels=3).shape == (3, 4, 4)


def test_npz_keeps_labels_and_fits_size_and_channels(tmp_path: Path) -> None:
    x = np.arange(3 * 6 * 6, dtype=np.uint8).reshape(3, 6, 6)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=np.array([2, 0, 1]), x_test=x[:1], y_test=np.array([1]))
    data = load_images(tmp_path / "d.npz")
    assert (data.images[:, 0].numpy() == x).all()
    assert data.classes == ("0", "1", "2")
    assert load_images(tmp_path / "d.npz", size=4, channels=3, split="test").images.shape == (1, 3, 4, 4)


def bad_source(tmp_path: Path, kind: str) -> Path:
    match kind:
        case "nothing there":
            return tmp_path / "nowhere.npz"
        case "empty folder":
            return tmp_path
        case "all broken":
            (tmp_path / "a.png").write_bytes(b"?")
            return tmp_path
        case "two sizes":
            save_png(tmp_path / "a.png")
            save_png(tmp_path / "b.png", np.zeros((4, 4), np.uint8))
            return tmp_path
    path = tmp_path / "d.npz"
    arrays = {
        "no images": {"z": np.zeros(3)},
        "floats": {"x": np.zeros((2, 4, 4))},
        "labels too short": {"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(1, np.int64)},
    }
    if kind == "no zip":
        path.write_bytes(b"PK nothing")
    else:
        np.savez(path, **arrays[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nothing there", "There is no folder"),
        ("empty folder", "no image in"),
        ("all broken", "No image in"),
        ("two sizes", "different sizes"),
        ("no zip", "cannot be read"),
        ("no images", "has no array x_train or x or images"),
        ("floats", "must be uint8"),
        ("labels too short", "2 whole numbers"),
    ],
)
def test_a_bad_source_is_one_clear_sentence(tmp_path: Path, kind: str, said: str) -> None:
    with pytest.raises(PushforwardError, match=said) as error:
        load_images(bad_source(tmp_path, kind))
    assert "\n" not in str(error.value)


def test_a_data_set_by_name_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PushforwardError, match=r"pushforward\[train\]"):
        load_images("mnist")


# -- states and targets


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_what_gives_the_image_back(name: str, prediction: str) -> None:
    """What samplers make of the target is the clean image, from the state that the lesson drew."""
    process, reference = a_process(name), Gaussian(0.3)
    if process.blocks == 2 and prediction in ("v", "velocity"):
        with pytest.raises(PushforwardError, match="scalar"):
            TargetTable.make(process, prediction, reference, 8)
        return
    lesson = TargetTable.make(process, prediction, reference, 8)
    images = torch.rand(8, 1, SIDE, SIDE, dtype=torch.float64) * 2 - 1
    noise = torch.randn(8, process.blocks, SIDE, SIDE, dtype=torch.float64)
    seen, target = lesson.draw(images, torch.arange(8), noise)
    on_state, on_prediction = denoising(process, prediction, lesson.times, reference)
    state = lesson.input_scale.inverse()(seen)
    answer = process.lift(target) if is_image(prediction) else target
    torch.testing.assert_close(process.image(on_state(state) + on_prediction(answer)), images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_inputs_and_residual_targets_have_unit_variance_on_the_reference(name: str) -> None:
    process, reference = a_process(name), Gaussian(0.3)
    lesson = TargetTable.make(process, "residual", reference, 4)
    k = torch.arange(4).repeat_interleave(500)
    images = 0.3**0.5 * torch.randn(len(k), 1, SIDE, SIDE, dtype=torch.float64)
    noise = torch.randn(len(k), process.blocks, SIDE, SIDE, dtype=torch.float64)
    seen, target = lesson.draw(images, k, noise)
    for values in (seen, target):
        variance = values.square().unflatten(0, (4, 500)).mean((1, 3, 4))
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0.05, atol=0)


def test_every_epoch_goes_through_all_images_once_in_a_new_order() -> None:
    draws = BatchDraws(seed=3, count=10, batch=4)
    seen = torch.cat([draws.indices(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert len(BatchDraws(seed=3, count=3, batch=8).indices(0)) == 8


# -- training


@pytest.mark.parametrize("name", PROCESSES)
def test_a_model_of_every_process_is_trained_saved_and_read(tmp_path: Path, name: str) -> None:
    config = TrainConfig(process=name, steps=2, **{**TINY, "sample_every": 2 * (name == "blurring-langevin")})
    report = train(config, some_data(), tmp_path / "m")
    assert report.steps == 2
    assert math.isfinite(report.loss)
    model = load(tmp_path / "m")
    assert model.process == a_process(name)
    assert model.classes == ("a", "b")
    if name == "blurring-langevin":
        with Image.open(tmp_path / "m" / "training" / "samples-0000002.png") as picture:
            assert picture.width > 10 * SIDE * 12
            assert picture.height > 8 * SIDE * 12
    files = {"README.md", "config.json", "model.safetensors", "statistics.safetensors", "training"}
    assert files == {p.name for p in (tmp_path / "m").iterdir()}


def test_no_name_breaks_the_table_of_the_card(tmp_path: Path) -> None:
    """Each line is two cells, as Markdown parts them, that say what was given; the command is no cell."""
    command = "pushforward train 'a|b' --data-name 'c`d'"
    config = TrainConfig(steps=1, **TINY, card=Card("my\n*data*", "a|b", command))
    train(config, replace(some_data(), classes=("x|y", "`u`\nv")), tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("|")][2:]
    cells = [re.split(r"(?<!\\)\|", row) for row in rows]
    assert {len(parts) for parts in cells} == {4}
    said = {name.strip(): re.sub(r"\\(.)", r"\1", value).strip() for _, name, value, _ in cells}
    assert said["data"].startswith("my *data* (")
    assert (said["licence of the data"], said["classes"]) == ("a|b", "x|y, `u` v")
    assert r"\`u\`" in card
    assert f"\n    {command}\n" in card


def test_the_log_has_the_learning_rate_of_each_step(tmp_path: Path) -> None:
    """It rises to its highest value over two steps, and falls along a cosine to zero, which no step takes."""
    train(TrainConfig(steps=5, log_every=1, **TINY), some_data(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    rise = [0.5, 1, 1, 1, 1]
    wanted = [0.003 * rise[k] * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(wanted)


def test_training_learns_the_classes(tmp_path: Path) -> None:
    data = some_data()
    settings = {**TINY, "batch": 16, "learning_rate": 1e-2}
    train(TrainConfig(steps=120, half=True, log_every=10, **settings), data, tmp_path / "m")
    lines = [json.loads(line) for line in (tmp_path / "m" / "training" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert load_file(tmp_path / "m" / "model.safetensors")["unet.conv_in.weight"].dtype == torch.float16
    model = load(tmp_path / "m")
    t = torch.tensor([0.9 * model.process.t_max], dtype=torch.float64)
    state = torch.randn(64, 1, SIDE, SIDE)
    dark, light = (
        model.given(torch.full((64,), label)).denoiser.at(model.process, t, state)(0, state).mean().item()
        for label in (0, 1)
    )
    assert dark < light - 0.3


KILLED = """
import sys, time
from pathlib import Path
from pushforward.training.trainer import TrainConfig, train
from support.training import TINY, some_data
train(
    TrainConfig(steps=16, save_every=4, log_every=1, **TINY), some_data(), Path(sys.argv[1]),
    callback=lambda *_: time.sleep(0.05),
)
"""


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    config = TrainConfig(steps=16, save_every=4, log_every=1, **TINY)
    train(config, some_data(), tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    log, deadline = tmp_path / "killed" / "training" / "log.jsonl", time.monotonic() + 300
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")], env=environment) as child:
        while child.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 7):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert load(tmp_path / "killed").classes == ("a", "b")
    report = train(config, some_data(), tmp_path / "killed")
    assert 4 <= report.resumed_from < 16
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    logs = [(tmp_path / name / "training" / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]


def the_same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, log and pictures, the times that they took aside."""
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    logs = [(folder / "training" / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    told = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    pictures = [[p.read_bytes() for p in sorted((folder / "training").glob("samples*"))] for folder in (one, other)]
    equal = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    return equal and told[0] == told[1] and pictures[0] == pictures[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "m"
    train(SIX, some_data(), folder)
    return folder


SIX = TrainConfig(steps=6, log_every=1, **{**TINY, "sample_every": 3})


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, ("step", 1)),
        (signal.SIGTERM, ("step", 5)),
        (signal.SIGHUP, ("checkpoint", 0)),
        (signal.SIGTERM, ("picture", 0.5)),
        (signal.SIGINT, ("step", 6)),
        (signal.SIGINT, ("last picture", 0.5)),
    ],
)
def test_a_signal_at_any_time_saves_and_the_same_call_goes_on(
    tmp_path: Path, uninterrupted: Path, moment: tuple[str, float], number: signal.Signals
) -> None:
    """Bit for bit as if nothing had been: weights, log and pictures."""
    config, sent = replace(SIX, save_every=2 if moment[0] == "checkpoint" else None), []

    def at(what: str, done: float) -> None:
        if (what, round(done, 1)) == moment and not sent:
            sent.append(os.kill(os.getpid(), number))

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        train(config, some_data(), tmp_path / "m", callback=lambda step, *_: at("step", step), aside=at)
    assert sent
    assert stopped.value.status == 128 + number
    assert signal.getsignal(number) is before
    assert str(tmp_path / "m") in str(stopped.value)
    at_the_end = moment in (("step", 6), ("last picture", 0.5))
    assert ("complete" if at_the_end else "same command goes on") in str(stopped.value)
    report = train(config, some_data(), tmp_path / "m")
    assert 0 < report.resumed_from <= 6 - (not at_the_end)
    assert the_same(tmp_path / "m", uninterrupted)


def test_a_second_signal_ends_at_once_and_damages_nothing(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        """In the place of the end of the process."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)

    def twice(what: str, _: float) -> None:
        if what == "checkpoint" and (tmp_path / "m" / "training" / "checkpoint.pt").exists():
            (tmp_path / "m" / "training" / ".0123456789abcdef.pt").write_bytes(b"half")  # as a kill would leave it
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Ended, match="143"):
        train(replace(SIX, save_every=2), some_data(), tmp_path / "m", aside=twice)
    assert train(replace(SIX, save_every=2), some_data(), tmp_path / "m").resumed_from == 2
    assert the_same(tmp_path / "m", uninterrupted)
    assert not list((tmp_path / "m").rglob(".*"))


def test_a_training_killed_before_its_first_checkpoint_begins_a_new_log(tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted / "training", tmp_path / "m" / "training")
    (tmp_path / "m" / "training" / "checkpoint.pt").unlink()
    log = tmp_path / "m" / "training" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'\xff {"step": 7')
    assert train(SIX, some_data(), tmp_path / "m").resumed_from == 0
    assert the_same(tmp_path / "m", uninterrupted)


def test_checkpoints_and_pictures_go_by_the_clock_and_cost_little() -> None:
    now, cost, spent, first = 0.0, 11.0, 0.0, None
    clock = Clock(now)
    while now < 7200:
        now += 0.9
        if now >= clock.due:
            now, spent, first = now + cost, spent + cost, first or now + cost
            clock.done(now, cost)
    assert first < 60
    assert spent / now < 0.03


def test_pictures_come_without_being_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "FIRST", 0.0)
    told: list[tuple[str, float]] = []
    settings = {**TINY, "sample_every": None}
    train(TrainConfig(steps=2, **settings), some_data(), tmp_path, aside=lambda *what: told.append(what))
    assert {p.name for p in (tmp_path / "training").glob("samples*")} == {
        "samples-0000001.png", "samples-0000002.png"
    }  # fmt: skip
    drawn = [done for what, done in told if what == "last picture"]
    assert drawn == sorted(drawn)
    assert drawn[0] == 0
    assert drawn[-1] == 1
    assert len(drawn) > 10
    assert [what for what, done in told if done == 0] == ["checkpoint", "picture", "checkpoint", "last picture"]


def test_a_signal_while_the_images_are_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "images" / "a.png")
    monkeypatch.setattr("pushforward.data.datasets.read_image", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    words = ["train", str(tmp_path / "m"), "--data", str(tmp_path / "images"), "--steps", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130
    assert "while the images were read" in result.stderr


def test_another_training_is_not_continued(tmp_path: Path) -> None:
    train(TrainConfig(steps=2, **TINY), some_data(), tmp_path)
    with pytest.raises(PushforwardError, match=r"other settings \(seed, data differ\)"):
        train(TrainConfig(steps=4, seed=1, **TINY), some_data(20), tmp_path)
    assert train(TrainConfig(steps=2, **TINY), some_data(), tmp_path).resumed_from == 2
    assert train(TrainConfig(steps=3, **TINY), some_data(), tmp_path).steps == 3
    (tmp_path / "training" / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(PushforwardError, match="no readable checkpoint"):
        train(TrainConfig(steps=4, **TINY), some_data(), tmp_path)


def test_a_training_does_not_go_on_with_other_images_of_the_same_number_and_size(tmp_path: Path) -> None:
    """As of two data sets of 60000 pictures in 10 classes. Images decoded a level otherwise are the same ones."""
    data = some_data()
    assert data.labels is not None
    train(TrainConfig(steps=2, **TINY), data, tmp_path)
    others = [
        (replace(data, images=255 - data.images), "data"),
        (replace(data, labels=data.labels.flip(0)), "classes or captions"),
        (replace(data, classes=tuple(name + "s" for name in data.classes)), "classes or captions"),
        (replace(data, captions=("a cat",) * len(data)), "classes or captions"),
    ]
    for other, what in others:
        with pytest.raises(PushforwardError, match=rf"other settings \({what} differ\)"):
            train(TrainConfig(steps=4, **TINY), other, tmp_path)
    near = replace(data, images=(data.images.int() + 1).clamp_max(255).byte())
    assert train(TrainConfig(steps=4, **TINY), near, tmp_path).resumed_from == 2


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "statistics.safetensors"])
def test_a_training_replaces_no_file_that_it_did_not_write(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(PushforwardError, match=f"holds a {name} and no training"):
        train(TrainConfig(steps=1, **TINY), some_data(), tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_training_whose_first_checkpoint_could_not_be_written_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is written before it: that model is of the training, and is replaced."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr("pushforward.training.outputs.save_checkpoint", full)
        with pytest.raises(PushforwardError, match="there is no checkpoint yet"):
            train(TrainConfig(steps=2, **TINY), some_data(), tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert train(TrainConfig(steps=2, **TINY), some_data(), tmp_path).resumed_from == 0


def test_a_training_goes_on_with_a_lower_learning_rate(tmp_path: Path) -> None:
    """As one must whose loss ceased to be finite. With the least rate there is, no step moves the weights."""

    def weights() -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = torch.load(tmp_path / "training" / "checkpoint.pt")["network"]
        return kept

    train(TrainConfig(steps=2, **{**TINY, "learning_rate": 0.01}), some_data(), tmp_path)
    before = weights()
    assert train(TrainConfig(steps=4, **{**TINY, "learning_rate": 1e-30}), some_data(), tmp_path).resumed_from == 2
    assert all(torch.equal(value, before[name]) for name, value in weights().items())
    train(TrainConfig(steps=6, **{**TINY, "learning_rate": 0.01}), some_data(), tmp_path)
    assert not all(torch.equal(value, before[name]) for name, value in weights().items())


@pytest.mark.parametrize(("able", "precision"), [(True, "bf16"), (False, "no")])
def test_a_cpu_trains_in_bfloat16_where_it_has_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool, precision: str
) -> None:
    """Weights tell the precision: of one training they are the same bit for bit, and of another others."""
    if torch.cuda.is_available():
        pytest.skip("trains on the GPU")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    weights = {}
    for name in ("auto", "bf16", "no"):
        train(TrainConfig(steps=2, **{**TINY, "precision": name}), some_data(), tmp_path / name)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["unet.conv_in.weight"]
    assert not torch.equal(weights["bf16"], weights["no"])
    assert torch.equal(weights["auto"], weights[precision])


def test_compiling_is_refused_where_its_gradients_were_wrong(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("trains on the GPU")
    with pytest.raises(PushforwardError, match="wrong gradients"):
        train(TrainConfig(steps=1, compile=True, **TINY), some_data(), tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    train(TrainConfig(steps=2, **TINY), some_data(), tmp_path)
    before = (tmp_path / "training" / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises((PushforwardError, OSError)) as error:
            train(TrainConfig(steps=4, **TINY), some_data(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "too large" in str(error.value).lower()
    assert (tmp_path / "training" / "checkpoint.pt").read_bytes() == before
    assert train(TrainConfig(steps=4, **TINY), some_data(), tmp_path).resumed_from == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "steps or minutes"),
        ({"steps": 0}, "steps must be positive"),
        ({"steps": 1, "ema": 1.0}, "ema must be"),
        ({"steps": 1, "precision": "int4"}, "auto, no, bf16 or fp16"),
        ({"steps": 1, "process": "brownian"}, "Unknown process"),
        ({"steps": 1, "process_settings": {"gamma": 1.0}}, "does not take"),
        ({"steps": 1, "process_settings": {"beta_max": -1.0}}, "no diffusion from data to noise"),
        ({"steps": 1, "process_settings": {"beta_max": 0.0}}, "drawn from noise"),
        ({"steps": 1, "process": "ve", "process_settings": {"t_max": 1.0}}, "drawn from noise"),
        ({"steps": 1, "process": "ve", "process_settings": {"t_min": 0.5}}, "drawn clean"),
        ({"steps": 1, "sample_every": -1}, "sample_every must be 0 or more"),
        ({"steps": 1, "seed": -1}, "seed must be 0 or more"),
        ({"steps": 1, "network": "huge"}, "Unknown network"),
        ({"steps": 1, "process": "langevin", "prediction": "v"}, "scalar processes"),
        ({"steps": 1, "process": "flow", "prediction": "epsilon"}, "'epsilon' says nothing about the image"),
        ({"steps": 1, "process": "flow", "prediction": "score"}, "train with residual, v, velocity or sample"),
    ],
)
def test_bad_settings_are_one_clear_sentence(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(PushforwardError, match=said):
        train(TrainConfig(**settings), some_data(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_size_that_cannot_be_halved_names_one_that_can(tmp_path: Path) -> None:
    data = ImageData(torch.zeros(4, 1, 10, 10, dtype=torch.uint8))
    with pytest.raises(PushforwardError, match="--size 8"):
        train(TrainConfig(steps=1, **TINY), data, tmp_path)


def test_minutes_end_a_training(tmp_path: Path) -> None:
    report = train(TrainConfig(minutes=0.01, **TINY), some_data(), tmp_path)
    assert report.steps > 0
    assert report.seconds >= 0.6


def test_the_command_trains_and_reports(tmp_path: Path) -> None:
    for k in range(6):
        save_png(tmp_path / "images" / "ab"[k % 2] / f"{k}.png")
    (tmp_path / "images" / "a" / "broken.png").write_bytes(b"?")
    command = [sys.executable, "-m", "pushforward", "train", str(tmp_path / "m"), "--data", str(tmp_path / "images")]
    options = ["--steps", "2", "--batch", "4", "--network", "tiny", "--size", "8", "--sample-every", "0"]
    done = subprocess.run([*command, *options, "--json", "-", "--quiet"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 2
    assert len(report["skipped"]) == 1
    assert "left out" in done.stderr
    assert "1 file left out, 6 images read" in done.stderr
    assert f"pushforward train {tmp_path / 'm'}" in (tmp_path / "m" / "README.md").read_text()
    assert TIMES >= 1000

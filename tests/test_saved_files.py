"""Files that version 0.1.0 wrote: later versions read them, find the same in them, and go on with them.

How each was made is in `fixtures/v0.1/README.md`. Every test works on a copy. Figures are compared with what version
0.1.0 made of the same files, to the rounding of float32 on another machine.
"""

import json
import lzma
import os
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import pushforward as pf
from pushforward.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = Path(__file__).parent / "fixtures" / "v0.1"
PLACE = "/place/of/the/files"  # in what is kept, where the files lay
SAME, SIMILAR = 1e-4, 1e-3  # of one pass through a plan; of what is learnt, or moved by gradients
CODES = ["encoded", "labelled", "told", "inverted"]

GUIDED = ["--energy", "near:target.png:deviation=2", "--energy", "colour:#404040", "--plan", "ddim:steps=2", "--chains",
          "2", "--label", "1", "--device", "cpu"]  # fmt: skip
COMMANDS = {
    "encoded": "encode fashion-langevin clothes/0.png --solver gddim --noise 0.5 --steps 3 --device cpu",
    "labelled": "encode fashion-vp clothes --solver ddpm --steps 2 --label sneaker --label bag --guidance 2 "
    "--device cpu",
    "told": "encode emoji face.png --eta 0.5 --steps 2 --prompt noto --negative twemoji --guidance 2 --device cpu",
    "inverted": "invert fashion-vp clothes/1.png --solver ddim --steps 30 --label bag --device cpu",
    "interrupted": "train interrupted --data data.npz --network tiny --batch 8 --warmup 2 --ema 0.9 "
    "--learning-rate 0.003 --precision no --sample-every 0 --steps 3",
    "translated": "translate clothes --source fashion-vp --source-label sneaker --target-label bag --steps 3 "
    "--out translated --device cpu",
    "edited": "edit clothes --model fashion-vp --source-label sneaker --target-label bag --trials 2 --steps 3 "
    "--out edited --device cpu",
    "evaluation": "evaluate model --data data.npz --solvers auto,ddim --steps 3 --count 100 --batch 50 --converged 6 "
    "--resamples 2 --features features.pt --out evaluation --device cpu",
    "mala": ["guide", "model", *GUIDED, "--sampler", "mala:step-size=0.05", "--steps", "6", "--warm-up", "1",
             "--draws", "2", "--out", "mala"],
    "adam": ["guide", "model", *GUIDED, "--sampler", "adam", "--steps", "6", "--out", "adam"],
}  # fmt: skip


def known(name):
    """What version 0.1.0 found."""
    return json.loads((KEPT / "expected.json").read_text())[name]


def released(package):
    return version(package).partition("+")[0]


needs_the_libraries = pytest.mark.skipif(
    any(released(name) != was for name, was in known("versions").items() if name != "pushforward"),
    reason="results know their network by all its settings, and other versions of the libraries have other ones",
)
needs_the_version = pytest.mark.skipif(
    version("pushforward") != known("versions")["pushforward"],
    reason="every version makes the images that it evaluates itself",
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A copy of all files, which is the working folder."""
    place = shutil.copytree(KEPT, tmp_path / "files").resolve()
    for name in ("translated", "edited"):
        for file in (place / name / "settings.json", place / name / "names.json"):
            file.write_text(file.read_text().replace(PLACE, place.as_posix()))
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


def run(command, *more):
    """Run a command, and hand back its report."""
    words = command.split() if isinstance(command, str) else command
    result = CliRunner().invoke(app, [*words, *more, "--json", "report.json", "-q"])
    assert result.exit_code == 0, result.exception
    return json.loads(Path("report.json").read_text())


def expected(name):
    return load_file(KEPT / "expected.safetensors")[name]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(float)


def assert_close(found, wanted, tolerance=SAME):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


# -- codes -------------------------------------------------------------------------------------------------------------


def decoded(file):
    """The images of the codes in a file, in full precision: by the plan and the model that its header names."""
    with safe_open(file, "pt") as opened:
        head = json.loads(opened.metadata()["pushforward"])
    model = replace(pf.load(head["model"]), negative=head.get("negative", ""))
    times = torch.tensor(head["times"], dtype=torch.float64)
    plan = pf.SOLVERS[head["solver"]](model.process, times, **head["settings"])
    labels = head["labels"]
    if labels is not None and not isinstance(labels[0], str):
        labels = torch.tensor(labels)
    assert head["process"] == json.loads(json.dumps(model.process.config()))
    return pf.Diffusion(model, plan).given(labels, head["guidance"]).decode(pf.Code(**load_file(file)))


@pytest.mark.parametrize("name", CODES)
def test_codes_decode_to_the_same_images(files, name):
    assert_close(decoded(files / "codes" / f"{name}.safetensors"), expected(f"codes.{name}"))


@pytest.mark.parametrize("name", CODES)
def test_the_command_decodes_codes_to_the_same_pictures(files, name):
    """To one 8-bit value, which rounding may turn."""
    report = run(f"decode codes/{name}.safetensors --each again --out again.png --device cpu")
    wanted = sorted((files / "codes" / name).iterdir())
    assert [path.name for path in sorted((files / "again").iterdir())] == [path.name for path in wanted]
    for path in wanted:
        assert abs(pixels(path) - pixels(files / "again" / path.name)).max() <= 1
    assert (report["labels"], report["guidance"], report["times"]) == tuple(known("codes")[name])


@needs_the_libraries
@pytest.mark.parametrize("name", CODES)
def test_the_models_that_codes_were_made_with_are_known_again(files, name):
    assert run(f"decode codes/{name}.safetensors --out again.png --device cpu")["notes"] == []


# -- models and trainings ----------------------------------------------------------------------------------------------


def drawn(folder):
    """Four images of a model in a folder, of both classes."""
    model = pf.load(folder)
    plan = pf.SOLVERS["ddim"](model.process, pf.grid.power(model.process, 5), eta=0.5)
    return pf.Diffusion(model, plan).given(["0", "1", "1", "0"], 1.5).sample(4, seed=3)


def test_a_trained_model_draws_the_same_images(files):
    assert_close(drawn(files / "model"), expected("model"))


class Broken(ModuleType):
    """`diffusers` imports its parts when they are asked for, and tells by this which it cannot."""

    def __getattr__(self, name):
        raise RuntimeError(f"Failed to import diffusers.{name} because of the following error:\nNo such symbol")


def test_a_model_whose_library_cannot_be_imported_is_not_called_damaged(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", Broken("diffusers"))
    with pytest.raises(pf.PushforwardError, match=r"blocks of diffusers, which cannot be imported \(No such symbol\)"):
        pf.load("fashion-vp")


def test_an_interrupted_training_goes_on(files):
    packed = files / "interrupted" / "training" / "checkpoint.pt.xz"
    packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    report = run(COMMANDS["interrupted"])
    assert (report["resumed_from"], report["steps"], report["images"]) == (1, 3, 24)
    assert report["loss"] == pytest.approx(known("interrupted"), abs=SIMILAR)
    assert_close(drawn(files / "interrupted"), expected("interrupted"), SIMILAR)


# -- chains and descents -----------------------------------------------------------------------------------------------


@needs_the_libraries
@pytest.mark.parametrize("name", ["mala", "adam"])
def test_interrupted_chains_and_descents_go_on(files, name):
    """To the figures of a run that was not interrupted; and the minute that the first part took counts."""
    report, whole = run(COMMANDS[name]), known(name)
    assert report["seconds"] > 60
    assert len(list((files / name).glob("*.safetensors"))) == 2  # codes besides: nothing was put aside
    assert report["nfe"] == whole["nfe"]
    for key in ("energy", "prior"):
        assert report["traces"][key] == pytest.approx(whole["traces"][key], rel=SIMILAR)
    assert report["energies"] == pytest.approx(whole["energies"], rel=SIMILAR)
    assert [row["energy"] for row in report["samples"]] == pytest.approx(whole["samples"], rel=SIMILAR)


# -- folders of results ------------------------------------------------------------------------------------------------


def aged(folder):
    """The files below a folder, made old."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    for path in found:
        os.utime(path, (0, 0))
    return found


@needs_the_libraries
@pytest.mark.parametrize("name", ["translated", "edited"])
def test_results_are_kept(files, name):
    results = aged(files / name if name == "edited" else files / name / "images")
    report = run(COMMANDS[name])
    assert (report["count"], report["done_before"]) == (2, 2)
    assert report["notes"] == ["there already: 2 results"]
    changed = [path.name for path in results if path.stat().st_mtime != 0]
    assert changed == []


@needs_the_libraries
def test_what_was_found_of_edits_is_reported(files):
    """As it is in the files: here a score that no edit has."""
    for file in (files / "edited").rglob("candidates.json"):
        found = json.loads(file.read_text())
        found["candidates"][0]["selected_by"] = 12.5
        file.write_text(json.dumps(found))
    rows = run(COMMANDS["edited"])["images"]
    assert [row["selected_by"] for row in rows] == [12.5, 12.5]
    assert [[row["name"], row["best"], row["reported"]["psnr"]] for row in rows] == known("edited")


@needs_the_libraries
@needs_the_version
def test_an_interrupted_evaluation_goes_on(files):
    """One of DDIM's two files of images is missing and is made; all that is there stays.

    `auto` follows another rule than in 0.1: its images, and the converged ones, are made anew beside.
    """
    kept = aged(files / "evaluation")
    run(COMMANDS["evaluation"])
    assert [path.name for path in kept if path.stat().st_mtime != 0] == []
    assert len(list(files.glob("evaluation/*/*/0*.safetensors"))) == 6 + 4
    assert len(list(files.glob("evaluation/*/ddim*/0*.safetensors"))) == 2
    found = json.loads((files / "evaluation" / "results.json").read_text())["rows"]
    for row, (sampler, nfe, distance) in zip(found, known("evaluation"), strict=True):
        assert (row["sampler"], row["nfe"]) == (sampler, nfe)
        if sampler == "ddim":
            assert row["measures"]["features"]["frechet"] == pytest.approx(distance, rel=0.02)


# -- schedulers of diffusers -------------------------------------------------------------------------------------------


def piped(folder):
    """Two images of a pipeline that keeps our scheduler, which has to be imported before: diffusers will not."""
    ours = pf.PushforwardScheduler
    pipe = diffusers.DDPMPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is ours
    pipe.set_progress_bar_config(disable=True)
    made = pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(3), output_type="np")
    return torch.from_numpy(made.images)


def sampled(folder):
    """Two images of the same folder, by a plan of ours."""
    model = pf.load(folder)
    plan = pf.SOLVERS["ddim"](model.process, pf.grid.power(model.process, 4))
    return pf.Diffusion(model, plan).sample(2, seed=3)


def test_a_pipeline_comes_with_its_scheduler(files):
    assert_close(piped(files / "pipeline"), expected("pipeline"))


def test_the_folder_of_such_a_pipeline_is_a_model(files):
    assert_close(sampled(files / "pipeline"), expected("pipeline.model"))


@pytest.mark.parametrize("name", ["scheduler", "scheduler-flow"])
def test_schedulers_come_with_their_settings(files, name):
    scheduler = pf.PushforwardScheduler.from_pretrained(files / name)
    wanted = known(name)
    assert {key: scheduler.config[key] for key in wanted["config"]} == wanted["config"]
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx(wanted["timesteps"], rel=1e-5)
    assert scheduler.sigmas.tolist() == pytest.approx(wanted["sigmas"], rel=1e-5)

"""`pushforward evaluate`: figures that are right, the same however they were made, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pushforward.cli import app
from pushforward.data.datasets import ImageData
from pushforward.data.plots import mark_plainly
from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.evaluation.report import table, with_error
from pushforward.evaluation.runs import Evaluation
from pushforward.evaluation.samplers import check, evaluate, labels_for
from pushforward.execute.budget import spent
from pushforward.linear import VP, Blurring, Gaussian, Langevin, Process
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.model import Model, load, save_model
from pushforward.plan import save_plan
from pushforward.vision.features import FeatureNet
from support.helpers import gaussian_denoiser
from support.models import SIZE, tiny

runner = CliRunner()
COUNT = 120
SMALL = Evaluation(count=COUNT, batch=50, converged=12, resamples=3)


class Means(torch.nn.Module):
    """Means over quarters of the images: four features, whose Gaussian is known."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, 2).flatten(1)


NET = FeatureNet("Means", Means(), "means of quarters")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def gaussian_model(process: Process, variance: float = 0.04) -> Model:
    """A model of white noise around 0 whose denoiser is exact."""
    data = Gaussian(variance)
    return Model("exact", process, gaussian_denoiser(process, data), (1, SIZE, SIZE), reference=data)


def noise(count: int, deviation: float = 0.2, seed: int = 9) -> ImageData:
    """Real images of that model."""
    generator = torch.Generator().manual_seed(seed)
    values = deviation * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    return ImageData(((values + 1) * 127.5).round().clamp(0, 255).byte())


@pytest.mark.parametrize("process", [VP(), Langevin(), Blurring((SIZE, SIZE))], ids=lambda p: p.name)
def test_an_exact_model_is_as_good_as_the_data(process, tmp_path):
    """Its extrapolated distance is 0 within the reported error, and a sampler of few steps is told from it."""
    settings = replace(SMALL, count=400, batch=200, converged=60, resamples=20)
    samplers = [SamplerSpec("euler-maruyama", 12), SamplerSpec("ddim", 12)]
    rows = evaluate(gaussian_model(process), samplers, noise(3000), [NET],
                    tmp_path, settings)  # fmt: skip
    converged, rough, ddim = rows
    measures = converged.measures["Means"]
    # A distance is a square, whose error near zero is not normal; the reference's own share is a seventh.
    assert abs(measures["extrapolated"]) < 5 * measures["extrapolated_error"]
    assert abs(measures["kernel"]) < 5 * measures["kernel_error"]
    assert min(measures[name] for name in ("precision", "recall", "coverage")) > 0.8
    assert measures["ratio"] == 1
    assert measures["ratio_error"] == 0
    assert rough.measures["Means"]["frechet"] > 2 * measures["frechet"]
    assert rough.error is None  # it draws noise on its way
    assert 0 < ddim.error["median"] < ddim.error["worst"] < 1
    assert (converged.nfe, rough.nfe, ddim.nfe) == (60, 12, 12)


def test_the_paired_error_falls_with_steps(tmp_path):
    """First order: four times the steps, a quarter of the error, within a third."""
    samplers = [SamplerSpec("ddim", n, grid="angle") for n in (10, 40)]
    settings = replace(SMALL, converged=100)
    rows = evaluate(gaussian_model(VP()), samplers, noise(200), [NET], tmp_path, settings)
    assert rows[1].error["median"] / rows[2].error["median"] == pytest.approx(4, rel=0.35)


def test_all_steps_at_once_are_the_same_images(tmp_path):
    """Within the tolerance, 1e-3; in fewer rounds and more evaluations."""
    samplers = [SamplerSpec("ddim", 20), parse("ddim:parallel=preconditioned:within=0.001")]
    rows = evaluate(gaussian_model(VP()), samplers, noise(200), [NET], tmp_path, SMALL)
    assert rows[1].error["median"] == pytest.approx(rows[2].error["median"], abs=2e-3)
    assert rows[2].rounds < 20 == rows[1].rounds
    assert rows[2].measures["Means"]["frechet"] == pytest.approx(rows[1].measures["Means"]["frechet"], rel=0.05)


def test_figures_do_not_depend_on_interruptions(tmp_path):
    """Shards of a first run are used again, and what is missing is made: the same rows, bit for bit."""
    model, data, samplers = tiny(VP()), noise(150), [parse("ddim:eta=1"), SamplerSpec("heun", 4)]
    whole = evaluate(model, samplers, data, [NET], tmp_path / "a", SMALL)
    calls = []

    def stop(what: str, _: int) -> None:
        calls.append(what)
        if len(calls) == 6:  # a shard of the first sampler
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, samplers, data, [NET], tmp_path / "b", SMALL, callback=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*.safetensors")}
    assert kept
    assert evaluate(model, samplers, data, [NET], tmp_path / "b", SMALL) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    more = evaluate(model, samplers, data, [NET], tmp_path / "b", replace(SMALL, count=150))
    assert more[0].count == 150


def test_other_settings_are_other_images(tmp_path):
    """No shard of one seed, model or setting of its network is taken for another's."""
    model, data = tiny(VP()), noise(150)
    first = evaluate(model, [], data, [NET], tmp_path, SMALL)
    assert evaluate(model, [], data, [NET], tmp_path, replace(SMALL, seed=1)) != first
    clipped = replace(model, denoiser=replace(model.denoiser, clip=0.1))
    assert evaluate(clipped, [], data, [NET], tmp_path, SMALL) != first
    with torch.no_grad():
        next(model.module.parameters()).add_(0.1)
    assert evaluate(model, [], data, [NET], tmp_path, SMALL) != first
    assert len(list(tmp_path.iterdir())) == 4


def test_bfloat16_is_near_full_precision(tmp_path):
    """Three significant digits: the same images up to a hundredth or so."""
    model, data = tiny(VP()), noise(150)
    full, half = (
        evaluate(model, [], data, [NET], tmp_path, replace(SMALL, precision=name))[0] for name in ("no", "bf16")
    )
    assert full != half
    assert half.measures["Means"]["frechet"] == pytest.approx(full.measures["Means"]["frechet"], rel=0.1)


def test_labels_follow_the_data():
    """As often as in the data, and the first ones of a larger number are the same."""
    model = replace(gaussian_model(VP()), classes=("a", "b"))
    data = replace(noise(200), labels=torch.tensor([0] * 150 + [1] * 50), classes=("a", "b"))
    labels, whence = labels_for(model, data, replace(SMALL, count=4000))
    assert whence == "data"
    assert float(labels.double().mean()) == pytest.approx(0.25, abs=0.03)  # 4 standard errors
    assert torch.equal(labels[:500], labels_for(model, data, replace(SMALL, count=500))[0])
    assert labels_for(gaussian_model(VP()), data, SMALL) == (None, "none")
    numbered = replace(data, classes=("0", "1"))
    assert torch.equal(labels, labels_for(model, numbered, replace(SMALL, count=4000))[0])
    swapped = replace(data, classes=("b", "a"))
    assert torch.equal(labels, 1 - labels_for(model, swapped, replace(SMALL, count=4000))[0])
    other, whence = labels_for(model, replace(data, classes=("c", "d")), replace(SMALL, count=4000))
    assert whence == "uniform"
    assert float(other.double().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (noise(99), SMALL, "at least 100 images of each kind; 120 are to be generated and the data have 99"),
        (noise(200), replace(SMALL, count=50), "at least 100 images of each kind; 50 are"),
        (ImageData(torch.zeros(200, 1, 9, 9).byte()), SMALL, "makes images of 1x8x8, the data are 1x9x9"),
        (ImageData(torch.zeros(200, 3, SIZE, SIZE).byte()), SMALL, "the data are 3x8x8"),
    ],
)
def test_what_does_not_fit_is_refused(data, settings, said):
    with pytest.raises(PushforwardError, match=said):
        check(gaussian_model(VP()), data, settings)


def test_images_are_what_a_decoder_makes():
    """A latent model's images, not its latents, are compared with the data."""
    model = replace(gaussian_model(VP()), decoder=torch.nn.Upsample(scale_factor=2))
    with pytest.raises(PushforwardError, match="makes images of 1x16x16, the data are 1x8x8"):
        check(model, noise(150), SMALL)


def test_a_failing_sampler_is_named(tmp_path):
    model = replace(gaussian_model(VP()), denoiser=Function(lambda u, t: u / 0))
    with pytest.raises(PushforwardError, match="converged, model 'exact': "):
        evaluate(model, [], noise(150), [NET], tmp_path, SMALL)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_classes_and_guidance(tmp_path, guidance):
    """Guidance asks the network twice a call, and changes the images."""
    model = tiny(VP())
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    row = evaluate(model, [], noise(150), [NET], tmp_path, replace(SMALL, guidance=guidance))[0]
    plain = evaluate(model, [], noise(150), [NET], tmp_path, SMALL)[0]
    assert (row == plain) is (guidance == 1)


@pytest.mark.parametrize("setting", [{"count": 0}, {"batch": 0}, {"resamples": 1}, {"precision": "int8"}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(PushforwardError):
        Evaluation(**setting)


def test_a_damaged_shard_is_named(tmp_path):
    model, data = tiny(VP()), noise(150)
    evaluate(model, [], data, [NET], tmp_path, SMALL)
    shard = sorted(tmp_path.rglob("*.safetensors"))[0]
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}  # not the mapped file
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(PushforwardError, match=f"{shard.name} is damaged .* remove it"):
        evaluate(model, [], data, [NET], tmp_path, SMALL)
    save_file({**tensors, "images": tensors["images"][:3]}, shard)
    with pytest.raises(PushforwardError, match="damaged; remove the file"):
        evaluate(model, [], data, [NET], tmp_path, SMALL)
    shard.unlink()
    assert evaluate(model, [], data, [NET], tmp_path, SMALL)


def test_the_table_has_a_line_a_row(tmp_path):
    rows = evaluate(gaussian_model(VP()), [SamplerSpec("ddim", 5)], noise(150), [NET], tmp_path, SMALL)
    head, *lines = table(rows).splitlines()
    assert "FD-Means" in head
    assert "FID" not in head
    assert [line.split()[1] for line in lines] == ["converged", "ddim"]
    assert len({line.index(word) for line, word in zip(lines, ("converged", "ddim"), strict=True)}) == 1


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (12.3456, 0.05, "12.35 ± 0.05"), (1234.6, 3.2, "1235 ± 3"), (9.996, 0.02, "9.996 ± 0.02"),
        (-12.345, 0.002, "-12.345 ± 0.002"), (999.96, 0.2, "999.96 ± 0.2"), (11.37, 1.1, "11.4 ± 1"),
        (0.0163, 0.005, "0.0163 ± 0.005"), (0.473, 2.0, "0.473 ± 2"), (1.5e-5, 1e-8, "1.5e-05 ± 1e-08"),
        (-1.2, 30.0, "-1 ± 30"), (0.0, 0.1, "0 ± 0.1"), (float("inf"), 0.1, "inf"), (12.3456, None, "12.3"),
    ],
)  # fmt: skip
def test_a_figure_is_said_as_precisely_as_its_error(value, error, said):
    """Three digits at least, and no fewer than the error's first one is worth."""
    assert with_error(value, error) == said


# -- from the command line -------------------------------------------------------------------------------------------


class Script(torch.nn.Module):
    """A feature network as users bring them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), [2, 2]).flatten(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model's folder, a file of data, and a feature network."""
    folder = tmp_path_factory.mktemp("world")
    save_model(tiny(VP()), folder / "model")
    data = noise(150)
    np.savez(folder / "data.npz", x_test=data.images.permute(0, 2, 3, 1).numpy())
    torch.jit.script(Script()).save(folder / "quarters.pt")
    return folder


def arguments(world, out, *more):
    return [str(a) for a in (
        "evaluate", world / "model", "--data", world / "data.npz", "--split", "test", "--features",
        world / "quarters.pt", "--count", COUNT, "--batch", 40, "--converged", 12, "--resamples", 3, "--out", out,
        *more,
    )]  # fmt: skip


def run(*args):
    return runner.invoke(app, list(args), catch_exceptions=True)


def test_the_command_writes_everything(world, tmp_path):
    out = tmp_path / "out"
    result = run(
        *arguments(world, out, "--solvers", "ddim,heun,rk45:tolerance=0.1", "--nfe", "4,8", "--json", "-", "-q")
    )
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert report == json.loads((out / "results.json").read_text())
    assert [(row["sampler"], row["nfe"]) for row in report["rows"][:5]] == [
        ("converged", 12), ("ddim", 4), ("ddim", 8), ("heun", 3), ("heun", 7)
    ]  # fmt: skip
    assert report["rows"][5]["sampler"] == "rk45:tolerance=0.1"
    assert report["reference_count"] == 150
    assert "FD-quarters" in (out / "table.txt").read_text()
    with Image.open(out / "distances.png") as picture:
        assert picture.size[0] > 300
    with Image.open(out / "samplers.png") as picture:  # a row for each sampler
        assert picture.width > 12 * 96
        assert picture.height >= len(report["rows"]) * 96


def test_samplers_that_say_what_they_take_do_so_once(world, tmp_path):
    """As many calls as `sample` makes in so many rounds, or as the plan in a file has, whatever others take."""
    model = load(world / "model")
    save_plan(parse("ddim:steps=5").plan(model), tmp_path / "five.plan")
    samplers = ("--solvers", f"auto:rounds=3,{tmp_path / 'five.plan'},ddim", "--steps", "4,7", "--json", "-", "-q")
    result = run(*arguments(world, tmp_path / "out", *samplers))
    assert result.exit_code == 0, result.exception
    rows = json.loads(result.stdout)["rows"][1:]
    plan = parse("auto:rounds=3").plan(model)
    assert [row["steps"] for row in rows] == [len(plan.steps) - 1, 5, 4, 7]
    assert rows[1]["sampler"].startswith("five.plan:digest=")  # a folder's name would leave plots no room
    assert rows[0]["rounds"] == 3
    assert plan.nfe < rows[0]["nfe"] <= spent(plan.nfe, 3)


def test_samplers_without_an_error_are_drawn(world, tmp_path):
    """The converged run is one of `auto`, from which this one differs in nothing: no scale of logarithms has room."""
    result = run(*arguments(world, tmp_path, "--solver", "auto", "--nfe", "12", "-q"))
    assert result.exit_code == 0, result.exception
    assert {row["error"] and row["error"]["median"] for row in report_rows(tmp_path)} == {None, 0}
    assert (tmp_path / "results.json").is_file()


def report_rows(out):
    return json.loads((out / "results.json").read_text())["rows"]


def test_two_processes_give_the_same_figures(world, tmp_path):
    """Under torchrun, shards and the rows of parallel calls are shared; the same rows to the last bit but rounding."""
    samplers = ("--solvers", "ddim:eta=1,ddim:parallel=preconditioned", "--steps", "6", "-q")
    alone = run(*arguments(world, tmp_path / "alone", *samplers))
    assert alone.exit_code == 0, alone.exception
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "pushforward", *arguments(world, tmp_path / "two", *samplers, "--device", "cpu")]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("alone", "two")]
    for one, two in zip(*rows, strict=True):
        assert one["measures"]["quarters"] == pytest.approx(two["measures"]["quarters"], rel=1e-3, abs=1e-6)
        assert (one["sampler"], one["nfe"]) == (two["sampler"], two["nfe"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "10,some"], "positive whole numbers"),
        (["--steps", "10", "--nfe", "10"], "not both"),
        (["--solvers", "fastest"], "Unknown solver 'fastest'"),
        (["--solvers", "ddim:order=3"], "no setting 'order'"),
        (["--features", "resnet"], "resnet"),
        (["--count", "20"], "at least 100 images"),
        (["--precision", "half"], "precision is"),
        (["--statistics", "nothing.npz"], "nothing.npz"),
        (["--guidance", "2", "--seed", "-1"], "seed must not be negative"),
        (["--seed", str(2**63)], "have less than 64 bits; got"),
        (["--solvers", "rk45:parallel=preconditioned"], "cannot be taken at once"),
        (["--solvers", "ddim:eta=high"], "takes a number as eta; got 'high'"),
        (["--solvers", "gddim:reference=spectra"], "data, spectrum or the variance"),
        (["--size", "9"], "the data are 1x9x9"),
        (["--features", "fashion"], "28x28"),
    ],
)
def test_wrong_options_get_a_sentence(world, tmp_path, options, said):
    result = run(*arguments(world, tmp_path / "out", *options))
    assert result.exit_code != 0
    assert said in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_cache_does_not_grow_stale(world, tmp_path):
    """Other data under the same name are other references."""
    out = tmp_path / "out"
    shutil.copytree(world, tmp_path / "own")
    assert run(*arguments(tmp_path / "own", out, "-q")).exit_code == 0
    before = json.loads((out / "results.json").read_text())["rows"]
    other = noise(150, deviation=0.5)
    np.savez(tmp_path / "own" / "data.npz", x_test=other.images.permute(0, 2, 3, 1).numpy())
    assert run(*arguments(tmp_path / "own", out, "-q")).exit_code == 0
    after = json.loads((out / "results.json").read_text())["rows"]
    assert before[0]["measures"]["quarters"]["frechet"] != after[0]["measures"]["quarters"]["frechet"]


def test_another_evaluation_keeps_what_an_earlier_one_wrote(world, tmp_path):
    """Its table and pictures move to a folder of their own, its images serve again; the same one moves nothing."""
    out, written = tmp_path / "out", ("results.json", "table.txt", "distances.png", "samplers.png")
    first = arguments(world, out, "--solvers", "ddim", "--nfe", "4", "-q")
    assert run(*first).exit_code == 0
    before = {name: (out / name).read_bytes() for name in written}
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert "earlier" not in run(*first).output
    assert not list(out.glob("earlier-*"))
    result = run(*arguments(world, out, "--solvers", "heun", "--nfe", "4", "-q"))
    assert result.exit_code == 0, result.exception
    (place,) = out.glob("earlier-*")
    assert f"results of another evaluation; they are in {place} now" in result.output
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert "heun" in (out / "table.txt").read_text()
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


def test_published_statistics_take_the_place_of_the_data(world, tmp_path):
    """Those of the data themselves give the same distance, and no measures that need the images."""
    script = torch.jit.load(world / "quarters.pt")
    images = noise(150).images
    x = script(images.expand(-1, 3, -1, -1)).double()
    np.savez(tmp_path / "stats.npz", mu=x.mean(0).numpy(), sigma=x.T.cov().numpy())
    found = []
    for more in ((), ("--statistics", tmp_path / "stats.npz")):
        assert run(*arguments(world, tmp_path / "out", "-q", *more)).exit_code == 0
        found.append(json.loads((tmp_path / "out" / "results.json").read_text()))
    own, published = (report["rows"][0]["measures"]["quarters"] for report in found)
    assert published["frechet"] == pytest.approx(own["frechet"], rel=1e-4)  # features in float32
    assert "kernel" not in published
    assert found[1]["reference_count"] is None
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    result = run(*arguments(world, tmp_path / "out", "-q", "--statistics", tmp_path / "stats.npz"))
    assert "statistics are of 5 numbers" in str(result.exception)


def test_models_of_one_name_are_told_apart(world, tmp_path):
    """Two folders called model are called by their paths; the same one twice is refused."""
    shutil.copytree(world, tmp_path / "other")
    args = arguments(world, tmp_path / "out", "-q")
    both = run(*args[:1], str(tmp_path / "other" / "model"), *args[1:])
    assert both.exit_code == 0, both.exception
    names = [row["model"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]]
    assert len(set(names)) == 2
    assert "named twice" in str(run(*args[:1], args[1], *args[1:]).exception)


@pytest.mark.parametrize("ends", [(5, 86), (0.03, 0.14), (4, 1000), (6, 8), (0.16, 0.165), (1e-7, 1e-3)])
def test_marks_of_logarithmic_axes_are_plain_numbers_that_do_not_touch(ends: tuple[float, float]):
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis, far, near in ((axes.xaxis, "x1", "x0"), (axes.yaxis, "y1", "y0")):
        mark_plainly(axis)
        figure.draw_without_rendering()
        shown = [
            text
            for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            if ends[0] <= place <= ends[1]
        ]
        assert len(shown) >= 2
        assert all(float(text.get_text()) > 0 for text in shown)  # 3 x 10^1 is none
        boxes = [text.get_window_extent() for text in shown]
        assert all(getattr(a, far) < getattr(b, near) for a, b in pairwise(boxes))
        assert not any(text.get_text() for text in axis.get_ticklabels(minor=True))

"""`pushforward models`, `sample` and `plot-plan` as a user runs them, on a tiny model of their own and the zoo's."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from pushforward.cli import app
from pushforward.linear import VP, Langevin
from pushforward.model import save_model, zoo
from test_pushforward import SIZE, tiny

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture(scope="module", params=[VP(), Langevin()], ids=lambda p: p.name)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / request.param.name
    save_model(tiny(request.param), path)
    return path


def test_models_lists_the_zoo():
    result = invoke("models", "--json", "-")
    rows = json.loads(result.stdout)["models"]
    assert [row["name"] for row in rows] == zoo.names()
    assert all({"name", "process", "data", "shape", "parameters", "bytes"} <= set(row) for row in rows)
    text = invoke("models").stdout
    assert all(name in text for name in zoo.names())


@pytest.mark.parametrize("options", [[], ["--solver", "gddim", "--order", 2], ["--solver", "ddim", "--eta", 0.5]])
def test_sample_writes_a_picture_and_a_report(folder, tmp_path, options):
    out, report = tmp_path / "grid.png", tmp_path / "report.json"
    result = invoke("sample", folder, "--steps", 3, "--count", 6, "--out", out, "--json", report, "-q", *options)
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        assert picture.size == (3 * SIZE * 8, 2 * SIZE * 8) or picture.size == (2 * SIZE * 8, 3 * SIZE * 8)
    values = json.loads(report.read_text())
    assert {"model", "process", "solver", "steps", "count", "seed", "nfe", "rounds", "seconds"} <= set(values)
    assert (values["steps"], values["count"], values["nfe"]) == (3, 6, 3)


def test_the_same_seed_gives_the_same_picture(folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.png"
        result = invoke("sample", folder, "--steps", 2, "--count", 2, "--seed", seed, "--out", out, "-q")
        assert result.exit_code == 0, result.output
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_animation_single_images_and_labels(folder, tmp_path):
    result = invoke(
        "sample", folder, "--steps", 4, "--count", 3, "--label", "b", "--guidance", 2, "--out", tmp_path / "x.png",
        "--animate", tmp_path / "x.gif", "--each", tmp_path / "each", "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 5
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == ["00000.png", "00001.png", "00002.png"]


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_an_animation_shows_the_first_batch_alone(folder, tmp_path, quiet):
    out, film = tmp_path / "x.png", tmp_path / "x.gif"
    result = invoke("sample", folder, "--steps", 3, "--count", 5, "--batch", 2, "--out", out, "--animate", film, *quiet)
    assert result.exit_code == 0, result.output
    with Image.open(film) as animation:
        assert animation.n_frames == 4


def test_adaptive_steps(folder, tmp_path):
    report = tmp_path / "report.json"
    out = tmp_path / "x.png"
    result = invoke("sample", folder, "--solver", "rk45", "--count", 1, "--out", out, "--json", report, "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(report.read_text())
    assert values["steps"] is None
    assert values["nfe"] > 10


def test_plot_plan(folder, tmp_path):
    out = tmp_path / "plan.png"
    result = invoke("plot-plan", folder, "--solver", "unipc", "--steps", 5, "--out", out, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["nfe"] == 5
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "odd"], "Unknown solver 'odd'"),
        (["--solver", "ddim", "--order", 2], "has no setting 'order'"),
        (["--grid", "odd", "--solver", "ddim"], "Unknown grid 'odd'"),
        (["--label", "c"], "no class 'c'"),
        (["--guidance", 2, "--solver", "rk45", "--steps", 3, "--eta", 1], "chooses its own settings"),
        (["--end", 2, "--solver", "ddim"], "down to end"),
        (["--out", "x.mp3"], "suffix '.mp3'"),
        (["--animate", "x.png"], "suffix '.png'"),
        (["--device", "cuda:7"], "cannot be used"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("sample", folder, "--count", 1, "--steps", 2, "-q", *options)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())

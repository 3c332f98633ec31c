"""`pushforward models`, `sample` and `plot-plan` as a user runs them, on a tiny model of their own and the zoo's."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pushforward.errors import PushforwardError
from pushforward.linear import VP, Langevin
from pushforward.maps.diffusion import Diffusion
from pushforward.model import save_model, zoo
from support.cli import invoke
from support.models import SIZE, tiny


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
        assert picture.width >= 2 * SIZE * 12
        assert picture.height >= 3 * SIZE * 12
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


def test_fewer_images_do_not_join_those_of_an_earlier_run(folder, tmp_path):
    """They are refused before the work, and as many take their places; pictures of other names are nobody's."""
    (tmp_path / "each").mkdir()
    (tmp_path / "each" / "sheet.png").write_bytes(b"mine")

    def drawn(count):
        out = tmp_path / f"{count}.png"
        return invoke("sample", folder, "--steps", 2, "--count", count, "--each", tmp_path / "each", "--out", out, "-q")

    assert drawn(3).exit_code == drawn(3).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "each").iterdir()}
    message = str(drawn(2).exception)
    assert "holds 1 numbered image beyond the 2 to be written, of an earlier run (00002.png, for instance)" in message
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "each").iterdir()} == before
    assert not (tmp_path / "2.png").exists()


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_an_animation_shows_the_first_batch_alone(folder, tmp_path, quiet):
    out, film = tmp_path / "x.png", tmp_path / "x.gif"
    result = invoke("sample", folder, "--steps", 3, "--count", 5, "--batch", 2, "--out", out, "--animate", film, *quiet)
    assert result.exit_code == 0, result.output
    with Image.open(film) as animation:
        assert animation.n_frames == 4


def test_an_animation_of_rounds_shows_all_times_of_each(folder, tmp_path):
    film, report = tmp_path / "x.gif", tmp_path / "report.json"
    result = invoke("sample", folder, "--steps", 6, "--count", 2, "--solver", "ddim", "--out", tmp_path / "x.png",
                    "--parallel", "--animate", film, "--json", report, "-q")  # fmt: skip
    assert result.exit_code == 0, result.output
    with Image.open(film) as animation:
        assert animation.n_frames == json.loads(report.read_text())["rounds"]
        assert animation.width > 7 * SIZE * 12  # as many times


def test_adaptive_steps(folder, tmp_path):
    report = tmp_path / "report.json"
    out = tmp_path / "x.png"
    result = invoke("sample", folder, "--solver", "rk45", "--count", 1, "--out", out, "--json", report, "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(report.read_text())
    assert values["steps"] is None
    assert result.output == ""
    assert values["nfe"] > 10


def test_one_is_said_as_one(folder, tmp_path):
    result = invoke("sample", folder, "--steps", 1, "--count", 1, "--out", tmp_path / "one.png")
    assert f"{tmp_path / 'one.png'}: 1 image, 1 network evaluation each, " in result.stdout


def test_plot_plan(folder, tmp_path):
    out = tmp_path / "plan.png"
    result = invoke("plot-plan", folder, "--solver", "unipc", "--steps", 5, "--out", out, "--json", "-")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["nfe"] == 5
    if told["process"] == "vp":  # a model that always answers 1 has the state alpha at every time, whatever the solver
        assert min(min(node["terms"].values(), default=0) for node in told["nodes"]) < 0
        alpha = VP().alpha_sigma(torch.tensor([node["time"] for node in told["nodes"]], dtype=torch.float64))[0]
        for node, expected in zip(told["nodes"][1:], alpha[1:].tolist(), strict=True):
            terms = [(name.split(), value) for name, value in node["terms"].items()]
            found = sum(value * (float(alpha[int(k)]) if kind == "state" else 1) for (kind, k), value in terms)
            assert found == pytest.approx(expected, abs=1e-9)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "odd"], "Unknown solver 'odd'"),
        (["--solver", "ddim", "--order", 2], "has no setting 'order'"),
        (["--grid", "odd", "--solver", "ddim"], "Unknown grid 'odd'"),
        (["--label", "c"], "no class 'c'"),
        (["--guidance", 2, "--solver", "rk45", "--eta", 1], "chooses its own settings"),
        (["--solver", "rk45"], "chooses its own settings; leave out steps"),
        (["--end", 2, "--solver", "ddim"], "down to end"),
        (["--out", "x.mp3"], "got x.mp3"),
        (["--animate", "x.png"], "got x.png"),
        (["--device", "cuda:7"], "cannot be used"),
        (["--solver", "-1"], "Unknown solver '-1'"),
        (["--label", "a", "--guidance", "1e300"], "finite number of 32 bits; got 1e+300"),
        (["--grid", "", "--solver", "ddim"], "Unknown grid ''"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("sample", folder, "--count", 1, "--steps", 2, "-q", *options)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())


TOGETHER = ["--solver", "ddim", "--steps", 4, "--count", 2]


@pytest.mark.parametrize("option", [["--check"], ["--tolerance", 0.1], ["--window", 2], ["--max-rows", 2]])
def test_options_of_parallel_are_not_taken_without_it(folder, tmp_path, option):
    result = invoke("sample", folder, "--steps", 2, "--count", 1, "--out", tmp_path / "x.png", "-q", *option)
    assert result.exit_code != 0
    assert f"{option[0]} cannot be used here" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rest", [["-q"], ["--check", "-q"], ["--out", "other.png"], []], ids=str)
def test_parallel_alone_is_the_best_method(folder, tmp_path, monkeypatch, rest):
    monkeypatch.chdir(tmp_path)
    result = invoke("sample", folder, *TOGETHER, "--json", "report.json", "--parallel", *rest)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report.json").read_text())["parallel"] == "preconditioned"
    result = invoke("sample", folder, *TOGETHER, "--json", "report.json", "--parallel", "plain", *rest)
    assert json.loads((tmp_path / "report.json").read_text())["parallel"] == "plain"


@pytest.mark.parametrize(("bound", "steps"), [([], 12), (["--max-evaluations", 21], 8), (["--steps", 6], 6)])
def test_rounds_choose_steps_and_their_error_is_measured(folder, tmp_path, bound, steps):
    """With 3 rounds, which may leave any error: none is an error of the command."""
    report = tmp_path / "report.json"
    result = invoke("sample", folder, "--rounds", 3, *bound, "--count", 2, "--check", "--out", tmp_path / "x.png", "-q",
                    "--json", report)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert (found["steps"], found["parallel"]) == (steps, "preconditioned")
    assert found["rounds"] <= 3
    assert "median" in found["relative_error"]


@pytest.mark.parametrize(("rounds", "told"), [(1, False), (6, True)])
def test_an_estimate_that_says_little_is_not_told(folder, tmp_path, rounds, told):
    """After one round it is a multiple of the image; 6 rounds make 6 steps exact."""
    report = tmp_path / "report.json"
    result = invoke("sample", folder, "--rounds", rounds, "--steps", 6, "--count", 2, "--out", tmp_path / "x.png",
                    "--json", report)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (json.loads(report.read_text())["residual"] < 0.05) is told
    assert ("error estimated at" in result.output) is told


@pytest.mark.parametrize(
    "rest", [["--rounds", 3, "--parallel", "auto"], ["--max-evaluations", 9], ["--rounds", 3, "--solver", "rk45"]]
)
def test_senseless_budgets_are_refused(folder, tmp_path, rest):
    result = invoke("sample", folder, "--count", 1, "--out", tmp_path / "x.png", "-q", *rest)
    assert isinstance(result.exception, PushforwardError)
    assert not list(tmp_path.iterdir())


def test_a_check_runs_step_by_step_whichever_way_the_solver_names(folder, tmp_path, monkeypatch):
    """Not all at once for a second time, which would find no error whatever the images are."""
    ran = []
    sample = Diffusion.sample
    monkeypatch.setattr(Diffusion, "sample", lambda self, *a, **k: ran.append(self.parallel) or sample(self, *a, **k))
    solver = "ddim:steps=4:parallel=preconditioned"
    result = invoke("sample", folder, "--solver", solver, "--count", 2, "--check", "--out", tmp_path / "x.png", "-q",
                    "--json", tmp_path / "report.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert ran == [None]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parallel"] == "preconditioned"
    assert report["relative_error"]["worst"] <= report["tolerance"]


def test_what_cannot_be_checked_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    """An implicit plan has no step by step."""
    monkeypatch.setattr(Diffusion, "solved", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr(Diffusion, "sample", lambda *_, **__: pytest.fail("the work began"))
    for name, *options in (["--check"], ["--check", "--parallel"], ["--window", 3]):
        result = invoke(
            "sample", folder, "--solver", "collocation", "--steps", 4, "--out", tmp_path / "x.png", name, *options
        )
        assert result.exit_code != 0
        assert f"{name} cannot be used here" in str(result.exception)
        assert "one by one" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_check_that_finds_more_than_the_tolerance_fails_after_writing(folder, tmp_path, monkeypatch):
    """The images are moved by 1 and 3 % behind the solver's back, so that its own estimate is far too small."""
    solved, factors = Diffusion.solved, torch.tensor([1.01, 1.03]).view(2, 1, 1, 1)

    def moved(*args, **settings):
        for images, solution in solved(*args, **settings):
            yield factors * images, solution

    monkeypatch.setattr(Diffusion, "solved", moved)
    out, report = tmp_path / "x.png", tmp_path / "x.json"
    arguments = ["sample", folder, *TOGETHER, "--out", out, "--json", report, "--parallel", "--check"]
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert "2 of 2 images are further from step by step than the tolerance of 0.001 (worst 3.0e-02)" in str(
        result.exception
    )
    assert out.exists()
    assert json.loads(report.read_text())["relative_error"] == pytest.approx({"median": 0.02, "worst": 0.03}, rel=0.05)
    assert invoke(*arguments, "--tolerance", 0.05).exit_code == 0


def test_without_a_check_the_error_is_called_an_estimate(folder, tmp_path):
    out = tmp_path / "x.png"
    result = invoke("sample", folder, *TOGETHER, "--out", out, "--parallel")
    assert "error estimated at" in result.output
    assert "error estimated at 0" not in result.output
    result = invoke("sample", folder, *TOGETHER, "--out", out, "--parallel", "--dtype", "bfloat16", "--tolerance", 1e-6)
    assert result.exit_code == 0, result.output
    assert "above the tolerance of 1e-06" in result.output
    assert "the estimate is on the safe side, often far)" in result.output
    assert "--check measures the error" in result.output


@pytest.mark.parametrize("change", [("mean", 1e12), ("variance", 1e9), ("mean", float("nan")), ("variance", -1.0)])
def test_absurd_statistics_are_refused_when_read(folder, tmp_path, change):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    shape = tiny(VP()).shape
    statistics = {"mean": torch.full(shape, 0.1), "variance": torch.full(shape[1:], 0.3)}
    save_file(statistics, path / "statistics.safetensors")
    assert invoke("sample", path, *TOGETHER, "--out", tmp_path / "x.png", "-q").exit_code == 0
    save_file(statistics | {change[0]: statistics[change[0]] * change[1]}, path / "statistics.safetensors")
    result = invoke("sample", path, *TOGETHER, "--out", tmp_path / "y.png", "-q")
    assert result.exit_code != 0
    assert f"statistics.safetensors holds a {change[0]} that no images have" in str(result.exception)

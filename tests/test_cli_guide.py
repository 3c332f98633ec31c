"""`pushforward guide` as a user runs it: a model or a GAN, energies by words, and a folder of results.

Models, GANs and classifiers are tiny and have random weights. Traces are plotted in one test alone, for time.
"""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from pushforward import cli
from pushforward.cli import app
from pushforward.errors import PushforwardError
from pushforward.guidance.checkpoints import load_chains, load_descents
from pushforward.guidance.diagnostics import plot
from pushforward.guidance.particles import PARTICLES
from pushforward.guidance.steering import STEERINGS
from pushforward.linear import VP
from pushforward.maps.storage import load_codes
from pushforward.model import save_model
from support.models import reading, saved, tutorial
from support.pictures import pixels, places

runner = CliRunner()
SIDE = 8


def few(model, options=()):
    """Options by which a run takes no time, where they have a meaning."""
    names = {str(option).split(":")[0] for option in options}
    solver = "ddim:eta=1:steps=2" if names & PARTICLES.keys() else "ddim:steps=2"
    plan = [] if str(model).endswith((".pt", ".pth", ".png")) else ["--solver", solver]
    return [*plan, *([] if names & {*STEERINGS, *PARTICLES} else ["--moves", 2]), "--chains", 2]


ENERGIES = """
from time import sleep

import torch
from pushforward.guidance.energies import colour

def dark(images, code):
    return 10 * (images.mean((1, 2, 3)) + 0.5).square()

def scalar(images, code):
    return images.mean()

def nan(images, code):
    return images.mean((1, 2, 3)) * float("nan")

def frozen(images, code):
    return images.detach().mean((1, 2, 3))

def broken(images, code):
    raise ValueError("no such\\nthing")

def flat(images, code):  # takes a gradient itself
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(images.square().sum(), images, create_graph=True)
    return slope.square().mean((1, 2, 3))

five = 5 * colour(-0.5, deviation=1.0)
two = colour(-0.5, deviation=1.0) + 3 * colour(0.5, deviation=1.0)
"""


class Flat(nn.Module):
    """A GAN, or a classifier, of one layer."""

    def __init__(self, given: int, made: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.shape = nn.Linear(given, made), shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)).tanh().view(-1, *self.shape)


@pytest.fixture(autouse=True)
def no_traces(monkeypatch):
    monkeypatch.setattr("pushforward.cli.guide.plot", lambda *args: None)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Models, GANs, classifiers, pictures and energies, in one folder."""
    root = tmp_path_factory.mktemp("guide")
    saved(VP(), root / "grey")
    save_model(reading(side=SIDE), root / "colour")
    torch.save(tutorial(5, (4, 1), 4).state_dict(), root / "dcgan.pth")
    for name, net, given in [
        ("gan", Flat(5, SIDE**2, (1, SIDE, SIDE)), torch.zeros(2, 5)),
        ("classes", Flat(SIDE**2, 3, (3,)), torch.zeros(2, 1, SIDE, SIDE)),
        ("score", Flat(SIDE**2, 1, (1,)), torch.zeros(2, 1, SIDE, SIDE)),
        ("other-size", Flat(7, 3, (3,)), torch.zeros(2, 7)),
    ]:
        torch.jit.trace(net, given).save(root / f"{name}.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[: SIDE // 2] = 255
    for name, picture in {"grey": pixels[..., 0], "colour": pixels, "mask": mask, "black": 0 * mask}.items():
        Image.fromarray(picture).save(root / f"{name}.png")
    (root / "broken.png").write_bytes(b"no picture")
    (root / "energies.py").write_text(ENERGIES)
    (root / "syntax.py").write_text("def energy(")
    return root


@pytest.fixture
def guiding(files, tmp_path):
    """Run `guide` to a folder, and hand back its report."""

    def run(model, *options, energy="dark", out=None):
        report = tmp_path / "report.json"
        energies = ["--energy", f"python:{files}/energies.py:name={energy}"] if energy else []
        arguments = [
            "guide",
            files / model,
            *energies,
            *few(model, options),
            "--out",
            out or tmp_path / "out",
            "--json",
            report,
            "-q",
        ]
        result = runner.invoke(app, [str(a) for a in [*arguments, *options]])
        assert result.exit_code == 0, result.exception
        return json.loads(report.read_text())

    return run


def samples(folder):
    return {path.stem: pixels(path) for path in sorted((folder / "samples").iterdir())}


def decoded(folder, tmp_path):
    """The images that `decode` makes of the codes of a run, in their order."""
    codes, each = folder / "codes.safetensors", tmp_path / "each"
    arguments = ["decode", codes, "--out", tmp_path / "again.png", "--each", each, "-q"]
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.exception
    return [pixels(path) for path in sorted(each.iterdir())]


def said(monkeypatch, capsys, *arguments):
    """What the real command line writes to stderr as it leaves with exit code 1."""
    monkeypatch.setattr("sys.argv", ["pushforward", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    return capsys.readouterr().err


# -- results -----------------------------------------------------------------------------------------------------------


def test_the_folder_and_the_report(files, guiding, tmp_path, monkeypatch):
    monkeypatch.setattr("pushforward.cli.guide.plot", plot)
    near = f"near:{files}/grey.png:deviation=2:weight=0.5"
    asked = ["--energy", near, "--sampler", "mala", "--moves", 4, "--draws", 2, "--chains", 3, "--label", "b"]
    report = guiding("grey", *asked)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "chains.png", "chains.safetensors", "codes.safetensors", "report.json", "samples", "samples.png",
        "settings.json", "steps", "traces.png",
    }  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == report
    names = ["000-000", "001-000", "002-000", "000-001", "001-001", "002-001"]  # chain, draw
    found = samples(out)
    assert sorted(found) == sorted(names)
    shown, walked = pixels(out / "samples.png"), pixels(out / "chains.png")
    assert all(len(places(shown, image[..., None], 12)) == 1 for image in found.values())
    assert walked.shape[0] > 5 * SIDE * 12  # the beginning, and each step
    assert places(walked, found["001-001"][..., None], 12)
    assert (report["count"], report["labels"], report["sampler"]) == (6, ["b"], "mala")
    assert report["asked"] == [f"python:{files}/energies.py:name=dark", near]
    assert report["nfe"] == (1 + 4) * 2 * 2  # forward and backward, two steps of the plan
    assert len(report["traces"]["energy"]) == len(report["traces"]["prior"]) == 5
    assert 0 < report["acceptance"] <= 1
    assert set(report["rhat"]) == set(report["ess"]) == {"energy", "prior", "code"}
    assert "arrived" in report["verdict"]
    assert report["unguided_energy"] == report["traces"]["energy"][0]
    assert [row["chain"] for row in report["samples"]] == [0, 1, 2] * 2
    given = pixels(files / "grey.png") / 127.5
    for name, row in zip(names, report["samples"], strict=True):
        assert list(row["energies"]) == list(report["energies"])
        assert row["energy"] == pytest.approx(sum(row["energies"].values()))
        expected = 0.5 * np.square(found[name] / 127.5 - given).sum() / (2 * 2**2)
        assert row["energies"]["near"] == pytest.approx(expected, rel=0.02)  # of pixels rounded, and clipped
    assert report["energy"] == pytest.approx(np.mean([row["energy"] for row in report["samples"]]))
    assert report["energies"]["near"] == pytest.approx(np.mean([row["energies"]["near"] for row in report["samples"]]))


def test_json_on_stdout_is_alone_there(files, tmp_path):
    arguments = [
        "guide",
        files / "gan.pt",
        "--latent",
        5,
        "--energy",
        "gaussian",
        *few("gan.pt"),
        "--out",
        tmp_path / "out",
    ]
    result = runner.invoke(app, [str(a) for a in [*arguments, "--json", "-"]])
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    shutil.rmtree(tmp_path / "out")
    result = runner.invoke(app, [str(a) for a in [*arguments, "--warm-up", 0, "--draws", 2]])
    assert result.stdout.count("\n") == 1
    assert "4 samples, mean energy" in result.stdout
    assert "3 network evaluations per chain" in result.stdout  # of two draws


@pytest.mark.parametrize("sampler", ["langevin", "mpgd", "adam"])
def test_samples_do_not_depend_on_the_batch(guiding, tmp_path, sampler):
    """To the rounding of float32 convolutions over other batches, which may turn an 8-bit value."""
    for batch in (3, 2):
        guiding("grey", "--sampler", sampler, "--chains", 3, "--batch", batch, out=tmp_path / str(batch))
    one, other = samples(tmp_path / "3"), samples(tmp_path / "2")
    assert len(one) == 3
    assert all(abs(one[name] - other[name]).max() <= 1 for name in one)
    assert len({image.tobytes() for image in one.values()}) == 3


def test_chains_of_an_annealed_energy_have_weights(guiding):
    report = guiding("grey", "--moves", 4, "--anneal", 2, "--chains", 3)
    weights = [row["weight"] for row in report["samples"]]
    assert sum(weights) == pytest.approx(1)
    assert 1 < report["effective_chains"] < 3


def test_ladders_say_how_often_they_swapped(guiding, tmp_path):
    """And their sheets show as many chains as there are, not all rungs."""
    out = tmp_path / "out"
    report = guiding("grey", "--moves", 6, "--rungs", 3, "--sampler", "pcn", "--chains", 2, out=out)
    assert report["count"] == 2
    assert len(report["swaps"]) == 2
    assert all(0 <= share <= 1 for share in report["swaps"])
    assert report["round_trips"] >= 0
    alone = guiding("grey", "--moves", 6, "--sampler", "pcn", "--chains", 2, out=tmp_path / "alone")
    assert report["nfe"] == 3 * alone["nfe"]
    assert pixels(out / "chains.png").shape == pixels(tmp_path / "alone" / "chains.png").shape


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_a_run_that_is_told_to_end_keeps_what_it_has(files, tmp_path):
    """As batch systems tell it, by SIGTERM: 143, the folder has the chains, and the same command goes on."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n\ndef energy(images, code):\n    time.sleep(0.2)\n    return images.mean((1, 2, 3))\n"
    )
    out = tmp_path / "out"
    options = ["--energy", f"python:{slow}", "--solver", "ddim:steps=2", "--chains", "1", "--moves", "500", "-q"]
    command = [sys.executable, "-m", "pushforward", "guide", str(files / "grey"), *options, "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        while running.poll() is None and not any((out / "steps").glob("0*.png")):
            time.sleep(0.05)
        running.terminate()
        assert running.wait() == 143
    chains, _ = load_chains(out / "chains.safetensors")
    assert chains.step < 500


@pytest.mark.parametrize(
    ("calls", "options"),
    [
        (7, ["--sampler", "langevin", "--draws", 2]),
        (12, ["--sampler", "hmc:leaps=2", "--anneal", 3, "--draws", 2]),
        (7, ["--sampler", "pcn", "--draws", 2]),
        (7, ["--sampler", "adam"]),
        (7, ["--sampler", "l-bfgs"]),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_result(files, tmp_path, guiding, calls, options):
    """Bit for bit: the energy fails in the last move, is mended, and the same command is given again."""
    options = ["--moves", 6, *options]
    shutil.copytree(files, tmp_path / "mine")
    energy = tmp_path / "mine" / "energies.py"
    mended = energy.read_text()
    asked = [*options, "--energy", f"python:{energy}:name=dark"]
    whole = guiding("grey", *asked, energy=None, out=tmp_path / "whole")
    spoiled = mended.replace("    return 10 *", "    calls.append(1)\n    assert len(calls) < LIMIT\n    return 10 *")
    energy.write_text(f"calls = []\nLIMIT = {calls}\n" + spoiled)
    with pytest.raises(AssertionError, match="python"):
        guiding("grey", *asked, energy=None, out=tmp_path / "part")
    if "--draws" in options:
        chains, _ = load_chains(tmp_path / "part" / "chains.safetensors")
        assert (chains.step, len(chains.draws)) == (5, 1)
    else:
        descents, _ = load_descents(tmp_path / "part" / "descents.safetensors")
        assert descents.step == 5
    energy.write_text(mended)
    again = guiding("grey", *asked, energy=None, out=tmp_path / "part")
    for name in ("seconds", "out"):
        whole.pop(name), again.pop(name)
    assert again == whole
    for file in (tmp_path / "whole").rglob("*.png"):
        assert file.read_bytes() == (tmp_path / "part" / file.relative_to(tmp_path / "whole")).read_bytes()
    one, other = (load_codes(tmp_path / name / "codes.safetensors")[0] for name in ("whole", "part"))
    assert torch.equal(one.variables(), other.variables())


def test_a_picture_that_is_cut_off_is_left_out_of_the_sheet(guiding, tmp_path, capsys):
    """Its chains are past it, and it cannot be drawn again; the others make the same sheet as without it."""
    options = ["--sampler", "langevin", "--moves", 3]
    report, out = guiding("grey", *options), tmp_path / "out"
    sheets = []
    for left in (40, 0):
        path = out / "steps" / "00001.png"
        path.write_bytes(path.read_bytes()[:left]) if left else path.unlink()
        again = guiding("grey", *options)
        assert again["samples"] == report["samples"]
        sheets.append((out / "chains.png").read_bytes())
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize("change", ["energy", "helper", "reference", "weights", "classifier"])
def test_what_was_made_of_something_else_is_begun_anew(files, tmp_path, guiding, monkeypatch, change):
    """To the same as in a new folder; what the old chains had come to is put aside, and found again by nothing."""
    mine = shutil.copytree(files, tmp_path / "mine")
    monkeypatch.syspath_prepend(str(mine))
    (mine / "its_helper.py").write_text("GAIN = 10\n")
    (mine / "own.py").write_text("import its_helper\n\ndef energy(x, code): return its_helper.GAIN * x.mean((1, 2, 3))")
    energies = [f"python:{mine}/own.py", f"near:{mine}/grey.png", f"classifier:{mine}/classes.pt:label=1"]
    asked = [word for energy in energies for word in ("--energy", energy)]

    def run(out):
        for module in ("its_helper", "_energy_own"):
            sys.modules.pop(module, None)
        shutil.rmtree(mine / "__pycache__", ignore_errors=True)
        return guiding(mine / "grey", *asked, energy=None, out=tmp_path / out)

    first = run("out")
    assert run("out")["energies"] == first["energies"]
    match change:
        case "energy":
            text = (mine / "own.py").read_text()
            (mine / "own.py").write_text(text.replace("GAIN", "GAIN * 2"))
        case "helper":
            (mine / "its_helper.py").write_text("GAIN = 30\n")
        case "reference":
            Image.fromarray(np.full((SIDE, SIDE), 200, np.uint8)).save(mine / "grey.png")
        case "weights":
            saved(VP(beta_max=18.0), mine / "grey")
        case "classifier":
            module = Flat(SIDE**2, 3, (3,))
            module.layer.weight.data.neg_()
            torch.jit.trace(module, torch.zeros(2, 1, SIDE, SIDE)).save(mine / "classes.pt")
    assert not list((tmp_path / "out").glob("chains-*.safetensors"))
    again, fresh = run("out"), run("fresh")
    assert again["energies"] == fresh["energies"] != first["energies"]
    assert samples(tmp_path / "out").keys() == samples(tmp_path / "fresh").keys()
    for name, image in samples(tmp_path / "fresh").items():
        assert np.array_equal(image, samples(tmp_path / "out")[name])
    assert len(list((tmp_path / "out").glob("chains-*.safetensors"))) == 1


def test_a_finished_folder_is_left_as_it_is_and_serves_no_other_settings(files, guiding, tmp_path):
    first = guiding("grey")
    shown = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.png")}
    again = guiding("grey", "--batch", 1)
    assert {**again, "seconds": None} == {**first, "seconds": None}
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.png")} == shown
    for option, value in {"--seed": 1, "--moves": 3, "--sampler": "mala", "--energy": "chi", "--label": "a"}.items():
        energy = f"python:{files}/energies.py:name=dark"
        arguments = [
            "guide",
            files / "grey",
            "--energy",
            energy,
            *few("grey"),
            option,
            value,
            "--out",
            tmp_path / "out",
            "-q",
        ]
        result = runner.invoke(app, [str(a) for a in arguments])
        assert isinstance(result.exception, PushforwardError), (option, result.exception)
        assert "holds results of other settings" in str(result.exception)
        assert str(result.exception).endswith("name another, or remove it.")


def test_what_fails_before_its_first_result_leaves_no_folder(files, tmp_path):
    """But a folder that was there is kept."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text("{}")
    words = ["guide", files / "grey", "--energy", "chi", *few("grey"), "--sampler", "adam:learning-rate=0", "-q"]
    for out in ("out", "mine"):
        result = runner.invoke(app, [str(a) for a in [*words, "--out", tmp_path / out]])
        assert "a positive learning rate" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# -- samplers and plans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["adam:learning-rate=0.1", "l-bfgs", "adam:prior=none"])
def test_descents_find_lower_energies_than_they_begin_with(guiding, tmp_path, sampler):
    report = guiding("grey", "--sampler", sampler, "--moves", 3)
    prior = [] if "none" in sampler else ["chi"]
    assert list(report["energies"])[1:] == prior
    assert report["energy"] < report["traces"]["energy"][0]
    assert report["energy"] <= min(report["traces"]["energy"])  # the mean of the best is below the best mean
    assert len(samples(tmp_path / "out")) == 2
    assert "acceptance" not in report


@pytest.mark.parametrize("prior", ["none", "gaussian"])
def test_candidates_lower_the_energy_that_descents_begin_with(guiding, tmp_path, prior):
    """What is said of images without guidance is that of plain draws, and the prior counts in it as in the others."""
    plain = guiding("grey", "--sampler", f"white:prior={prior}", "--moves", 1)
    report = guiding("grey", "--sampler", f"white:prior={prior}:candidates=6", "--moves", 1, out=tmp_path / "more")
    assert report["traces"]["energy"][0] < plain["traces"]["energy"][0]
    assert report["unguided_energy"] == pytest.approx(plain["unguided_energy"], rel=1e-4)


@pytest.mark.parametrize(("sampler", "calls"), [("mpgd:direct=2", 1), ("tfg", 2), ("dps:normalise=size", 2)])
def test_steering_lowers_the_energy_at_each_step_of_the_plan(guiding, tmp_path, sampler, calls):
    """Against no guidance, which is a steering of no strength."""
    free = guiding("grey", "--sampler", "mpgd:direct=1e-9", out=tmp_path / "free")
    report = guiding("grey", "--sampler", sampler)
    assert report["energy"] < 0.99 * free["energy"]
    for one in (free, report):
        assert one["unguided_energy"] == pytest.approx(free["energy"], rel=1e-4)
    assert report["nfe"] == 2 * calls
    assert not (tmp_path / "out" / "codes.safetensors").exists()  # a code alone does not make these images


@pytest.mark.parametrize(("sampler", "how"), [("fk:particles=3", "estimated"), ("fk:populations=2:share=0", "measured"),
                                              ("psi:moves=2:step-size=0.1", "estimated")])  # fmt: skip
def test_particles_tell_the_evidence_and_leave_codes(files, tmp_path, sampler, how):
    """The energy is a number times a Gaussian's square; its evidence is below 1. Codes decode to the samples."""
    out, energy = tmp_path / "out", f"python:{files}/energies.py:name=dark"
    arguments = ["guide", files / "grey", "--energy", energy, "--sampler", sampler, "--chains", 4, "--out", out]
    result = runner.invoke(app, [*map(str, arguments), "--solver", "ddim:eta=1:steps=3", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert report["evidence"]["log"] < 0
    assert report["evidence"]["error"] > 0
    assert f"({how})" in result.output
    assert len(report["samples"]) == 4
    assert not {"steps", "rhat", "traces"} & report.keys()
    assert load_codes(out / "codes.safetensors")[0].noises.shape[0] > 0
    pairs = zip(decoded(out, tmp_path), samples(out).values(), strict=True)
    assert all(np.abs(one.astype(int) - other.astype(int)).max() <= 1 for one, other in pairs)


def test_without_a_gradient_an_implicit_solver_has_an_order(guiding):
    report = guiding("grey", "--sampler", "ess", "--solver", "collocation:steps=2")
    assert report["plan"] == "collocation:steps=2"


def test_an_energy_that_takes_gradients_itself_steers(guiding):
    report = guiding("grey", "--sampler", "mpgd", energy="flat")
    assert report["energy"] > 0


@pytest.mark.parametrize(
    "plan",
    [
        "ddim:eta=1:steps=2", "ddim:repeats=2:steps=2", "ddim:repeats=2:eta=1:steps=1", "auto:steps=2",
        "exponential:reference=data:steps=2", "ddim:steps=2:end=0.05", "ddim:steps=2:parallel=preconditioned",
    ],
)  # fmt: skip
def test_codes_are_decoded_again_to_the_samples(guiding, tmp_path, plan):
    """By `pushforward decode`, which knows the file alone; to one 8-bit value where steps were taken at once."""
    report = guiding("grey", "--solver", plan, "--moves", 1, "--label", "b", "--label", "a")
    names = [f"{row['chain']:03d}-000" for row in report["samples"]]
    found = samples(tmp_path / "out")
    again = decoded(tmp_path / "out", tmp_path)
    assert all(abs(found[name] - image).max() <= 1 for name, image in zip(names, again, strict=True))


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_other_gradients_lead_to_other_costs_and_similar_codes(guiding, tmp_path, gradient):
    exact = guiding("grey", out=tmp_path / "exact")
    other = guiding("grey", "--gradient", gradient)
    assert other["nfe"] != exact["nfe"]
    assert other["energy"] == pytest.approx(exact["energy"], rel=0.05)


# -- models that read, in colour ---------------------------------------------------------------------------------------


def test_prompts_guidance_and_a_negative_prompt_travel_with_the_codes(guiding, tmp_path):
    options = ["--prompt", "a cat", "--prompt", "a dog", "--draws", 2, "--moves", 4]
    report = guiding("colour", *options, "--guidance", 3, "--negative", "a tree")
    plain = guiding("colour", *options, out=tmp_path / "plain")
    assert (report["prompts"], report["guidance"], report["negative"]) == (["a cat", "a dog"], 3, "a tree")
    info = load_codes(tmp_path / "out" / "codes.safetensors")[1]
    assert (info["labels"], info["guidance"], info["negative"]) == (["a cat", "a dog"] * 2, 3, "a tree")
    assert plain["energy"] != report["energy"]
    found = samples(tmp_path / "out")
    order = [found[name] for name in ("000-000", "001-000", "000-001", "001-001")]
    assert all(np.array_equal(*pair) for pair in zip(order, decoded(tmp_path / "out", tmp_path), strict=True))


def test_a_model_that_reads_is_steered_and_searched_too(guiding, tmp_path):
    for sampler in ("adam", "tfg"):
        report = guiding("colour", "--sampler", sampler, "--prompt", "a cat", out=tmp_path / sampler)
        assert report["count"] == 2


def test_colours_pictures_and_masks_are_brought_to_the_model(files, guiding):
    """The same mask and picture serve a grey model; a colour is then its grey, that of a picture (Rec. 601)."""
    mask = f"mask={files}/mask.png"
    words = [f"colour:#2060c0:{mask}", f"masked:{files}/colour.png:{mask}:deviation=.5", f"low-pass:{files}/grey.png"]
    options = [part for word in words for part in ("--energy", word)]
    colour, grey = (guiding(model, *options, "--sampler", "mpgd:direct=0.01", energy=None, out=files / f"out-{model}")
                    for model in ("colour", "grey"))  # fmt: skip
    for model, report in {"colour": colour, "grey": grey}.items():
        assert list(report["energies"]) == ["colour:#2060c0", "masked", "low-pass"]
        name = f"{report['samples'][0]['chain']:03d}-000"
        image = samples(files / f"out-{model}")[name][: SIDE // 2] / 127.5 - 1
        wanted = np.array([0x20, 0x60, 0xC0]) / 127.5 - 1
        wanted = wanted if model == "colour" else wanted @ [0.299, 0.587, 0.114]
        expected = np.square(image.mean((0, 1)) - wanted).sum() / (2 * 0.1**2)
        assert report["samples"][0]["energies"]["colour:#2060c0"] == pytest.approx(expected, rel=0.05)


# -- GANs and networks from files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gan", "side", "options"), [("dcgan.pth", 8, []), ("gan.pt", SIDE, ["--latent", 5])])
def test_a_gan_is_guided(files, guiding, tmp_path, gan, side, options):
    energy = f"python:{files}/energies.py:name=dark:weight=20"
    options = [*options, "--energy", energy, "--moves", 15, "--chains", 4]
    report = guiding(gan, *options, "--sampler", "hmc", energy=None)
    assert report["nfe"] == 1 + 15 * 5
    assert report["energy"] < 0.9 * report["traces"]["energy"][0]
    assert all(image.shape == (side, side) for image in samples(tmp_path / "out").values())
    best = guiding(gan, *options, "--sampler", "adam", energy=None, out=tmp_path / "best")
    assert next(iter(best["energies"].values())) < report["traces"]["energy"][0]


def test_classifiers_and_scores_from_files(files, guiding):
    words = [f"classifier:{files}/classes.pt:label=1:weight=4", f"attribute:{files}/classes.pt:label=2:wanted=false",
             f"score:{files}/score.pt:views=2"]  # fmt: skip
    options = [part for word in words for part in ("--energy", word)]
    report = guiding("grey", *options, "--sampler", "tfg", energy=None)
    assert list(report["energies"]) == ["classifier:1", "attribute:2", "score"]
    assert report["energies"]["classifier:1"] > 0


def test_energies_made_in_a_python_file_keep_their_weights(files, guiding, tmp_path):
    """Of one term and of two; the colour of a sample is measured with deviation 1."""
    options = ["--energy", f"python:{files}/energies.py:name=two:weight=2"]
    report = guiding("grey", *options, energy="five")
    for name, row in zip(["000-000", "001-000"], report["samples"], strict=True):
        mean = samples(tmp_path / "out")[name].mean() / 127.5 - 1
        low, high = (mean + 0.5) ** 2 / 2, (mean - 0.5) ** 2 / 2
        assert row["energy"] == pytest.approx(5 * low + 2 * (low + 3 * high), rel=0.05)
        assert next(iter(row["energies"].values())) == pytest.approx(5 * low, rel=0.05)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        ("wonder", "Unknown energy 'wonder'; known are clip"),
        ("near", "is written near:FILE"),
        ("near:{}/none.png", "none.png cannot be read as an image"),
        ("near:{}/broken.png", "broken.png cannot be read as an image"),
        ("near:{}/grey.png:size=3", "has no setting size; it takes deviation=1"),
        ("near:{}/grey.png:deviation=wide", "must be a number; got 'wide'"),
        ("near:{}/grey.png:deviation=0", "The deviation of an energy must be positive"),
        ("near:{}/grey.png:weight=inf", "near"),
        ("masked:{}/grey.png", "needs mask=FILE"),
        ("masked:{}/grey.png:mask={}/black.png", "The mask "),
        ("low-pass:{}/grey.png:cells=9", "use fewer cells"),
        ("low-pass:{}/grey.png:cells=inf", "The cells of energy"),
        ("colour:blue", "A colour is written as #rrggbb"),
        ("color:blue", "A colour is written as #rrggbb"),
        ("colour:#+1+1+1", "A colour is written as #rrggbb"),
        ("classifier:{}/classes.pt", "needs label="),
        ("classifier:{}/classes.pt:label=dog", "has no class 'dog'"),
        ("classifier:{}/classes.pt:label=7", "with a class 7"),
        ("classifier:{}/none.pt:label=1", "There is no file"),
        ("classifier:{}/broken.png:label=1", "not a TorchScript file"),
        ("classifier:{}/other-size.pt:label=1", "Energy 'classifier:1' fails on images of shape (1, 8, 8)"),
        ("score:{}/classes.pt", "A score is one number per image"),
        ("face:{}/grey.png", "needs network="),
        ("concentration:chunk=9", "needs codes of 81 numbers"),
        ("command:{}/none.sh --fast", "There is no program '"),
        ("command:sh 'score.sh", "is no command: No closing quotation"),
        ("python:{}/none.py", "There is no Python file"),
        ("python:{}/syntax.py", "cannot be run (SyntaxError"),
        ("python:{}/energies.py:name=light", "has no function 'light'"),
        ("python:{}/energies.py:name=scalar", "must give one number per image, shape (2,)"),
        ("python:{}/energies.py:name=nan", "is nan for chain 0"),
        ("python:{}/energies.py:name=frozen", "has no gradient"),
        ("python:{}/energies.py:name=broken", "fails on images of shape (1, 8, 8) (ValueError"),
    ],
)
def test_an_energy_that_does_not_do_is_named_in_a_sentence(files, tmp_path, monkeypatch, capsys, energy, message):
    words = energy.replace("{}", str(files))
    text = said(
        monkeypatch,
        capsys,
        "guide",
        files / "grey",
        "--energy",
        words,
        *few("grey"),
        "--out",
        tmp_path / "out",
        "--quiet",
    )
    assert text.startswith("pushforward: ")
    assert message in text
    assert text.count("\n") == 1


SIZES = """
import sys
from PIL import Image

for file in sys.argv[1:]:
    print(WEIGHT * Image.open(file).getextrema()[1])
"""


@pytest.fixture
def program(tmp_path):
    """A program that prints the brightest pixel of each picture."""
    (tmp_path / "sizes.py").write_text(SIZES.replace("WEIGHT", "2"))
    return f"command:{sys.executable} {tmp_path}/sizes.py"


@pytest.mark.parametrize("sampler", ["ess", "pcn:step=0.4", "fk:particles=2", "psi:moves=2:dynamics=pcn"])
def test_a_program_is_an_energy(files, tmp_path, guiding, program, sampler):
    """Energies are those of the pictures that are handed over, and another program is another energy."""
    asked = ["--energy", f"{program}:weight=0.05", "--sampler", sampler]
    report = guiding("grey", *asked, energy=None)
    found = [0.1 * pixels(path).max() for path in sorted((tmp_path / "out" / "samples").iterdir())]
    assert [one["energy"] for one in report["samples"]] == pytest.approx(found)
    (tmp_path / "sizes.py").write_text(SIZES.replace("WEIGHT", "4"))
    again = guiding("grey", *asked, energy=None)
    assert again["samples"][0]["energy"] > 0.15 * pixels(tmp_path / "out" / "samples" / "000-000.png").max()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print(1)", "must print one number a line for each of the 2 PNG files in its arguments; it printed '1'"),
        ("print('a b')", "must print one number"),
        ("raise SystemExit('no camera')", "fails: no camera."),
        ("print('nan nan')", "is nan for chain 0"),
    ],
)
def test_a_program_that_does_not_do_is_told_in_a_sentence(files, tmp_path, monkeypatch, capsys, program, text, message):
    (tmp_path / "sizes.py").write_text(text)
    words = ["guide", files / "grey", "--energy", program, *few("grey"), "--out", tmp_path / "out", "-q"]
    said_ = said(monkeypatch, capsys, *words, "--sampler", "ess")
    assert message in said_
    assert said_.count("\n") == 1
    assert "has no gradient" in said(monkeypatch, capsys, *words) or "fails" in said_ or "must print" in said_


@pytest.mark.parametrize("sampler", ["mpgd", "tfg", "adam"])
@pytest.mark.parametrize("name", ["nan", "frozen"])
def test_other_samplers_name_it_too(files, tmp_path, monkeypatch, capsys, sampler, name):
    energy = f"python:{files}/energies.py:name={name}"
    options = ["--energy", energy, *few("grey", [sampler]), "--sampler", sampler, "--out", tmp_path / "out", "-q"]
    text = said(monkeypatch, capsys, "guide", files / "grey", *options)
    assert "Energy 'python" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "grey",
            ["--sampler", "gibbs"],
            "Unknown sampler 'gibbs'; known are langevin, mala, hmc, pcn, ess, fk, psi, adam",
        ),
        ("grey", ["--sampler", "hmc:leaps"], "is written sampler:name=value"),
        ("grey", ["--sampler", "hmc:speed=1"], "'hmc' does not take these settings"),
        ("grey", ["--sampler", "hmc:leaps=2.5"], "2.5"),
        ("grey", ["--sampler", "hmc:leaps=0"], "1 leap or more"),
        ("grey", ["--sampler", "langevin:step-size=-1"], "positive"),
        ("grey", ["--sampler", "langevin:step-size=small"], "'small'"),
        ("grey", ["--sampler", "mala:preconditioned=maybe"], "'maybe'"),
        ("grey", ["--sampler", "adam:prior=flat"], "'flat'"),
        ("grey", ["--sampler", "adam:momentum=1"], "'adam' does not take these settings"),
        ("grey", ["--sampler", "adam:learning-rate=fast"], "fast"),
        ("grey", ["--sampler", "mpgd:direct=much"], "much"),
        ("grey", ["--sampler", "mpgd:force=1"], "'mpgd' does not take these settings"),
        ("grey", ["--sampler", "tfg:schedule=never"], "'never'"),
        ("grey", ["--sampler", "dps:normalise=all"], "'all'"),
        ("grey", ["--sampler", "lgd:samples=2.5"], "2.5"),
        ("grey", ["--sampler", "mpgd", "--energy", "chi"], "Energy 'chi' has no gradient"),
        ("grey", ["--sampler", "mpgd", "--draws", 2], "are of chains"),
        ("grey", ["--sampler", "adam", "--anneal", 1], "are of chains"),
        ("grey", ["--sampler", "adam", "--rungs", 2], "are of chains"),
        ("grey", ["--rungs", 2, "--anneal", 1], "in the place of annealing"),
        ("grey", ["--sampler", "tfg", "--moves", 5], "instead of --moves"),
        ("grey", ["--sampler", "tfg", "--gradient", "exact"], "leave --gradient out"),
        ("grey", ["--sampler", "fk", "--moves", 5], "not --moves"),
        ("grey", ["--sampler", "fk", "--gradient", "exact"], "leave --gradient out"),
        ("grey", ["--sampler", "fk", "--draws", 2], "A warm-up, annealing, rungs and draws are of chains"),
        ("grey", ["--sampler", "fk:populations=3"], "an equal part"),
        ("dcgan.pth", ["--sampler", "fk"], "Particles go once through the steps of a diffusion"),
        ("grey", ["--latent", 5], "leave --latent out"),
        ("none.pt", ["--latent", 5], "name its file"),
        ("dcgan.pth", ["--solver", "ddim"], "A GAN has no plan"),
        ("dcgan.pth", ["--dtype", "float16"], "A GAN has no plan"),
        ("grey", ["--draws", 2], "at most as many draws"),
        ("grey", ["--warm-up", 2], "a warm-up of fewer"),
        ("grey", ["--solver", "rk45"], "chooses its steps as it goes; name another"),
        ("grey", ["--solver", "magic"], "Unknown solver 'magic'"),
        ("grey", ["--solver", ""], "Unknown solver ''"),
        ("grey", ["--sampler", "mala:step-size=nan"], "must be a positive number; got nan"),
        ("grey", ["--solver", "ddim:order=2"], "has no setting 'order'"),
        ("grey", ["--solver", "collocation:steps=2"], "Implicit()"),
        ("grey", ["--gradient", "guess"], "The gradient is one of exact, implicit, phantom"),
        ("grey", ["--label", "z"], "has no class 'z'; it has a, b"),
        ("grey", ["--prompt", "a cat"], "reads no prompts"),
        ("grey", ["--negative", "a cat"], "reads no prompts"),
        ("grey", ["--guidance", 2], "Leave guidance at 1"),
        ("grey", ["--dtype", "int8"], "The dtype is one of"),
        ("grey", ["--device", "none"], "cannot be used here"),
        ("colour", ["--label", "a"], "give a --prompt instead"),
        ("nothing", [], "No model"),
        ("dcgan.pth", ["--sampler", "mpgd"], "Only a diffusion has steps to steer"),
        ("dcgan.pth", ["--guidance", 2], "A GAN takes no "),
        ("dcgan.pth", ["--label", "a"], "label"),
        ("dcgan.pth", ["--negative", "a cat"], "reads no prompts"),
        ("dcgan.pth", ["--latent", 7], "fails on latents of shape (2, 7)"),
        ("gan.pt", [], "does not say what it takes"),
        ("broken.png", [], "cannot be read"),
    ],
)
def test_settings_that_do_not_do_are_refused_in_a_sentence(
    files, tmp_path, monkeypatch, capsys, model, options, message
):
    energy = f"python:{files}/energies.py:name=dark"
    common = ["--energy", energy, *few(model, options), "--out", tmp_path / "out", "-q"]
    text = said(monkeypatch, capsys, "guide", files / model, *common, *options)
    assert text.startswith("pushforward: ")
    assert message in text
    assert text.count("\n") == 1
    assert not (tmp_path / "out" / "report.json").exists()


def test_results_of_other_settings_do_not_stand_in_the_way_of_a_run_that_failed(files, guiding, tmp_path):
    """A first try that was refused leaves nothing that a second one, with other settings, would trip over."""
    with pytest.raises(AssertionError, match="has no gradient"):
        guiding("grey", energy="frozen")
    assert guiding("grey")["count"] == 2


def test_a_damaged_file_of_chains_is_named(guiding, tmp_path):
    guiding("grey")
    (tmp_path / "out" / "chains.safetensors").write_bytes(b"no chains")
    with pytest.raises(AssertionError, match="damaged or not a file of chains"):
        guiding("grey")

"""`pushforward invert` and `decode` as a user runs them: files in, codes out, and the same files back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pushforward.cli.plot_plan import describe
from pushforward.data.datasets import read_image
from pushforward.data.inputs import read_inputs
from pushforward.linear import VP, Blurring, Langevin
from pushforward.maps.code import Code
from pushforward.maps.spec import parse
from pushforward.maps.storage import load_codes, save_codes
from pushforward.model import load_model
from pushforward.plan import save_plan
from support.cli import invoke, refused
from support.models import SIZE, saved
from support.pictures import places

TOLERANCE = 1e-4  # asked of the inversion in these tests; the error found may be a few times the estimated one
FEW = ["--steps", 6, "--end", 0.05]  # quick, and well behaved on the tiny models
CASES = [
    ("vp", []), ("vp", ["--solver", "gddim", "--order", 2]), ("vp", ["--solver", "heun", "--steps", 8]),
    ("langevin", []), ("langevin", ["--solver", "gddim", "--grid", "log-snr"]), ("blurring", []),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {p.name: saved(p, root / p.name) for p in (VP(), Langevin(), Blurring((SIZE, SIZE)))}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three grey pictures of noise, of the models' size."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(draw.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def inverted(model, images, folder, *options):
    out, report = folder / "codes.safetensors", folder / "report.json"
    result = invoke("invert", model, images, "--out", out, "--json", report, "--tolerance", TOLERANCE, "-q", *options)
    assert result.exit_code == 0, result.exception
    return out, json.loads(report.read_text())


@pytest.mark.parametrize(("process", "solver"), CASES, ids=lambda x: x if isinstance(x, str) else "".join(map(str, x)))
def test_images_come_back(models, pictures, tmp_path, process, solver):
    """Every pixel of every picture is the same after invert and decode: the error is far below half of 1 / 127.5."""
    codes, report = inverted(models[process], pictures, tmp_path, "--steps", 20, *solver)
    assert report["converged"] == report["count"] == len(report["images"]) == 3
    assert report["max_abs_error"] < 10 * TOLERANCE
    assert report["psnr"] > 60
    result = invoke("decode", codes, "--out", tmp_path / "again.png", "--each", tmp_path / "again", "-q")
    assert result.exit_code == 0, result.exception
    for i in range(3):
        with Image.open(pictures / f"{i}.png") as one, Image.open(tmp_path / "again" / f"{i:05d}.png") as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_plan_in_a_file_ends_where_it_ends(models, pictures, tmp_path):
    """It has all its settings, so that no default of the command's own is one too many."""
    plan = parse("ddim:steps=20:end=0.01").plan(load_model(models["vp"]))
    save_plan(plan, tmp_path / "own.plan")
    _, report = inverted(models["vp"], pictures, tmp_path, "--solver", tmp_path / "own.plan")
    assert (report["converged"], report["times"]) == (3, plan.times.tolist())
    save_plan(parse("ddim:steps=20").plan(load_model(models["vp"])), tmp_path / "own.plan")
    refused(invoke("invert", models["vp"], pictures, "--solver", tmp_path / "own.plan"), "own.plan ends at time 0")


def test_the_report_and_the_picture(models, pictures, tmp_path):
    codes, report = inverted(models["vp"], pictures, tmp_path, "--steps", 20, "--picture", tmp_path / "both.png")
    assert (report["process"], report["solver"], report["steps"], report["out"]) == ("vp", "ddim", 20, str(codes))
    assert report["times"][-1] == VP().t_min
    assert [image["name"] for image in report["images"]] == [str(pictures / f"{i}.png") for i in range(3)]
    assert report["max_abs_error"] == max(image["max_abs_error"] for image in report["images"])
    assert report["nfe"] == pytest.approx(sum(image["nfe"] for image in report["images"]) / 3)
    assert report["rounds"] >= 1
    assert report["seconds"] > 0
    each = {"max_abs_error", "psnr", "rounds", "nfe", "seconds", "residual", "code"}
    assert each <= set(report["images"][0])
    assert {"mean", "std", "horizontal", "vertical", "p_value", "rejected"} == set(report["code"])
    with Image.open(tmp_path / "both.png") as picture:
        shown = np.asarray(picture).astype(int)
    given = np.asarray(Image.open(pictures / "1.png")).astype(int)
    (first, x), (second, below) = places(shown, given[..., None], 12, tolerance=1)
    assert x == below
    assert second > first + SIZE * 12


def test_the_codes_hold_the_noise_of_t_min_or_not(models, pictures, tmp_path):
    found = {}
    for name, options in {"noisy": (), "clean": ("--clean",)}.items():
        (tmp_path / name).mkdir()
        codes, report = inverted(models["vp"], pictures, tmp_path / name, *FEW, *options)
        assert report["clean"] == (name == "clean")
        assert report["max_abs_error"] < 10 * TOLERANCE
        found[name] = load_codes(codes)[0]
    noisy, clean = found["noisy"], found["clean"]
    assert noisy.end is not None
    assert noisy.end.shape == noisy.start.shape == clean.start.shape == (3, 1, SIZE, SIZE)
    assert clean.end is None
    assert float(clean.start.std()) < float(noisy.start.std())


def test_an_images_code_depends_on_seed_and_place_alone(models, pictures, tmp_path):
    """Not on the batch, but for the error of the inversion; other seeds, and other images, get other noise."""
    found = {}
    for name, options in {
        "whole": (),
        "batches": ("--batch", 2),
        "first": ("--count", 1),
        "seed": ("--seed", 1),
    }.items():
        (tmp_path / name).mkdir()
        found[name] = load_codes(inverted(models["vp"], pictures, tmp_path / name, *FEW, *options)[0])[0]
    assert torch.equal(found["whole"].end, found["batches"].end)
    assert torch.equal(found["whole"].end[:1], found["first"].end)
    assert not torch.equal(found["whole"].end, found["seed"].end)
    assert not torch.equal(found["whole"].end[0], found["whole"].end[2])
    torch.testing.assert_close(found["whole"].start, found["batches"].start, rtol=0, atol=0.02)


def test_one_state_after_another_takes_fewer_evaluations(models, pictures, tmp_path):
    """The codes are the same, to the tolerance as a code magnifies it; other methods refuse the option."""
    found = {}
    for name, options in {"rounds": (), "rows": ("--sequential",)}.items():
        (tmp_path / name).mkdir()
        codes, report = inverted(models["vp"], pictures, tmp_path / name, "--steps", 20, *options)
        found[name] = load_codes(codes)[0].start, report["nfe"], report["rounds"]
    torch.testing.assert_close(found["rows"][0], found["rounds"][0], rtol=0, atol=0.02)
    assert found["rows"][1] < found["rounds"][1]
    result = invoke("invert", models["vp"], pictures, "--method", "naive", "--sequential")
    assert "an order of its own" in str(result.exception)


def test_labels_and_guidance_travel_with_the_codes(models, pictures, tmp_path):
    """Decoded under another label, the codes give other images."""
    codes, report = inverted(models["vp"], pictures, tmp_path, *FEW, "--label", "b", "--label", 0, "--guidance", 1.5)
    assert report["labels"] == [1, 0, 1]
    assert report["max_abs_error"] < 10 * TOLERANCE
    code, info = load_codes(codes)
    assert (info["labels"], info["guidance"]) == ([1, 0, 1], 1.5)
    save_codes(tmp_path / "other.safetensors", code, {**info, "labels": [0, 1, 0]})
    for name in ("codes", "other"):
        result = invoke("decode", tmp_path / f"{name}.safetensors", "--out", tmp_path / f"{name}.png", "-q")
        assert result.exit_code == 0, result.exception
    assert (tmp_path / "codes.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_an_npz_file_a_folder_and_a_file_in_this_order(models, pictures, tmp_path):
    draw = np.random.default_rng(1)
    arrays = {name: draw.integers(0, 256, (4, SIZE, SIZE), dtype=np.uint8) for name in ("x_train", "x_test")}
    np.savez(tmp_path / "data.npz", **arrays)
    given = read_inputs([tmp_path / "data.npz", pictures, pictures / "1.png"], (SIZE, SIZE), 1)
    assert given.values.shape == (8, 1, SIZE, SIZE)
    assert given.notes == ()
    expected = torch.from_numpy(arrays["x_test"]).float() / 127.5 - 1
    torch.testing.assert_close(given.values[:4, 0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(given.values[5], given.values[7], rtol=0, atol=0)
    train = read_inputs([tmp_path / "data.npz"], (SIZE, SIZE), 1, split="train", count=2)
    torch.testing.assert_close(train.values[:, 0], torch.from_numpy(arrays["x_train"][:2]).float() / 127.5 - 1)
    resized = read_inputs([tmp_path / "data.npz"], (4, 6), 3)
    assert resized.values.shape == (4, 3, 4, 6)
    cropped = "4 images cropped around the centre and resized from 8x8 to 6x4"
    assert set(resized.notes) == {cropped, "4 images made colour from grey"}
    _, report = inverted(models["vp"], tmp_path / "data.npz", tmp_path, *FEW, "--count", 1)
    assert report["images"][0]["name"] == f"{tmp_path / 'data.npz'}[0]"


def picture_file(path, kind):
    draw = np.random.default_rng(2)
    match kind:
        case "another size":
            Image.fromarray(draw.integers(0, 256, (30, 40), dtype=np.uint8)).save(path)
        case "alpha":
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)).save(path)
        case "grey and alpha":
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 2), dtype=np.uint8)).save(path)
        case "colour":
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
        case "16 bits":
            Image.fromarray(draw.integers(0, 2**16, (SIZE, SIZE), dtype=np.uint16)).save(path)
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray(draw.integers(0, 256, (SIZE, 2 * SIZE), dtype=np.uint8)).save(path, exif=exif)
        case "grey":
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("kind", "channels", "notes"),
    [
        ("grey", 1, []),
        ("colour", 3, []),
        ("another size", 1, ["1 image cropped around the centre and resized from 40x30 to 8x8"]),
        ("alpha", 3, ["1 image put on white where transparent"]),
        ("alpha", 1, ["1 image put on white where transparent", "1 image made grey"]),
        ("grey and alpha", 1, ["1 image put on white where transparent"]),
        ("colour", 1, ["1 image made grey"]),
        ("grey", 3, ["1 image made colour from grey"]),
        ("16 bits", 1, ["1 image brought from 16 to 8 bits"]),
        ("turned", 1, ["1 image turned as their EXIF data say", "1 image cropped around the centre from 8x16 to 8x8"]),
    ],
)
def test_images_of_other_kinds_are_converted_and_it_is_said(models, tmp_path, kind, channels, notes):
    path = tmp_path / "x.png"
    picture_file(path, kind)
    given = read_inputs([path], (SIZE, SIZE), channels)
    assert list(given.notes) == notes
    expected = read_image(path, size=(SIZE, SIZE), channels=channels).float() / 127.5 - 1
    torch.testing.assert_close(given.values[0], expected, rtol=0, atol=1e-6)
    if channels == 1:
        _, report = inverted(models["vp"], path, tmp_path, *FEW)
        assert report["notes"] == notes
        assert report["max_abs_error"] < 10 * TOLERANCE


def test_what_was_converted_is_said_on_the_terminal(models, tmp_path):
    for i in range(3):
        picture_file(tmp_path / f"{i}.png", "another size")
    result = invoke("invert", models["vp"], tmp_path, *FEW, "--out", tmp_path / "c.safetensors")
    assert result.exit_code == 0, result.exception
    first, last = result.stdout.strip().splitlines()
    assert first == "3 images cropped around the centre and resized from 40x30 to 8x8"
    assert last.startswith(f"{tmp_path / 'c.safetensors'}: 3 images in ")
    assert "max abs error" in last


def bad_input(kind, pictures, folder):
    path = folder / "x.png"
    match kind:
        case "missing":
            pass
        case "wrong suffix":
            path = folder / "x.txt"
            path.write_text("hello")
        case "corrupt":
            path.write_bytes((pictures / "0.png").read_bytes()[:40])
        case "corrupt among good ones":
            path = folder / "some"
            path.mkdir()
            (path / "a.png").write_bytes((pictures / "0.png").read_bytes())
            (path / "b.png").write_bytes(b"no picture")
        case "empty folder":
            path = folder / "empty"
            path.mkdir()
        case "corrupt npz":
            path = folder / "x.npz"
            path.write_bytes(b"PK no arrays")
        case "npz without test images":
            path = folder / "x.npz"
            np.savez(path, x_train=np.zeros((1, SIZE, SIZE), dtype=np.uint8))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "There is no file or folder"),
        ("wrong suffix", "ends in '.txt'"),
        ("corrupt", "cannot be read as an image"),
        ("corrupt among good ones", "b.png cannot be read as an image"),
        ("empty folder", "There is no image in"),
        ("corrupt npz", "cannot be read as an .npz file"),
        ("npz without test images", "has no array x_test"),
    ],
)
def test_bad_images_are_refused_in_a_sentence(models, pictures, tmp_path, kind, message):
    path, out = bad_input(kind, pictures, tmp_path), tmp_path / "out"
    result = invoke("invert", models["vp"], path, "--out", out / "c.safetensors", "--json", out / "r.json", "-q")
    refused(result, message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eta", 0.5], "stochastic"),
        (["--solver", "ddpm"], "stochastic"),
        (["--solver", "gddim", "--noise", 1], "stochastic"),
        (["--solver", "auto"], "no way leads back"),
        (["--solver", "rk45"], "leave out steps"),
        (["--solver", "odd"], "Unknown solver 'odd'"),
        (["--end", 0], "leave --end out"),
        (["--label", "c"], "no class 'c'"),
        (["--guidance", 2], "no label was given"),
        (["--tolerance", 0], "must be positive"),
        (["--split", "odd"], "There is no file or folder"),
        (["--picture", "x.mp3"], "got x.mp3"),
        (["--out", "codes.png"], "ends in .safetensors"),
        (["--device", "cuda:7"], "cannot be used"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_bad_options_are_refused_in_a_sentence(models, pictures, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    images = "nothing.npz" if "--split" in options else pictures
    refused(invoke("invert", models["vp"], images, "--steps", 2, "-q", *options), message)
    assert not list(tmp_path.iterdir())


def test_codes_are_decoded_by_their_own_model_or_one_like_it(models, pictures, tmp_path):
    codes, _ = inverted(models["vp"], pictures, tmp_path, *FEW)
    code, info = load_codes(codes)
    save_codes(tmp_path / "gone.safetensors", code, {**info, "model": str(tmp_path / "gone")})
    colour = Code(code.start.expand(-1, 3, -1, -1))
    save_codes(tmp_path / "colour.safetensors", colour, info)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(codes.read_bytes()[:-50])
    out = tmp_path / "out" / "x.png"
    for file, options, message in [
        (codes, ["--model", models["langevin"]], "for process 'vp', not 'langevin'"),
        (codes, ["--model", "no-such"], "No model 'no-such'"),
        (codes, ["--out", "x.mp3"], "got x.mp3"),
        (tmp_path / "gone.safetensors", [], "name it with --model"),
        (tmp_path / "colour.safetensors", [], "shape (3, 8, 8)"),
        (cut, [], "damaged"),
        (tmp_path / "missing.safetensors", [], "There is no file of codes"),
        (pictures / "0.png", [], "no file of codes"),
    ]:
        refused(invoke("decode", file, "--out", out, "-q", *options), message)
    assert not out.parent.exists()
    report = tmp_path / "decoded.json"
    result = invoke(
        "decode", tmp_path / "gone.safetensors", "--model", models["vp"], "--batch", 2, "--out", out, "--json", report
    )
    assert result.exit_code == 0, result.exception
    assert result.stdout.startswith(f"{out}: 3 images, 6 network evaluations each")
    values = json.loads(report.read_text())
    assert (values["solver"], values["steps"], values["nfe"], values["count"]) == ("ddim", 6, 6, 3)
    assert values["model"] == str(models["vp"])


def test_missing_the_tolerance_is_said_of_each_image_and_is_a_failure(models, pictures, tmp_path):
    """Float32 cannot give 1e-12; all is written all the same."""
    out, report = tmp_path / "c.safetensors", tmp_path / "r.json"
    result = invoke("invert", models["vp"], pictures, *FEW, "--tolerance", 1e-12, "--out", out, "--json", report)
    refused(result, "3 of 3 codes miss the tolerance of 1e-12")
    assert str(result.exception).endswith("Take more --steps or less --guidance.")  # its precision is the best there is
    assert len(load_codes(out)[0]) == 3
    images = json.loads(report.read_text())["images"]
    assert [image["met"] for image in images] == [False] * 3
    for image in images:
        assert f"{image['name']}: error {image['error']:.1e}, above the tolerance of 1e-12" in result.stdout
        assert image["residual"] == pytest.approx(image["max_abs_error"], abs=1e-5)


def test_json_to_stdout_is_all_there_is(models, pictures, tmp_path):
    codes = tmp_path / "c.safetensors"
    result = invoke("invert", models["vp"], pictures, *FEW, "--out", codes, "--json", "-", "-q")
    assert json.loads(result.stdout)["count"] == 3
    result = invoke("decode", codes, "--out", tmp_path / "x.png", "--json", "-", "-q")
    assert json.loads(result.stdout)["count"] == 3


@pytest.mark.parametrize("command", ["plot-plan", "invert"])
def test_the_options_of_plans_are_the_same_in_all_commands(command):
    text = " ".join(invoke(command, "--help").stdout.split())
    for option in ("solver", "steps", "order", "eta", "noise", "corrector", "variable", "reference", "grid", "end"):
        assert f"--{option} " in text
    defaults = ("ddim", "50") if command == "invert" else ("auto", "20")
    assert f"shorthand for such settings. [default: {defaults[0]}]" in text
    assert f"[default: {defaults[1]}; x>=1]" in text


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("ddim:steps=5:eta=0.5", ["--solver", "ddim", "--steps", 5, "--eta", 0.5]),
        ("gddim:order=1:steps=5:corrector=reuse", ["--solver", "gddim:order=1", "--steps", 5, "--corrector", "reuse"]),
        ("exponential:reference=0.3:steps=5:grid=angle:end=0.01",
         ["--solver", "exponential:end=0.01", "--reference", 0.3, "--grid", "angle", "--steps", 5]),
    ],
)  # fmt: skip
def test_options_are_shorthand_for_a_specification(models, tmp_path, text, flags):
    """The same plan, from the text alone and from options beside it."""
    reports = []
    for options in (["--solver", text], flags):
        result = invoke("plot-plan", models["vp"], *options, "--out", tmp_path / "plan.png", "--json", "-")
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.stdout))
    plan = parse(text).plan(load_model(models["vp"]))
    assert reports[0] == reports[1] == json.loads(json.dumps(describe(plan)))


@pytest.mark.parametrize(("options", "message"), [
    (["--solver", "ddim:steps=5", "--steps", 6], "says steps=5, and steps is also given as 6"),
    (["--solver", "ddim:eta=1", "--eta", 0.5], "says eta=1, and eta is also given as 0.5"),
    (["--solver", "ddim:steps=0"], "1 step or more"),
    (["--solver", "ddim:steps"], "is written solver:name=value"),
])  # fmt: skip
def test_a_setting_is_said_once(models, tmp_path, options, message):
    refused(invoke("plot-plan", models["vp"], *options, "--out", tmp_path / "plan.png"), message)


@pytest.mark.slow
def test_an_embedded_model(tmp_path):
    """A trained network, and two of its own samples as images; errors as in `TOLERANCE`."""
    result = invoke("sample", "fashion-vp", "--count", 2, "--steps", 10, "--out", tmp_path / "x.png", "--each",
                    tmp_path / "each", "-q")  # fmt: skip
    assert result.exit_code == 0, result.exception
    _, report = inverted("fashion-vp", tmp_path / "each", tmp_path, "--steps", 20)
    assert report["converged"] == sum(image["max_abs_error"] <= report["tolerance"] for image in report["images"])
    assert report["max_abs_error"] < 50 * TOLERANCE
    assert abs(report["code"]["std"] - 1) < 0.25

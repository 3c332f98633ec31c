"""Inpainting: of models whose conditional laws are known, and as a command."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pushforward as pf
from pushforward import SOLVERS, Diffusion, Model, PushforwardError, grid, load
from pushforward.cli import app
from pushforward.data.pictures import content_number, from_bytes, to_bytes
from pushforward.guidance.inpaint import inpaint
from pushforward.linear import VP, Gaussian
from pushforward.maps.spec import SamplerSpec
from pushforward.model import save_model
from pushforward.plan import repeated
from support.helpers import PROCESSES, gaussian_denoiser, mixture_denoiser, normal
from support.models import reading, saved
from support.pictures import pixels, places

SHAPE, SIDE = (1, 3, 2), 8
runner = CliRunner()


def pair(share: float = 0.9) -> Diffusion:
    """Two pixels of variance 1 and correlation `share`; each of 10 steps is taken five times."""
    frequencies = torch.tensor([[1 + share, 1 - share]], dtype=torch.float64)
    model = Model("pair", VP(), gaussian_denoiser(VP(), Gaussian(frequencies)), (1, 1, 2))
    return Diffusion(model, repeated(SOLVERS["ddpm"], VP(), grid.power(VP(), 10), 5))


def mixture(process: str = "vp", solver: str = "ddpm", **settings: object) -> Diffusion:
    own = PROCESSES[process]
    model = Model("mixture", own, mixture_denoiser(own, normal(3, *SHAPE, seed=0), 0.01), SHAPE)
    return Diffusion(model, SamplerSpec(solver, 5, settings).plan(model))


# -- in Python ---------------------------------------------------------------------------------------------------------


def test_draws_follow_what_is_known():
    """Given one pixel is x, the other is N(.9 x, .19); 800 draws have a standard error of .016, turns leave .1."""
    images = torch.tensor([1.0, -0.5]).view(2, 1, 1, 1).expand(2, 1, 1, 2)
    drawn = inpaint(pair(), images, torch.tensor([True, False]), draws=800, batch=1600)[:, :, 0, 0]
    assert torch.equal(drawn[..., 0], torch.tensor([1.0, -0.5])[:, None].expand(2, 800))
    assert (drawn[..., 1].mean(1) - torch.tensor([0.9, -0.45])).abs().max() < 0.1
    assert (drawn[..., 1].var(1) - 0.19).abs().max() < 0.1


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", ["ddpm", "dpm++"])
def test_known_pixels_stay_bit_for_bit(process, solver):
    """Whatever the process and the order; each image may have a mask of its own."""
    images, known = 0.3 * normal(3, *SHAPE).float(), torch.rand(3, *SHAPE, generator=torch.manual_seed(0)) > 0.5
    drawn = inpaint(mixture(process, solver), images, known, draws=2)
    assert drawn.shape == (3, 2, *SHAPE)
    for k in range(2):
        assert torch.equal(drawn[:, k][known], images[known])
        assert not torch.isclose(drawn[:, k][~known], images[~known]).any()


def test_a_draw_depends_on_the_seed_its_image_and_its_number_alone():
    """Not on the batch, the other images, or how many draws there are; to float32's rounding in other batches."""
    diffusion, known = mixture(repeats=2), torch.tensor([[True, False]])
    images = 0.3 * normal(4, *SHAPE).float()
    whole = inpaint(diffusion, images, known, draws=3, seed=5, first=[7, 1, 30, 2])
    pieces = inpaint(diffusion, images, known, draws=3, seed=5, first=[7, 1, 30, 2], batch=5)
    alone = inpaint(diffusion, images[2:3], known, draws=1, seed=5, first=30)
    assert torch.allclose(whole, pieces, atol=1e-5)
    assert torch.allclose(whole[2, :1], alone[0], atol=1e-5)
    assert not torch.allclose(whole[2, 0], whole[2, 1], atol=1e-2)
    other = inpaint(diffusion, images[2:3], known, seed=6, first=30)
    assert not torch.allclose(other, alone, atol=1e-2)


def test_with_nothing_known_it_samples_the_model():
    """Of the same law: the mixture's mean and deviation, 400 draws, five standard errors."""
    diffusion = mixture()
    drawn = inpaint(diffusion, torch.zeros(1, *SHAPE), torch.zeros(SHAPE), draws=400, batch=400)[0]
    free = diffusion.sample(400, seed=3, batch=400)
    error = free.std(0) * math.sqrt(2 / 400)
    assert ((drawn.mean(0) - free.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 0}, "1 draw or more"),
        ({"batch": 0}, "a batch of at least 1; got 2 and 0"),
        ({"known": torch.ones(7, 7)}, r"inpaints images of shape \(1, 3, 2\)"),
        ({"images": torch.zeros(2, 1, 4, 4)}, r"inpaints images of shape \(1, 3, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(options, said):
    asked = {"images": torch.zeros(2, *SHAPE), "known": torch.ones(SHAPE), **options}
    with pytest.raises(PushforwardError, match=said):
        inpaint(mixture(), asked.pop("images"), asked.pop("known"), **asked)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.tensor([[-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]), "got numbers from -1 to 1: compare them"),
        (torch.full((3, 2), float("nan")), "got numbers from nan to nan: compare them"),
        (torch.full((3, 2), 255, dtype=torch.uint8), "got numbers from 255 to 255: compare them"),
    ],
)
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(mask, said):
    with pytest.raises(PushforwardError, match=said):
        pf.inpaint(mixture().model, torch.zeros(2, *SHAPE), mask)


def test_a_solver_that_takes_no_repeats_takes_each_step_once():
    """Unless they are asked for."""
    model, images, mask = pair().model, torch.zeros(1, 1, 1, 2), torch.tensor([True, False])
    made = model.inpaint(images, mask, solver="auto", steps=5)
    assert made.equal(model.inpaint(images, mask, solver="auto:steps=5"))
    with pytest.raises(PushforwardError, match="leave out repeats"):
        model.inpaint(images, mask, solver="auto", repeats=4)


@pytest.mark.parametrize("solver", ["dpm++", "collocation"])
def test_steps_taken_once_are_the_solvers_own(solver):
    """Repeated steps forget those before them, which a multistep plan remembers; and no implicit ones are repeated."""
    images, mask = 0.3 * normal(2, *SHAPE).float(), torch.tensor([[True, False]])
    model = mixture().model
    made = model.inpaint(images, mask, solver=solver, steps=4, repeats=1)
    assert made.equal(model.inpaint(images, mask, solver=model.plan(solver, 4)))
    with pytest.raises(PushforwardError, match="says repeats=2, and repeats is also given as 1"):
        model.inpaint(images, mask, solver=f"{solver}:repeats=2", repeats=1)


def test_each_image_is_inpainted_under_its_own_label():
    """As alone under that label, but for the rounding of another batch."""
    model = load("fashion-vp")
    plain = Diffusion(model, SamplerSpec("ddpm", 4).plan(model))
    images, known = torch.zeros(2, *model.shape), torch.arange(28).view(28, 1) < 10
    both = inpaint(plain.given(["bag", "shirt"], 2.0), images, known, draws=2, batch=3)
    for k, label in enumerate(("bag", "shirt")):
        alone = inpaint(plain.given(label, 2.0), images[k : k + 1], known, draws=2, first=k)
        torch.testing.assert_close(both[k : k + 1], alone, rtol=0, atol=1e-3)
    with pytest.raises(PushforwardError, match="For 2 images give as many labels or prompts, or one; got 3"):
        inpaint(plain.given(["bag"] * 3), images, known)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models, three pictures and masks of the model's size, and masks that do not do."""
    root = tmp_path_factory.mktemp("inpaint")
    saved(VP(), root / "grey")
    save_model(reading(side=SIDE), root / "reads")
    values = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
    (root / "photos").mkdir()
    for i, value in enumerate(values):
        Image.fromarray(value).save(root / "photos" / f"{i}.png")
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[SIDE // 2 :] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(0 * mask).save(root / "black.png")
    Image.merge("LA", [Image.fromarray(mask)] * 2).save(root / "clear.png")
    return root


def run(files, out, *options, model="grey", mask="mask.png", images="photos"):
    arguments = ["inpaint", files / model, files / images, "--mask", files / mask, "--steps", 2, "--out", out, "-q"]
    return runner.invoke(app, [str(a) for a in [*arguments, *options]])


def test_the_command_paints_what_is_white_and_leaves_the_rest(files, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    result = run(files, out, "--draws", 2, "--repeats", 3, "--json", report)
    assert result.exit_code == 0, result.exception
    said = json.loads(report.read_text())
    assert (said["count"], said["nfe"], said["painted"]) == (3, 6, 0.5)
    assert [len(row["results"]) for row in said["images"]] == [2, 2, 2]
    for i in range(3):
        source = pixels(files / "photos" / f"{i}.png")
        first, second = (pixels(out / "images" / f"{i}-{k}.png") for k in range(2))
        half = SIDE // 2
        assert (first[:half] == source[:half]).all()
        assert (second[:half] == source[:half]).all()
        assert (first[half:] != source[half:]).any()
        assert (first[half:] != second[half:]).any()
    sheet = pixels(out / "sheet.png")  # image, what is known, two draws; three columns
    for name in ("0-0", "2-1"):
        assert len(places(sheet, pixels(out / "images" / f"{name}.png"), 96 // SIDE)) == 1


def test_repeats_are_taken_from_the_solver_or_beside_it(files, tmp_path):
    """Two steps: the text of the solver goes before the default of 4 repeats, and does not contradict the option."""
    result = run(files, tmp_path / "said", "--solver", "ddpm:repeats=2", "--json", "-")
    assert json.loads(result.stdout)["nfe"] == 4
    result = run(files, tmp_path / "twice", "--solver", "ddpm:repeats=2", "--repeats", 3)
    assert "says repeats=2, and repeats is also given as 3" in str(result.exception)


def test_the_command_takes_a_solver_whose_steps_are_all_taken_at_once(files, tmp_path):
    result = run(files, tmp_path, "--solver", "collocation", "--steps", 4, "--repeats", 1, "--json", "-")
    assert result.exit_code == 0, result.exception
    model = load(files / "grey")
    images = torch.stack([from_bytes(torch.from_numpy(pixels(files / "photos" / f"{i}.png")))[None] for i in range(3)])
    mask, first = torch.arange(SIDE)[:, None] >= SIDE // 2, [content_number(image) for image in to_bytes(images)]
    expected = model.inpaint(images, mask, solver="collocation", steps=4, repeats=1, first=first)
    for i, image in enumerate(to_bytes(expected)):
        assert (pixels(tmp_path / "images" / f"{i}.png") == image[0].numpy()).all()


def test_an_interrupted_run_does_what_is_left_and_no_more(files, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(files, whole), run(files, part)
    kept = part / "images" / "0.png"
    before = kept.stat().st_mtime_ns
    for name in ("1.png", "2.png"):
        (part / "images" / name).unlink()
    result = run(files, part, "--batch", 1, "--json", "-")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["done_before"] == 1
    assert kept.stat().st_mtime_ns == before
    for name in ("0.png", "1.png", "2.png"):
        assert (part / "images" / name).read_bytes() == (whole / "images" / name).read_bytes()


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_an_image_that_lacks_a_draw_is_painted_again(files, tmp_path, draw):
    options = ["--draws", 3, "--json", "-"]
    assert run(files, tmp_path, *options).exit_code == 0
    path = tmp_path / "images" / f"1-{draw}.png"
    whole = path.read_bytes()
    for left in (None, whole[:-40]):
        path.unlink() if left is None else path.write_bytes(left)
        result = run(files, tmp_path, *options)
        assert result.exit_code == 0, result.exception
        assert json.loads(result.stdout)["done_before"] == 2
        assert path.read_bytes() == whole


def test_another_mask_of_the_same_name_is_another_run(files, tmp_path):
    mask = tmp_path / "mask.png"
    shutil.copy(files / "mask.png", mask)
    assert run(files, tmp_path / "out", mask=mask).exit_code == 0
    with Image.open(mask) as picture:
        turned = picture.rotate(180)
    turned.save(mask)
    result = run(files, tmp_path / "out", mask=mask)
    assert "other settings (known differ)" in str(result.exception)


def test_an_image_that_gets_another_label_by_those_before_it_is_painted_again(files, tmp_path):
    """Labels are taken in turn, so an image that comes first moves all others to the next."""
    mine, asked = shutil.copytree(files / "photos", tmp_path / "mine"), ["--label", "a", "--label", "b", "--batch", 1]
    assert run(files, tmp_path / "out", *asked, images=mine).exit_code == 0
    shutil.copy(mine / "0.png", mine / "00.png")
    result = run(files, tmp_path / "out", *asked, "--json", "-", images=mine)
    assert json.loads(result.stdout)["done_before"] == 1  # 00.png is behind 0.png
    assert run(files, tmp_path / "fresh", *asked, images=mine).exit_code == 0
    for name in ("0", "00", "1", "2"):
        one, other = (pixels(tmp_path / place / "images" / f"{name}.png") for place in ("out", "fresh"))
        assert (one == other).all()


def test_the_command_takes_the_plan_that_python_takes_under_guidance(files, tmp_path):
    """`auto` goes by it: its polynomials are a degree lower, which moves these images by a few levels or more."""
    solver = {"solver": "auto", "steps": 8}
    options = ["--solver", "auto", "--steps", 8, "--label", "a", "--guidance", 8]
    assert run(files, tmp_path / "out", *options).exit_code == 0
    images = [torch.from_numpy(pixels(files / "photos" / f"{i}.png"))[None].byte() for i in range(3)]
    painted = torch.arange(SIDE)[:, None] >= SIDE // 2
    drawn = load(files / "grey").inpaint(from_bytes(torch.stack(images)), painted, labels="a", guidance=8,
                                         first=[content_number(image) for image in images], **solver)  # fmt: skip
    for i, image in enumerate(to_bytes(drawn)[:, 0].int()):
        assert (image - torch.from_numpy(pixels(tmp_path / "out" / "images" / f"{i}.png")).int()).abs().max() <= 1


def test_prompts_are_told(files, tmp_path):
    for prompt in ("a", "b"):
        result = run(files, tmp_path / prompt, "--prompt", prompt, "--guidance", 3, model="reads")
        assert result.exit_code == 0, result.exception
    one, other = (pixels(tmp_path / prompt / "images" / "0.png") for prompt in ("a", "b"))
    assert (one != other).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": "black.png"}, "has no white pixel"),
        ({"mask": "clear.png"}, "is transparent in places"),
        ({"mask": "none.png"}, "cannot be read"),
        ({"images": "none"}, "none"),
        ({"options": ["--label", "nothing"]}, "has no class 'nothing'"),
        ({"options": ["--prompt", "a"]}, "reads no prompts"),
        ({"options": ["--solver", "nonsense"]}, "nonsense"),
        ({"options": ["--draws", 10**30]}, "Ask for less"),
    ],
)
def test_the_command_refuses_in_a_sentence(files, tmp_path, options, said):
    result = run(files, tmp_path / "out", *options.pop("options", []), **options)
    assert isinstance(result.exception, PushforwardError), result.exception
    assert said in str(result.exception)
    assert not (tmp_path / "out").exists()

"""FlowEdit is its paper's update; the same ends change nothing; an image does not depend on its batch."""

import pytest
import torch

import pushforward as pf
from pushforward.data.pictures import save_image, sheet
from pushforward.maps.code import GaussianStream
from pushforward.plan import ddim
from pushforward.translation.flowedit import PULL, flowedit
from pushforward.translation.translate import TRANSLATIONS
from support.cli import invoke
from support.families.transformers import FAMILIES
from support.helpers import FIELD, PROCESSES, mixture_denoiser, normal, times

SOURCE, TARGET = 0.5 * normal(3, 1, *FIELD), 0.3 + 0.4 * normal(3, 1, *FIELD).flip(0)
IMAGES = 0.5 * normal(2, 1, *FIELD)
GRID = times(0.8, 0.6, 0.3, 0.1, 0.0)


def end(process, data, grid=GRID):
    model = pf.Model("mixture", process, mixture_denoiser(process, data, 0.1), (1, *FIELD))
    return pf.Diffusion(model, ddim(process, grid * process.t_max), dtype=torch.float64)


@pytest.mark.parametrize("align", [None, 2.0])
def test_it_is_the_update_of_the_papers(align):
    """Velocities and images as in the papers' own notation, written out."""
    process = PROCESSES["flow"]
    source, target = end(process, SOURCE), end(process, TARGET)
    stream, x = GaussianStream(0, range(2), IMAGES.shape[1:]), IMAGES.double()
    z = x.clone()
    for t, after in zip(GRID[:-1].tolist(), GRID[1:].tolist(), strict=True):
        noisy = (1 - t) * x + t * stream.draw().double()
        other = z + noisy - x
        clean, moved, kept = (
            d.model.denoiser.denoise(u, t) for d, u in ((source, noisy), (target, other), (source, other))
        )
        v_source, v_target, v_kept = (noisy - clean) / t, (other - moved) / t, (other - kept) / t
        if align is not None:
            v_target = v_kept + align * (v_target - v_kept)
            z = z + PULL * ((noisy - t * v_source) - (other - t * v_target))
        z = z + (after - t) * (v_target - v_source)
    torch.testing.assert_close(flowedit(IMAGES, source, target, align=align), z.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("align", [None, 2.0])
@pytest.mark.parametrize("name", ["vp", "flow", "ve"])
def test_equal_ends_change_nothing(name, align):
    there = end(PROCESSES[name], SOURCE)
    torch.testing.assert_close(flowedit(IMAGES, there, there, align=align), IMAGES.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("align", [None, 2.0])
def test_a_diffusion_is_edited_as_the_flow_that_it_is(align):
    process = PROCESSES["vp"]
    source, target = end(process, SOURCE), end(process, TARGET)
    alpha, sigma = process.alpha_sigma(source.plan.times)
    flows = []
    for one in (source, target):
        model = one.model.as_flow()
        flows.append(pf.Diffusion(model, ddim(model.process, sigma / (alpha + sigma)), dtype=torch.float64))
    found = flowedit(IMAGES, source, target, align=align)
    torch.testing.assert_close(found, flowedit(IMAGES, *flows, align=align), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("align", [None, 2.0])
def test_an_image_does_not_depend_on_its_batch(align):
    source, target = end(PROCESSES["vp"], SOURCE), end(PROCESSES["vp"], TARGET)
    alone = [flowedit(IMAGES[i : i + 1], source, target, align=align, seed=3, first=i) for i in range(2)]
    torch.testing.assert_close(flowedit(IMAGES, source, target, align=align, seed=3), torch.cat(alone))


def test_other_plans_are_refused():
    with pytest.raises(pf.PushforwardError, match="one process"):
        flowedit(IMAGES, end(PROCESSES["vp"], SOURCE), end(PROCESSES["flow"], SOURCE))
    with pytest.raises(pf.PushforwardError, match="a deterministic, explicit plan"):
        model = end(PROCESSES["vp"], SOURCE).model
        there = pf.Diffusion(model, pf.SOLVERS["collocation"](model.process, pf.grid.power(model.process, 4)))
        flowedit(IMAGES, there, there)
    with pytest.raises(pf.PushforwardError, match="FlowAlign is for scalar"):
        there = end(PROCESSES["langevin"], SOURCE)
        flowedit(IMAGES, there, there, align=2.0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of diffusers
@pytest.mark.parametrize("method", TRANSLATIONS)
def test_every_method_edits_by_a_pipeline(method):
    """A tiny one of random weights, whose call says the prompt: both ends are of one pipeline."""
    tiny = FAMILIES["Flux schnell"]()
    tiny.pipe.set_progress_bar_config(disable=True)
    source, target = (pf.from_pipeline(tiny.pipe, **{**tiny.call, "prompt": text}) for text in ("a cat", "a dog"))
    images = source.sample(2, steps=2, seed=1).clamp(-1, 1)
    told = []
    found = source.translate(images, target, method=method, steps=3, start=0.7, batch=1, callback=told.append)
    assert found.images.shape == images.shape
    assert found.images.isfinite().all()
    assert told
    alone = source.translate(images[1:], target, method=method, steps=3, start=0.7, first=1)
    torch.testing.assert_close(found.images[1:], alone.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["uni-inv", "direct", "flowedit", "flowalign"])
def test_the_verb_edits_by_every_method(method):
    model = pf.load("fashion-vp")
    shoe = model.sample(1, labels="sneaker", steps=8)
    found = model.edit(shoe, "sneaker", "ankle boot", method=method, steps=4, guidance=2)
    assert found.images.shape == shoe.shape
    assert (found.code is None) == method.startswith("flow")
    assert float((found.images - shoe).abs().max()) > 0.05


@pytest.mark.parametrize("method", ["direct", "flowedit"])
def test_the_command_edits_and_inverts(tmp_path, method):
    save_image(sheet(pf.load("fashion-vp").sample(1, labels="sneaker", steps=8), smallest=0), tmp_path / "shoe.png")
    invoke("edit", tmp_path / "shoe.png", "--model", "fashion-vp", "--source", "sneaker", "--target", "ankle boot",
           "--steps", 4, "--trials", 1, "--method", method, "--out", tmp_path / "edited")  # fmt: skip
    assert (tmp_path / "edited" / "shoe" / "best.png").is_file()
    if method == "direct":
        codes = tmp_path / "codes.safetensors"
        invoke("invert", "fashion-vp", tmp_path / "shoe.png", "--method", method, "--steps", 4, "--out", codes)
        invoke("decode", codes, "--out", tmp_path / "again.png")
        assert (tmp_path / "again.png").is_file()

"""Models with plans, from Python: codes, batches, labels, folders on disk."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pushforward as pf
from pushforward.cli import app
from pushforward.data.pictures import to_bytes
from pushforward.denoiser import Watched
from pushforward.linear import VP, Blurring, Langevin
from pushforward.model import load_model, save_model
from pushforward.plan import auto, ddim, grid
from support.models import SIZE, tiny


@pytest.fixture(params=[VP(), Blurring((SIZE, SIZE)), Langevin()], ids=lambda p: p.name)
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_seed_and_index_alone(model, eta):
    """Whatever the batch; float32 rounding of convolutions over other batch sizes."""
    sampler = pf.Diffusion(model, ddim(model.process, grid.uniform(model.process, 4), eta=eta))
    labels = torch.tensor([0, 1, 0, 1, 1])
    whole = sampler.given(labels).sample(5, seed=3)
    pieces = sampler.given(labels).sample(5, seed=3, batch=2)
    assert whole.shape == (5, 1, SIZE, SIZE)
    torch.testing.assert_close(whole, pieces, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(whole, sampler.given(labels).sample(5, seed=4), atol=1e-2)
    assert not torch.allclose(whole[0], whole[2], atol=1e-2)


def test_labels_matter_and_guidance_too(model):
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    sampler = pf.Diffusion(model, auto(model.process, 3, model.reference))
    zero, one = (sampler.given(torch.tensor([k])).sample(1) for k in (0, 1))
    guided = sampler.given(torch.tensor([1]), 3.0).sample(1)
    assert not torch.allclose(zero, one, atol=1e-4)
    assert not torch.allclose(guided, one, atol=1e-4)


def test_a_watched_map_knows_its_network_and_the_means_of_its_classes():
    means = torch.linspace(-1, 1, 2 * SIZE**2).view(2, 1, SIZE, SIZE)
    model = replace(tiny(VP()), means=means)
    there = pf.Diffusion(model, ddim(model.process, grid.uniform(model.process, 4))).given(["b", "a"])
    watched = there.around(lambda denoiser: Watched(denoiser, lambda *_, **__: None)).bound
    assert watched.module is model.module
    torch.testing.assert_close(watched.gaussian.mean, means[[1, 0]], rtol=0, atol=0)


def test_labels_have_names_and_one_is_every_images(model):
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plan = ddim(model.process, grid.power(model.process, 3))
    sampler = pf.Diffusion(model, plan)
    numbers = sampler.given(torch.tensor([1, 0, 1])).sample(3)
    for labels in (["b", "a", "b"], [1, 0, 1], ["1", 0, "b"]):
        torch.testing.assert_close(sampler.given(labels).sample(3, batch=2), numbers, rtol=1e-4, atol=1e-4)
    every = sampler.given(torch.tensor([1, 1, 1])).sample(3)
    for labels in ("b", 1, ["b"], torch.tensor([1])):
        torch.testing.assert_close(sampler.given(labels).sample(3, batch=2), every, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sampler.given(labels).decode(sampler.draw(3)), every)
    with pytest.raises(pf.PushforwardError, match="has no class 'c'; it has a, b"):
        sampler.given("c").sample(3)


def test_classes_are_drawn_in_turn_unless_labels_are_given(model, tmp_path):
    """From Python and from the command line the same, image by image; `None` is without labels."""
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(model, tmp_path / "m")
    sampler = pf.Diffusion(pf.load(tmp_path / "m"), ddim(model.process, grid.power(model.process, 3)))
    drawn = sampler.sample(5, seed=4)
    torch.testing.assert_close(drawn, sampler.given([0, 1, 0, 1, 0]).sample(5, seed=4))
    rest = sampler.sample(2, seed=4, first=3)
    torch.testing.assert_close(rest, drawn[3:], rtol=1e-4, atol=1e-4)
    code = sampler.draw(5, seed=4)
    torch.testing.assert_close(sampler.given(None).sample(5, seed=4), sampler.decode(code))
    arguments = ["sample", tmp_path / "m", "--solver", "ddim", "--steps", 3, "--count", 5, "--seed", 4]
    arguments += ["--each", tmp_path / "each", "--out", tmp_path / "s.png"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "classes of m are drawn in turn; --label says which" in result.output
    for k, image in enumerate(drawn):
        with Image.open(tmp_path / "each" / f"{k:05d}.png") as file:
            found = torch.from_numpy(np.array(file)).long()
        assert (found - to_bytes(image)[0].long()).abs().max() <= 1  # rounding


def test_a_model_under_labels_keeps_them(model):
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plan, labels = ddim(model.process, grid.power(model.process, 3)), torch.tensor([0, 1, 1])
    asked = {"seed": 3, "batch": 2}
    expected = pf.Diffusion(model, plan).given(labels, 2.0).sample(3, **asked)
    first = model.given(labels.flip(0))
    for given in (model.given(labels, 2.0), first.given(labels).given(None, 2.0), first.given(labels, 2.0)):
        under = pf.Diffusion(given, plan)
        torch.testing.assert_close(under.sample(3, **asked), expected)  # in batches of 2 and 1: each image its own
        torch.testing.assert_close(under.decode(under.draw(3, seed=3)), expected)
        assert not torch.allclose(under.given(labels.flip(0)).sample(3, **asked), expected)
        with pytest.raises(pf.PushforwardError, match="For 4 images give as many labels or prompts, or one; got 3"):
            under.sample(4)
    same = pf.Diffusion(model, plan).given(torch.tensor([1, 1, 1])).sample(3, **asked)
    one = pf.Diffusion(model.given(torch.tensor([1])), plan)  # is every image's
    torch.testing.assert_close(one.sample(3, **asked), same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_model_is_the_same_model(model, tmp_path, dtype):
    save_model(model, tmp_path / "m", card="# card\n", dtype=dtype)
    again = load_model(tmp_path / "m")
    assert again.process == model.process
    assert again.classes == model.classes
    assert again.parameters == model.parameters
    samples = [pf.Diffusion(m, auto(m.process, 3, m.reference)).sample(2) for m in (model, again)]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # half precision of the weights
    torch.testing.assert_close(*samples, rtol=0, atol=tolerance)
    assert pf.load(tmp_path / "m").name == "m"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_of_any_precision(model, dtype):
    plan = auto(model.process, 3, model.reference)
    expected = pf.Diffusion(model, plan).sample(2)
    found = pf.Diffusion(model, plan, dtype=dtype).sample(2)
    tolerance = 1e-4 if dtype == torch.float64 else 0.2  # three digits of bfloat16, a few steps
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def broken(folder, kind):
    config = folder / "config.json"
    weights = folder / "model.safetensors"
    match kind:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "garbage":
            weights.write_bytes(b"not weights")
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "bad json":
            config.write_text("{")
        case _:
            values = json.loads(config.read_text())
            values.update(kind)
            config.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "damaged"),
        ("garbage", "damaged"),
        ("no weights", "There is no file of weights"),
        ("no config", "is missing"),
        ("bad json", "not valid JSON"),
        ({"process": {"name": "odd"}}, "Unknown process"),
        ({"shape": None}, "lacks the entry"),
        ({"network": {"in_channels": 1, "out_channels": 1, "widths": [8, 8], "groups": 4}}, "does not fit"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_a_damaged_folder_is_refused_in_a_sentence(tmp_path, kind, message):
    save_model(tiny(VP()), tmp_path / "m")
    broken(tmp_path / "m", kind)
    with pytest.raises(pf.PushforwardError, match=message) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(pf.PushforwardError, match="neither a folder"):
        pf.load("no-such-model")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(pf.PushforwardError, match="is a file"):
        pf.load(file)


def test_a_plan_for_another_process_is_refused():
    with pytest.raises(pf.PushforwardError, match="for another"):
        pf.Diffusion(tiny(VP()), ddim(Langevin(), grid.uniform(Langevin(), 2)))


@pytest.mark.parametrize(
    ("count", "condition", "message"),
    [
        (0, {}, "at least 1"),
        (3, {"labels": torch.tensor([0, 1])}, "as many labels"),
        (1, {"labels": torch.tensor([2])}, "go from 0 to 1"),
        (1, {"labels": torch.tensor([2], dtype=torch.int32)}, "go from 0 to 1"),
        (1, {"labels": None, "guidance": 2.0}, "no label was given"),
    ],
)
def test_bad_requests_are_refused(count, condition, message):
    model = tiny(VP())
    with pytest.raises(pf.PushforwardError, match=message):
        pf.Diffusion(model, auto(VP(), 2, model.reference)).given(**condition).sample(count)


def test_a_bound_map_is_bound_until_it_is_given_something_else(model):
    """Labels and guidance stay as they are where they are not said; `some` picks the labels of these images."""
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plain = pf.Diffusion(model, ddim(model.process, grid.power(model.process, 3)))
    code, labels = plain.draw(3), torch.tensor([0, 1, 1])
    both = plain.given(labels, 2.0)
    images = both.decode(code)
    for same in (plain.given(labels).given(guidance=2.0), plain.given(guidance=2.0).given(labels), both.given()):
        assert torch.equal(same.decode(code), images)
    assert torch.equal(both.given(guidance=1.0).decode(code), plain.given(labels).decode(code))
    for none in (both.given(None, 1.0), plain.given(None)):
        assert torch.equal(none.decode(code), plain.decode(code))
        assert torch.equal(none.sample(3), none.decode(code))
    some = torch.tensor([2, 0])
    torch.testing.assert_close(both.some(some).decode(code[some]), images[some], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.some(slice(1, 3)).decode(code[1:]), images[1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.given("b").some(some).decode(code[some]), plain.given([1, 1]).decode(code[some]))
    turns = plain.given(guidance=2.0)
    torch.testing.assert_close(turns.sample(3, first=1), plain.given([1, 0, 1], 2.0).sample(3, first=1))
    with pytest.raises(pf.PushforwardError, match="no label was given"):
        turns.decode(code)


def test_any_callable_is_a_model():
    """A formula in place of a network, on points instead of images."""
    process = VP()
    network = pf.Function(lambda u, t: torch.zeros_like(u))
    model = pf.Model("origin", process, network, (2,))
    points = pf.Diffusion(model, ddim(process, grid.uniform(process, 5))).sample(4)
    torch.testing.assert_close(points, torch.zeros(4, 2), rtol=0, atol=1e-5)

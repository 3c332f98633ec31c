"""Editing by text: every candidate once, whatever the batch, and a likelihood that knows which text is right."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pushforward.errors import PushforwardError
from pushforward.linear import VP, Langevin
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, Network
from pushforward.plan import ddim, grid
from pushforward.translation.edit import Search, edits, likelihood
from pushforward.translation.translate import TRANSLATIONS
from support.models import reading, tiny

SIDE = 8
FEW = SamplerSpec("ddim", 4)


@pytest.fixture(scope="module", params=[VP(), Langevin()], ids=lambda p: p.name)
def model(request):
    return reading(request.param)


@pytest.fixture
def image(seed):
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(model, image, search, *, source="a cat", target="a dog", sampler=FEW, **settings):
    return list(edits(model, image, source, target, sampler, search, **settings))


# -- the search


def test_every_combination_is_made_once(model, image):
    told = []
    search = Search(guidances=(1.0, 2.0, 5.0), skips=(0.0, 0.5), trials=3)
    found = made(model, image, search, batch=2, callback=told.append)
    keys = [(one.skip, one.guidance, one.trial) for one in found]
    assert sorted(keys) == sorted((s, g, t) for s in (0.0, 0.5) for g in (1.0, 2.0, 5.0) for t in range(3))
    assert len(found) == search.count == sum(told) == 18
    assert len({one.name for one in found}) == 18
    assert found[0].name == "skip0-guidance1-trial00"
    assert all(one.image.shape == (3, SIDE, SIDE) and one.image.isfinite().all() for one in found)
    apart = [(a.image - b.image).abs().max() for i, a in enumerate(found) for b in found[:i]]
    assert min(apart) > 1e-4  # no two are the same picture


@pytest.mark.parametrize("method", ["stochastic", "independent", "sdedit"])
def test_a_trial_does_not_depend_on_the_batch(model, image, method):
    """Nor on how many trials there are; float32 rounding of convolutions, over noise of eta = 1."""
    sampler = SamplerSpec("ddim", 4, {"eta": 1.0})
    search = Search(guidances=(1.5,), skips=(0.2,), trials=7, method=method)
    whole = made(model, image, search, sampler=sampler, seed=3, batch=7)
    for batch in (1, 2):
        part = made(model, image, search, sampler=sampler, seed=3, batch=batch)
        for one, other in zip(whole, part, strict=True):
            assert (one.name, one.trial) == (other.name, other.trial)
            torch.testing.assert_close(one.image, other.image, rtol=0, atol=1e-3)
    two = Search(guidances=(1.5,), skips=(0.2,), trials=2, method=method)
    for one, other in zip(whole, made(model, image, two, sampler=sampler, seed=3), strict=False):
        torch.testing.assert_close(one.image, other.image, rtol=0, atol=1e-3)
    other = made(model, image, search, sampler=sampler, seed=4)
    assert float((whole[0].image - other[0].image).abs().max()) > 1e-2


@pytest.mark.parametrize("method", TRANSLATIONS)
def test_the_same_text_keeps_the_image(model, image, method):
    """With guidance 1 both ways and a plan that ends at t_min: float32 rounding; the inversion's own error (1e-4).

    SDEdit is no code, and does not; uni-inv is of a pass that is far off in four steps; FlowAlign is for
    scalar processes.
    """
    if method == "uni-inv" or (method == "flowalign" and model.process.name == "langevin"):
        return
    sampler = SamplerSpec("ddim", 4, end=model.process.t_min)
    search = Search(guidances=(1.0,), skips=(0.2, 0.5), method=method)
    for one in made(model, image, search, source="a cat", target="a cat", sampler=sampler):
        error = float((one.image - image).abs().max())
        assert error > 1e-2 if method == "sdedit" else error < 1e-3
    if method != "sdedit":
        other = made(model, image, search, source="a cat", target="a dog", sampler=sampler)
        assert min(float((one.image - image).abs().max()) for one in other) > 3e-3


def test_guidance_leads_on_along_the_text(model, image):
    """Twice the weight, more of the change: the edits differ from that of weight 1 more and more."""
    found = made(model, image, Search(guidances=(1.0, 3.0, 9.0), skips=(0.2,)))
    near, far = (float((one.image - found[0].image).norm()) for one in found[1:])
    assert 1e-3 < near < far


def test_the_source_text_is_used_and_its_guidance(model, image):
    plain = made(model, image, Search(guidances=(1.0,)))[0].image
    assert float((plain - made(model, image, Search(guidances=(1.0,)), source="a red car")[0].image).abs().max()) > 1e-4
    guided = made(model, image, Search(guidances=(1.0,), source_guidance=3.0))[0].image
    assert float((plain - guided).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 0}, "needs a trial"),
        ({"guidances": ()}, "needs a trial, a guidance"),
        ({"skips": ()}, "needs a trial"),
        ({"skips": (0.2, 1.0)}, "skips from 0 up to below 1"),
        ({"skips": (-0.1,)}, "skips from 0 up to below 1"),
        ({"skips": (float("nan"),)}, "a finite number; got nan"),
        ({"method": "deterministic", "trials": 2}, "take 1 trial"),
    ],
)
def test_a_search_of_nothing_is_refused(settings, message):
    with pytest.raises(PushforwardError, match=message):
        Search(**settings)


def test_what_cannot_be_edited_is_refused_in_a_sentence(image):
    search = Search()
    for model, given, sampler, message in [
        (tiny(VP(), classes=()), image[:1], FEW, "Model 'tiny' reads no prompts and has no classes"),
        (tiny(VP()), image[:1], FEW, "Model 'tiny' has no class 'a cat'; it has a, b"),
        (reading(), image[:, :4], FEW, r"has images of shape \(3, 8, 8\); got \(3, 4, 8\)"),
        (reading(), image, SamplerSpec("ddim", 4, {"eta": 0.0}), "has no noises to find"),
        (reading(), image, SamplerSpec("rk45"), "chooses its own settings"),
    ]:
        with pytest.raises(PushforwardError, match=message) as caught:
            made(model, given, search, sampler=sampler)
        assert "\n" not in str(caught.value)


def test_an_image_is_edited_from_class_to_class(image):
    """As the code under one is decoded under the other; and to the same class, it stays."""
    model = tiny(VP())
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    sampler, search = SamplerSpec("ddim", 4, end=model.process.t_min), Search(guidances=(1.0,), skips=(0.2,), trials=2)
    moved = list(edits(model, image[:1], "a", "b", sampler, search))
    kept = list(edits(model, image[:1], "a", "a", sampler, search))
    for one, other in zip(kept, moved, strict=True):
        torch.testing.assert_close(one.image, image[:1], rtol=0, atol=1e-3)
        assert not torch.allclose(other.image, one.image, atol=1e-4)


def test_guidances_at_once_begin_at_one_another(model, image):
    """The images are those of the steps one by one, to the tolerance."""
    search, at_once = Search(guidances=(1.0, 1.5, 2.0)), replace(FEW, parallel="preconditioned", within=1e-5)
    for one, other in zip(made(model, image, search), made(model, image, search, sampler=at_once), strict=True):
        torch.testing.assert_close(one.image, other.image, rtol=0, atol=1e-3)


# -- likelihood


class Knows(nn.Module):
    """Predicts the image that its words name: `bright` +0.6, `dark` -0.6, and 0 of anything else."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, u, t, level):
        return level.view(-1, 1, 1, 1).to(u).expand(-1, 3, -1, -1) + 0 * u[:, :3]


def levels(texts):
    return (torch.tensor([0.6 * (("bright" in text) - ("dark" in text)) for text in texts]),)


def knowing(process):
    return Model("knowing", process, Network(Knows(), prediction="sample"), (3, SIDE, SIDE), text=levels)


@pytest.fixture(scope="module", params=[VP(), Langevin()], ids=lambda p: p.name)
def knower(request):
    return knowing(request.param)


def flat(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)


def test_likelihood_is_the_share_of_the_errors(knower):
    """By hand: the answers are the points whatever the noise, so `(e_s - e_t) / (e_s + e_t)` of squared distances."""
    images = flat(0.5, 0.1, 0.0, -0.4, -0.6)
    found = likelihood(knower, images, "dark", "bright", times=3)
    x = torch.tensor([0.5, 0.1, 0.0, -0.4, -0.6], dtype=torch.float64)
    dark, bright = (x + 0.6).square(), (x - 0.6).square()
    torch.testing.assert_close(found.double(), (dark - bright) / (dark + bright), rtol=0, atol=1e-5)
    assert found[0] > 0 > found[3]
    assert found[4] == pytest.approx(-1, abs=1e-6)


def test_likelihood_of_the_same_text_is_none_and_of_exchanged_texts_the_opposite(model, knower, image):
    images = torch.stack([image, -image, image.flip(1)])
    for network in (model, knower):
        assert torch.equal(likelihood(network, images, "a dark cat", "a dark cat"), torch.zeros(3, dtype=torch.float64))
        there = likelihood(network, images, "a dark cat", "a bright dog", times=4)
        back = likelihood(network, images, "a bright dog", "a dark cat", times=4)
        torch.testing.assert_close(there, -back, rtol=0, atol=1e-12)
        assert bool((there.abs() > 1e-6).all())
        assert bool((there.abs() <= 1).all())


def test_likelihood_of_no_error_at_all_is_none():
    """Where both texts explain the image without error, they make no difference."""
    assert likelihood(knowing(VP()), flat(0.6), "bright", "bright sun", times=2).tolist() == [0.0]


def test_likelihood_is_of_each_image_alone(model, image):
    """Whatever the batch; float32 rounding of convolutions, in differences of errors that are alike."""
    images = torch.stack([image * scale for scale in (1.0, -1.0, 0.5, 0.2, -0.3)])
    whole = likelihood(model, images, "a cat", "a dog", times=4)
    for batch in (1, 2):
        torch.testing.assert_close(likelihood(model, images, "a cat", "a dog", times=4, batch=batch), whole,
                                   rtol=0, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(likelihood(model, images[2:3], "a cat", "a dog", times=4), whole[2:3], rtol=0, atol=1e-5)
    assert not torch.equal(likelihood(model, images, "a cat", "a dog", times=4, seed=1), whole)


def test_an_edit_makes_the_target_text_more_likely(knower):
    """From dark to bright, by a network that knows both: the image ends on the other side.

    Where the network's answer is the point, half of the steps leave the image's rest on it.
    """
    source = flat(-0.6)[0] + 0.02 * torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    sampler = SamplerSpec("ddim", 20, end=0.02)
    found = made(knower, source, Search(guidances=(1.0,), skips=(0.0,), trials=4), source="dark", target="bright",
                 sampler=sampler)  # fmt: skip
    gains = likelihood(knower, torch.stack([source, *(one.image for one in found)]), "dark", "bright")
    assert float(gains[0]) < -0.99
    assert float(gains[1:].min()) > 0.9


# -- prompts


def test_words_matter_and_others_do_not(model):
    """Case and punctuation are none; the texts' rows of a table do not depend on one another."""
    plan = ddim(model.process, grid.uniform(model.process, 3))
    sampler = Diffusion(model, plan)
    one, other = (sampler.given([text]).sample(1) for text in ("a cat", "a dog"))
    assert float((one - other).abs().max()) > 1e-2
    assert torch.equal(one, sampler.given(["A  Cat!"]).sample(1))
    both = sampler.given(["a cat", "a dog"]).sample(2)
    torch.testing.assert_close(both[:1], one, rtol=0, atol=1e-5)

"""A scalar diffusion as flow matching: the same answers, the same images, and the same conditions."""

import pytest
import torch

import pushforward as pf
from pushforward.errors import PushforwardError
from pushforward.linear import Flow, ScaledProcess
from pushforward.plan import ddim, grid
from support.helpers import FIELD, PROCESSES, mixture_denoiser, normal, times

SCALAR = {n: p for n, p in PROCESSES.items() if isinstance(p, ScaledProcess) and not p.basis.shape}
EVERY = pytest.mark.parametrize("process", SCALAR.values(), ids=SCALAR)
IMAGES = 0.5 * normal(3, 1, *FIELD)


def model(process):
    return pf.Model("mixture", process, mixture_denoiser(process, IMAGES, 0.1), (1, *FIELD))


@EVERY
def test_it_answers_as_the_posterior_mean_of_flow_matching(process):
    """The truth is the mixture's own posterior mean under `(1 - t) x + t noise`."""
    there = model(process).as_flow()
    assert isinstance(there.process, Flow)
    ts = there.process.t_min + (there.process.t_max - there.process.t_min) * times(0.0, 0.3, 0.7, 0.99)
    u = normal(4, 1, *FIELD).double()
    own, truth = (d.at(there.process, ts, u) for d in (there.denoiser, mixture_denoiser(there.process, IMAGES, 0.1)))
    for k in range(len(ts)):
        torch.testing.assert_close(own(k, u), truth(k, u), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own(torch.arange(4), u), truth(torch.arange(4), u), rtol=1e-9, atol=1e-9)


@EVERY
def test_ddim_on_matching_grids_makes_the_same_images(process):
    one = model(process)
    ts = grid.power(process, 8, end=0.0)
    alpha, sigma = process.alpha_sigma(ts)
    other = one.as_flow()
    found = [
        pf.Diffusion(m, ddim(m.process, t), dtype=torch.float64).sample(3, seed=1)
        for m, t in ((one, ts), (other, sigma / (alpha + sigma)))
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_network_keeps_its_classes_and_guidance():
    one = pf.load("fashion-vp")
    other = one.as_flow()
    assert type(other) is type(one)
    assert other.parameters == one.parameters
    ts = times(0.9, 0.6, 0.3, 0.0)
    alpha, sigma = one.process.alpha_sigma(ts)
    images = [
        pf.Diffusion(m, ddim(m.process, t)).given(["bag", "coat"], 2.0).sample(2)
        for m, t in ((one, ts), (other, sigma / (alpha + sigma)))
    ]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)
    assert other.given("bag").conditions == 1
    assert other.given(["bag", "coat"]).some(slice(1)).conditions == 1
    assert torch.equal(other.given("bag").gaussian.mean, one.given("bag").gaussian.mean)


def test_a_flow_stays_what_it_is_and_other_diffusions_are_refused():
    flow = model(PROCESSES["flow"])
    assert flow.as_flow() is flow
    for name in ("blurring", "langevin"):
        with pytest.raises(PushforwardError, match="Only a scalar process"):
            model(PROCESSES[name]).as_flow()

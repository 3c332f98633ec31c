"""Likelihoods of images: closed forms, order in the steps, the estimate's expectation, models and the command."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import pushforward as pf
from pushforward.cli import app
from pushforward.denoiser import Denoiser, Function
from pushforward.errors import PushforwardError
from pushforward.execute.likelihood import log_density
from pushforward.linear import Gaussian, Operator, Process
from support.helpers import FIELD, PROCESSES, gaussian_denoiser, mixture_denoiser, normal, point_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, *FIELD)
CENTRES = normal(3, *SHAPE, seed=1) / 2
VARIANCE = 0.05
STEPS = {"langevin": 60, "blurring-langevin": 60}
NATS = 1e-3 * math.prod(SHAPE) * math.log(2)  # what 1e-3 bits per dimension are


def images(count: int = 4) -> Tensor:
    return CENTRES[torch.arange(count) % 3] + VARIANCE**0.5 * normal(count, *SHAPE, seed=3)


def log_mixture(process: Process, x: Tensor, centres: Tensor, data: Gaussian, end: float | None = None) -> Tensor:
    """The density of `Psi x` where the data are Gaussians around centres, per unit of x, at a time."""
    t = torch.tensor(process.t_min if end is None else end, dtype=torch.float64)
    psi, covariance = process.signal(t), data.covariance(process, t)
    kept = Operator.scalar(psi.entry(0, 0), basis=psi.basis)
    white = Operator.scalar(covariance.entry(0, 0), basis=covariance.basis).cholesky().inverse() @ kept
    sizes = white.entry(0, 0).log()
    offset = float(sizes.sum()) * x[0].numel() / sizes.numel() - 0.5 * x[0].numel() * math.log(2 * math.pi)
    distances = white((x[:, None] - centres).flatten(0, 1)).view(len(x), len(centres), -1).square().sum(-1)
    return (-0.5 * distances).logsumexp(1) - math.log(len(centres)) + offset


def model_of(process: Process, denoiser: Denoiser, known: Gaussian) -> pf.Model:
    return pf.Model("formula", process, denoiser, SHAPE, known)


def mixture(process: Process) -> pf.Model:
    """A mixture, with its mean and mean variance known."""
    mean = CENTRES.mean(0)
    known = Gaussian(float((CENTRES - mean).square().mean()) + VARIANCE, mean)
    return model_of(process, mixture_denoiser(process, CENTRES, VARIANCE), known)


@pytest.mark.parametrize("name", PROCESSES)
def test_gaussian_data_need_no_steps(name):
    """The flow of the reference is subtracted, so nothing is left to integrate but rounding."""
    process, x = PROCESSES[name], images()
    data = Gaussian(torch.tensor([[0.5, 0.1], [0.2, 0.05], [0.02, 0.3]], dtype=torch.float64), 0.2)
    random = torch.Generator().manual_seed(1)
    found = log_density(process, gaussian_denoiser(process, data), x, reference=data, start=data, steps=2,
                        draw=lambda: torch.randn(x.shape, generator=random))  # fmt: skip
    expected = log_mixture(process, x, torch.full((1, *SHAPE), 0.2), data)
    assert all(torch.allclose(values, expected, atol=1e-6) for values in found)


def test_gaussian_data_of_another_spectrum_than_is_known():
    process, x = PROCESSES["vp"], images()
    data = Gaussian(torch.tensor([[0.5, 0.1], [0.2, 0.05], [0.02, 0.3]], dtype=torch.float64), 0.2)
    model = model_of(process, gaussian_denoiser(process, data), data)
    expected = log_mixture(process, x, torch.full((1, *SHAPE), 0.2), data)
    found = model.log_likelihood(x, steps=20, exact=True)
    assert float((found.nats - expected).abs().max()) < NATS


@pytest.mark.parametrize("name", PROCESSES)
def test_mixtures_have_their_density(name):
    """To 1e-3 bits per dimension, and what is random of the draws of velocities."""
    process, x = PROCESSES[name], images()
    rows = x.repeat(16, 1, 1, 1)
    found = mixture(process).log_likelihood(rows, steps=STEPS.get(name, 40), exact=True, draws=1).nats.view(16, -1)
    expected = log_mixture(process, x, CENTRES, Gaussian(VARIANCE))
    error = found.std(0) / 4
    assert bool(((found.mean(0) - expected).abs() < NATS + 3 * error).all())
    assert float(error.max()) < (1e-9 if process.blocks == 1 else 2 * NATS)


def test_the_density_without_noise_is_that_of_an_early_end():
    process, x = PROCESSES["flow"], images()
    found = mixture(process).log_likelihood(x, steps=60, exact=True, end=1e-6)
    clean = log_mixture(process, x, CENTRES, Gaussian(VARIANCE), end=0.0)
    assert float((found.nats - clean).abs().max()) < NATS


def test_steps_have_order_four():
    process, x = PROCESSES["flow"], images()
    coarse, middle, fine = (mixture(process).log_likelihood(x, steps=steps, exact=True) for steps in (20, 40, 80))
    errors = [(found.nats - fine.nats).abs().mean() for found in (coarse, middle)]
    assert float(errors[1]) < float(errors[0]) / 10
    assert float(middle.halved.mean()) > 5 * float(errors[1])


@pytest.mark.parametrize("name", ["blurring", "langevin"])
def test_probes_estimate_the_trace_without_bias(name):
    """A thousand estimates of one image, within four standard errors of the sum over its numbers."""
    process = PROCESSES[name]
    x, model = images(1).expand(1000, *SHAPE), mixture(process)
    exact = model.log_likelihood(x, steps=4, draws=1, exact=True, batch=1000).nats
    found = model.log_likelihood(x, steps=4, draws=1, batch=1000).nats
    assert float(found.std()) > 0
    error = math.hypot(float(found.std()), float(exact.std())) / 1000**0.5
    assert abs(float(found.mean() - exact.mean())) < 4 * error


def test_the_standard_error_is_that_of_repetition():
    """Root mean square over 500 images alike, where four draws estimate it to a few per cent."""
    x, model = images(1).expand(500, *SHAPE), mixture(PROCESSES["vp"])
    found = model.log_likelihood(x, steps=2, draws=4, batch=500)
    assert float(found.error.square().mean().sqrt()) == pytest.approx(float(found.nats.std()), rel=0.15)
    assert bool(model.log_likelihood(x[:2], steps=2, draws=1).error.isnan().all())


@pytest.mark.parametrize("name", ["vp", "langevin"])
def test_an_image_s_figures_do_not_depend_on_the_batch(name):
    x, model = images(5), mixture(PROCESSES[name])
    whole = model.log_likelihood(x, steps=4, dequantise=True, seed=3)
    some = model.log_likelihood(x, steps=4, dequantise=True, seed=3, batch=2)
    last = model.log_likelihood(x[3:], steps=4, dequantise=True, seed=3, first=3)
    assert torch.allclose(whole.nats, some.nats, rtol=1e-10)
    assert torch.allclose(whole.error[3:], last.error, rtol=1e-7)


def test_dequantised_images_bound_the_probability_of_levels():
    """One number of 8 bits: its probability is the integral of the density over its level."""
    process = PROCESSES["vp"]
    data = Gaussian(1e-5, 0.1)  # within a few levels
    model = pf.Model("point", process, gaussian_denoiser(process, data), (1, 1, 1), data)
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[139:143]
    t = torch.tensor(process.t_min, dtype=torch.float64)
    law = torch.distributions.Normal(0.1, float(data.covariance(process, t).coefficients.sqrt() /
                                                process.signal(t).coefficients))  # fmt: skip
    probability = law.cdf(levels + 1 / 255) - law.cdf(levels - 1 / 255)
    rows = levels.repeat(400).view(-1, 1, 1, 1)
    found = model.log_likelihood(rows, steps=2, draws=1, exact=True, dequantise=True, batch=len(rows)).bits
    mean, error = found.view(400, -1).mean(0), found.view(400, -1).std(0) / 20
    assert bool((mean + 3 * error > -probability.log2()).all())
    assert torch.allclose(mean, -probability.log2(), atol=0.1)


# -- models and the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return pf.load("fashion-vp")


def test_samples_are_likelier_than_noise_and_under_their_own_label(model):
    shoes = model.sample(2, labels="sneaker", steps=10)
    settings = {"steps": 2, "draws": 2}
    told = model.log_likelihood(shoes, labels="sneaker", **settings)
    other = model.log_likelihood(shoes, labels="dress", **settings)
    noise = model.log_likelihood(torch.rand(shoes.shape) * 2 - 1, **settings)
    alone = model.log_likelihood(shoes[1:], labels="dress", first=1, **settings)
    both = model.log_likelihood(shoes, labels=["sneaker", "dress"], **settings)
    assert both.nats.tolist() == pytest.approx([float(told.nats[0]), float(alone.nats[0])], rel=1e-5)
    assert bool((told.nats > other.nats).all())
    assert bool((told.nats > noise.nats + 1000).all())
    assert told.nfe == 2 * 6 * 2 * 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 5}, "takes an even number of steps"),
        ({"steps": 10**10}, "10,000,000,000 steps would take"),
        ({"draws": 0}, "takes at least 1 draw"),
        ({"end": 2.0}, "time between 0 and t_max = 1"),
        ({"labels": "hat"}, "has no class 'hat'"),
    ],
)
def test_what_makes_no_sense_is_said(model, settings, said):
    with pytest.raises(PushforwardError) as error:
        model.log_likelihood(torch.zeros(1, 1, 28, 28), **settings)
    assert said in str(error.value)


def test_answers_without_gradient_are_refused():
    process = PROCESSES["vp"]
    known = gaussian_denoiser(process, Gaussian(VARIANCE))
    hidden = Function(torch.no_grad()(known.denoise))
    assert bool(model_of(process, known, Gaussian(1.0)).log_likelihood(images(), steps=2).nats.isfinite().all())
    with pytest.raises(PushforwardError, match=r"which PyTorch cannot differentiate; .* without torch\.no_grad"):
        model_of(process, hidden, Gaussian(1.0)).log_likelihood(images(), steps=2)
    constant = model_of(process, point_denoiser(process, CENTRES[:1]), Gaussian(1.0))
    assert bool(constant.log_likelihood(images(), steps=2).nats.isfinite().all())


def test_latents_and_other_sizes_are_refused(model):
    with pytest.raises(PushforwardError, match="has images of shape"):
        model.log_likelihood(torch.zeros(1, 1, 8, 8))
    latent = pf.Model("latent", model.process, model.denoiser, model.shape, decoder=torch.nn.Identity())
    with pytest.raises(PushforwardError, match="diffuses latents, whose density"):
        latent.log_likelihood(torch.zeros(1, 1, 28, 28))


def test_the_command_reports_every_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_test=pixels, y_test=np.zeros(2, dtype=np.uint8), classes=np.array(["noise"]))
    out = tmp_path / "report.json"
    arguments = ["likelihood", "fashion-vp", str(tmp_path / "x.npz"), "--steps", "2", "--draws", "2", "--batch", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(out)], catch_exceptions=False)
    assert "2 images: at most" in result.output
    report = json.loads(out.read_text())
    assert report["bits"] == pytest.approx(sum(image["bits"] for image in report["images"]) / 2)
    assert report["bound"]
    assert report["nfe"] == 2 * 6 * 2 * 2
    with pytest.raises(PushforwardError, match="--seed has no effect here: nothing is random"):
        CliRunner().invoke(app, [*arguments[:3], "--exact", "--continuous", "--seed", "1"], catch_exceptions=False)


def test_one_draw_tells_no_error(tmp_path):
    for i in range(2):
        Image.new("L", (28, 28), 40 * i).save(tmp_path / f"{i}.png")
    for count in ("1", "2"):
        words = ["likelihood", "fashion-vp", str(tmp_path), "--count", count, "--steps", "2", "--draws", "1"]
        told = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "a.json")], catch_exceptions=False).stdout
        assert "bits per dimension" in told
        assert "nan" not in told
        assert "error of the draws" not in told
        assert json.loads((tmp_path / "a.json").read_text())["bits_draws_error"] is None

"""Distances between sets of features, against closed forms, torchmetrics and sampling."""

import math

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import Reference, Sample, extrapolated, neighbourhoods, resamples

WIDTH = 6


def normal(count, mean=0.0, scale=1.0, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(count, width, generator=generator)


class Identity(torch.nn.Module):
    """For torchmetrics: the images are the features."""

    num_features = WIDTH

    def forward(self, x):
        return x


@pytest.mark.parametrize("count", [200, 1000])
@pytest.mark.parametrize("width", [6, 300])
def test_frechet_of_gaussians_is_the_closed_form(count, width):
    """Of the reference N(1, 4 C) and the sample's own moments; fewer images than features too. Rounding only."""
    x = normal(count, width=width).double()
    mean, covariance = x.mean(0) + 0.5, 4 * x.T.cov()
    truth = width * 0.25 + float(x.T.cov().trace())  # |m|^2 + tr(C + 4 C - 4 C)
    assert Sample(x, Reference(mean, covariance)).frechet() == pytest.approx(truth, rel=1e-6)


def test_frechet_is_that_of_torchmetrics():
    """The same figure by its other formula, in double precision; its eigenvalues have errors of 1e-8."""
    real, fake = normal(500), normal(400, 0.3, 1.2, seed=1)
    metric = FrechetInceptionDistance(feature=Identity(), input_img_size=(WIDTH,)).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    assert Sample(fake, Reference.of(real)).frechet() == pytest.approx(float(metric.compute()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_that_of_torchmetrics():
    """With subsets of all images, there is one subset; it divides by the width too, and computes in float32."""
    real, fake = normal(300), normal(300, 0.3, 1.2, seed=1)
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=300)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert Sample(fake, Reference.of(real)).kernel() == pytest.approx(float(metric.compute()[0]), rel=1e-3)


def test_kernel_distance_has_no_bias():
    """The mean over 200 samples of 100 images from the reference's own distribution is 0 within four deviations."""
    reference = Reference.of(normal(3000))
    values = torch.tensor([Sample(normal(100, seed=k + 1), reference).kernel() for k in range(200)])
    # The reference's own draw is in all of them: its part of the error is of 3000 images, a sixth of that of 100.
    assert abs(values.mean()) < 4 * values.std() * math.sqrt(1 / 200 + 100 / 3000)


def test_extrapolation_removes_the_bias():
    """Of the reference's own distribution, at distance 0: the plain distance is too large, the other is not.

    The mean over 60 samples is 0 within four of its standard errors, and these resolve a quarter of the bias.
    """
    reference = Reference(torch.zeros(WIDTH).double(), torch.eye(WIDTH).double())
    samples = [Sample(normal(200, seed=k), reference) for k in range(60)]
    plain = torch.tensor([sample.frechet() for sample in samples])
    better = torch.tensor([extrapolated(sample) for sample in samples])
    error = 4 * better.std() / math.sqrt(60)
    assert abs(better.mean()) < error < plain.mean() / 4


def test_extrapolation_needs_enough_images():
    reference = Reference(torch.zeros(100).double(), torch.eye(100).double())
    assert extrapolated(Sample(normal(799, width=100), reference)) is None
    assert extrapolated(Sample(normal(800, width=100), reference)) is not None


def test_rows_are_the_images():
    """Rows without repetition are the same as those images alone; with repetition, as the images repeated."""
    reference = Reference.of(normal(300, seed=1))
    x = normal(200, 0.2)
    some = torch.arange(150) + 20
    assert Sample(x, reference).frechet(some) == pytest.approx(Sample(x[some], reference).frechet(), abs=1e-10)
    assert Sample(x, reference).kernel(some) == pytest.approx(Sample(x[some], reference).kernel(), abs=1e-10)
    repeated = torch.arange(200) // 2
    assert Sample(x, reference).frechet(repeated) == pytest.approx(Sample(x[repeated], reference).frechet(), abs=1e-10)
    # Copies are no pairs: the kernel distance of every image twice is that of each once.
    assert Sample(x, reference).kernel(repeated) == pytest.approx(Sample(x[:100], reference).kernel(), abs=1e-10)


def test_standard_error_is_the_deviation_between_samples():
    """The bootstrap's error of one sample is that of 100 samples within a third."""
    reference = Reference.of(normal(5000, seed=1))
    true = torch.tensor([Sample(normal(200, 0.5, seed=k + 2), reference).frechet() for k in range(100)]).std()
    sample = Sample(normal(200, 0.5, seed=2), reference)
    errors = torch.tensor([sample.frechet(rows) for rows in resamples(200, 100)]).std()
    assert errors == pytest.approx(float(true), rel=0.33)


def test_neighbourhoods_of_the_same_distribution():
    """Precision and recall near each other and density near 1, as their papers have it for equal distributions."""
    found = neighbourhoods(Sample(normal(1000), Reference.of(normal(1000, seed=1))))
    assert found["precision"] == pytest.approx(found["recall"], abs=0.05)
    assert found["density"] == pytest.approx(1, abs=0.1)
    assert found["coverage"] > 0.9


def test_neighbourhoods_tell_missing_modes_from_bad_images():
    """Half of the modes: precise, but half is not recalled or covered. Images elsewhere: the other way round."""
    modes = torch.cat([normal(300, -10), normal(300, 10, seed=1)])
    half = neighbourhoods(Sample(normal(600, 10, seed=2), Reference.of(modes)))
    assert half["precision"] > 0.85
    assert half["recall"] < 0.55
    assert half["coverage"] < 0.55
    astray = neighbourhoods(Sample(torch.cat([modes[:300], normal(300, 30, seed=3)]), Reference.of(modes[300:])))
    assert astray["precision"] == 0
    far = neighbourhoods(Sample(normal(600, 30, seed=3), Reference.of(modes)))
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_neighbourhoods_are_means_over_parts_of_the_larger_set():
    """A quarter as many generated images meet each quarter of the reference, and the other way round."""
    few, many = normal(100), normal(400, seed=1)
    for one, other in ((few, many), (many, few)):
        found = neighbourhoods(Sample(one, Reference.of(other)))
        parts = [
            neighbourhoods(Sample(x, Reference.of(y)))
            for x, y in ((few, many[k::4]) if one is few else (many[k::4], few) for k in range(4))
        ]
        for name, value in found.items():
            assert value == pytest.approx(sum(part[name] for part in parts) / 4, abs=1e-12)


def test_neighbourhoods_of_a_set_with_itself():
    x = normal(200)
    found = neighbourhoods(Sample(x, Reference.of(x)))
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (normal(99), "at least 100 generated images; there are 99"),
        (normal(100, width=7), "7 numbers cannot be compared with 6"),
        (normal(100) / 0, "not finite"),
    ],
)
def test_bad_features_are_refused(features, said):
    with pytest.raises(PushforwardError, match=said):
        Sample(features, Reference.of(normal(100)))
    with pytest.raises(PushforwardError, match="at least 100 reference images"):
        Reference.of(normal(20))

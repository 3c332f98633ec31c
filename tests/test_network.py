"""Predictions of every kind stand for the same denoised state; what surrounds a network does what it says."""

import pytest
import torch

from helpers import FIELD, PROCESSES, gaussian_denoiser, normal, times
from pushforward.errors import PushforwardError
from pushforward.linear import VP, Flow, Gaussian, Langevin, ScaledProcess, root
from pushforward.model import PREDICTIONS, Network

EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
DATA = Gaussian(0.25)


def perfect(process, prediction, t):
    """The prediction of a network that knows the data, from the definitions of the table in `model.prediction`."""
    time, zero = times(t), times(0.0)

    def module(u, *_):
        clean = gaussian_denoiser(process, DATA).at(process, time, u)(0, u)
        rest = u - process.transition(time, zero)[0](clean)
        match prediction:
            case "epsilon":
                return root(process, time)[0].inverse()(rest)
            case "sample":
                return process.image(clean)
            case "score":
                return -process.covariance(time)[0].inverse()(rest)
            case "residual":
                return torch.zeros_like(process.image(u))  # Gaussian data deviate by nothing
        alpha, sigma, d_alpha, d_sigma = (x[0] for x in process.rates(time))
        v = process.basis.forward
        noise = v(rest) / sigma
        if prediction == "v":
            return process.basis.inverse(alpha * noise - sigma * v(clean))
        return process.basis.inverse(d_alpha * v(clean) + d_sigma * noise)

    return module


@EVERY
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_stands_for_the_same_denoised_state(process, prediction):
    t = 0.4 * process.t_max
    network = Network(perfect(process, prediction, t), prediction, reference=DATA)
    u = normal(2, process.blocks, *FIELD)
    if prediction in ("v", "velocity") and not isinstance(process, ScaledProcess):
        with pytest.raises(PushforwardError, match="for scalar processes"):
            network.at(process, times(t), u)
        return
    expected = gaussian_denoiser(process, DATA).at(process, times(t), u)(0, u)
    torch.testing.assert_close(network.at(process, times(t), u)(0, u), expected, rtol=1e-6, atol=1e-6)


def ask(network, u, t=0.5, process=None):
    process = process or VP()
    return network.at(process, times(t), u)(0, u)


def test_guidance_extrapolates_from_the_unconditional_prediction():
    def module(u, _, labels):
        return u * labels.view(-1, 1, 1, 1)

    plain = Network(module, "sample", unconditional=torch.tensor([10]))
    u, labels = normal(3, 1, *FIELD), torch.tensor([1, 2, 3])
    expected = u * (10 + 2.5 * (labels - 10)).view(-1, 1, 1, 1)
    torch.testing.assert_close(ask(plain.given(labels, 2.5), u), expected)
    torch.testing.assert_close(ask(plain.given(labels, 1.0), u), u * labels.view(-1, 1, 1, 1))


def test_large_batches_are_split_and_agree():
    sizes = []

    def module(u, t, labels):
        sizes.append((len(u), len(t), len(labels)))
        return u * labels.view(-1, 1, 1, 1)

    u, labels = normal(7, 1, *FIELD), torch.arange(7)
    split = Network(module, "sample", max_batch=3).given(labels)
    torch.testing.assert_close(ask(split, u), u * labels.view(-1, 1, 1, 1))
    assert sizes == [(3, 3, 3), (3, 3, 3), (1, 1, 1)]


def test_guidance_keeps_within_the_largest_batch():
    sizes = []

    def module(u, _, labels):
        sizes.append(len(u))
        return u * labels.view(-1, 1, 1, 1)

    network = Network(module, "sample", max_batch=4, unconditional=torch.tensor([0])).given(torch.arange(5), 2.0)
    u = normal(5, 1, *FIELD)
    torch.testing.assert_close(ask(network, u), 2.0 * u * torch.arange(5).view(-1, 1, 1, 1))
    assert sizes == [4, 4, 2]


def test_predictions_without_signal_are_refused():
    with pytest.raises(PushforwardError, match="no signal"):
        ask(Network(lambda u, *_: u, "epsilon"), normal(1, 1, 2, 2), 1.0, Flow())


def test_clipping_and_thresholding_bound_the_image_alone():
    u = 3 * normal(4, 2, *FIELD)
    process = Langevin()

    def module(state, *_):
        return 2 * state[:, :1]

    clipped = ask(Network(module, "sample", clip=1.0), u, process=process)
    torch.testing.assert_close(process.image(clipped), (2 * u[:, :1]).clamp(-1, 1))
    thresholded = process.image(ask(Network(module, "sample", threshold=0.8), u, process=process))
    assert float(thresholded.abs().max()) == pytest.approx(1.0)
    limit = torch.quantile((2 * u[:, :1]).abs().flatten(1), 0.8, 1).view(-1, 1, 1, 1)
    torch.testing.assert_close(thresholded, (2 * u[:, :1]).clamp(-limit, limit) / limit)


def test_time_and_input_are_scaled_for_the_network():
    seen = {}

    def module(u, t, _):
        seen.update(u=u, t=t)
        return u

    reference = Gaussian(0.25)
    network = Network(module, "sample", time_scale=1000.0, time_shift=-1.0, input_reference=reference)
    u = normal(2, 1, *FIELD)
    ask(network, u, 0.25)
    assert seen["t"].tolist() == [249.0, 249.0]
    deviation = reference.covariance(VP(), times(0.25)).entry(0, 0).sqrt()
    torch.testing.assert_close(seen["u"], u / deviation)


def test_the_network_runs_in_the_asked_precision():
    layer = torch.nn.Conv2d(1, 1, 1)
    seen = []

    def module(u, *_):
        seen.append(layer(u).dtype)
        return layer(u)

    with torch.no_grad():
        answer = ask(Network(module, "sample", autocast=torch.bfloat16), normal(1, 1, 4, 4).float())
    assert seen == [torch.bfloat16]
    assert answer.dtype == torch.float32

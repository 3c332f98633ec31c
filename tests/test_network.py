"""Predictions of every kind stand for the same denoised state; what surrounds a network does what it says."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.linear import VP, Flow, Gaussian, Langevin, ScaledProcess, root
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.model import PREDICTIONS, Network
from pushforward.verbs import Model
from support.helpers import EVERY, FIELD, PROCESSES, gaussian_denoiser, normal, times

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


@pytest.mark.parametrize("process", [VP(), Flow()], ids=lambda p: p.name)
def test_a_network_of_float64_is_told_times_of_float64(process):
    """Its layers take no others, and results would be no more precise than times: DDIM by its formula, to 1e-13."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_time = nn.Linear(1, 1, dtype=torch.float64)

        def forward(self, u, t, labels=None):
            return u * self.of_time(t[:, None])[..., None, None]

    own = Own().requires_grad_(False)
    model = Model("own", process, Network(own, "v"), (1, *FIELD))
    diffusion = Diffusion(model, model.plan("ddim", 7), dtype=torch.float64)
    code, ts = Code(normal(2, 1, *FIELD)), diffusion.times
    found, u = diffusion.decode(code), diffusion.start(code.start)
    for t, s in pairwise(ts):
        (alpha, sigma), (after, spread) = process.alpha_sigma(t), process.alpha_sigma(s)
        v = own(u, t.expand(2))
        clean = (alpha * u - sigma * v) / (alpha**2 + sigma**2)
        u = after * clean + spread * (u - alpha * clean) / sigma
    torch.testing.assert_close(found, u, rtol=1e-13, atol=1e-13)


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


WRONG = {
    "one row": lambda u: 0.5 * u[:1],
    "a number": lambda u: u.mean(),
    "an image without its batch": lambda u: u[0],
    "other channels": lambda u: torch.cat([u, u, u], 1),
    "another size": lambda u: u[..., :-1],
    "two batches": lambda u: torch.cat([u, u]),
    "a tuple": lambda u: (u, u),
    "an object": lambda u: {"sample": u},
    "complex numbers": lambda u: u + 0j,
    "whole numbers": lambda u: u.long(),
    "nothing": lambda _: None,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("process", [VP(), Langevin()], ids=["vp", "langevin"])
def test_an_output_of_another_shape_or_kind_is_refused_and_not_broadcast(wrong, process):
    u = normal(3, process.blocks, *FIELD)
    for network in (Network(lambda u, *_: wrong(u), "epsilon"), Network(lambda u, *_: wrong(u[:, :1]), "sample")):
        with pytest.raises(PushforwardError, match=r"returned .* return one real tensor of shape"):
            ask(network, u, process=process)
    with pytest.raises(PushforwardError, match=r"returned .* return one real tensor of shape"):
        Function(lambda u, _: wrong(u)).at(process, times(0.5), u)(0, u)


def test_twice_the_channels_are_a_learned_variance_and_left_aside():
    u, labels = normal(3, 2, *FIELD), torch.tensor([1, 2, 3])
    varied = Network(lambda u, *_: torch.cat([0.3 * u, 1e6 * u], 1), unconditional=torch.tensor([0]))
    plain = Network(lambda u, *_: 0.3 * u)
    torch.testing.assert_close(ask(varied, u), ask(plain, u))
    torch.testing.assert_close(ask(varied.given(labels, 3.0), u), ask(plain, u))


def test_a_network_may_change_what_it_is_given():
    def module(u, t, labels):
        t.mul_(2.0)
        labels.add_(1)
        return u.mul_(0.3) * labels.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)

    u, labels = normal(2, 1, *FIELD), torch.tensor([1, 2])
    before, network = u.clone(), Network(module, "sample").given(labels)
    prepared = network.at(VP(), times(0.5, 0.25), u)
    for k in (0, 1, 0):  # the second and third call see what the first one saw
        expected = 0.3 * before * (labels.view(-1, 1, 1, 1) + 1) + 2 * (0.5, 0.25)[k]
        torch.testing.assert_close(prepared(k, u), expected)
        torch.testing.assert_close(prepared(torch.tensor([k, k]), u, torch.tensor([0, 1])), expected)
    assert torch.equal(u, before)
    assert labels.tolist() == [1, 2]
    assert torch.equal(Function(lambda u, _: u.zero_()).at(VP(), times(0.5), u)(0, u), torch.zeros_like(u))
    assert torch.equal(u, before)


class Timed(torch.nn.Module):
    """A network that looks up whole timesteps, as those of tables do."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.linspace(0.1, 1.0, 1000)[:, None])

    def forward(self, u, t, _):
        return self.table(t.long()).view(-1, 1, 1, 1) * u


def test_times_in_other_units_than_the_networks_are_noticed():
    u, table = normal(1, 1, *FIELD).float(), PROCESSES["discrete"]
    with pytest.warns(UserWarning, match=r"answers the same at times 0.25 and 0.75; .*time_scale=1000, time_shift=-1"):
        ask(Network(Timed()), u)
    with pytest.warns(UserWarning, match="told times from 0 to 1, but its process is a table of 1000 timesteps"):
        ask(Network(Timed()), u, process=table)
    right = ask(Network(Timed(), time_scale=1000, time_shift=-1), u, process=table)  # warnings are errors here
    alpha, sigma = (float(x[0]) for x in table.alpha_sigma(times(0.5)))
    weight = float(torch.linspace(0.1, 1.0, 1000)[499])
    torch.testing.assert_close(right, (u - sigma * weight * u) / alpha)


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.1)])
def test_a_network_in_training_mode_is_noticed(layer):
    class Layered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, u, t, _):
            return self.layer(u) * t.view(-1, 1, 1, 1)

    u, module = normal(2, 1, *FIELD).float(), Layered()
    with pytest.warns(UserWarning, match=r"in training mode: .* on the batch; call its eval"):
        ask(Network(module), u)
    ask(Network(Layered().eval()), u)  # warnings are errors here


class Shaken(torch.nn.Module):
    """A network with weights, the same each time that it is made."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)
        for k, weight in enumerate(self.layer.parameters()):
            weight.data = 0.1 * normal(*weight.shape, seed=k).float()

    def forward(self, u, t, _=None):
        return self.layer(u) + t.view(-1, 1, 1, 1)


def test_a_network_whose_weights_accelerate_brings_in_call_by_call_samples_where_it_is_executed():
    accelerate = pytest.importorskip("accelerate")
    plain, offloaded = (Model("net", VP(), Network(Shaken(), "sample"), (1, *FIELD)) for _ in range(2))
    accelerate.cpu_offload(offloaded.module, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "cpu"  # its weights are on no device between calls
    assert torch.equal(offloaded.to("cpu").sample(2, steps=4), plain.sample(2, steps=4))


def test_a_network_that_accelerate_moves_for_its_calls_is_left_to_it():
    accelerate = pytest.importorskip("accelerate")
    module, _ = accelerate.cpu_offload_with_hook(Shaken(), torch.device("meta"))
    model = Model("net", VP(), Network(module), (1, *FIELD))
    assert model.to("meta").device.type == "meta"  # stands for a device that is not here
    assert next(module.parameters()).device.type == "cpu"

"""Codes by optimisation: decodable images are found, by every gradient; images are independent; the best is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import pushforward as pf
from pushforward.data.pictures import save_image, sheet
from pushforward.denoiser import Function, Watched
from pushforward.execute import INVERSE, Exact, Implicit, Parallel, Phantom, Skeleton
from pushforward.guidance.invert import METHODS, invert, optimise
from pushforward.guidance.optimisers import LBFGS
from pushforward.linear import VP, Blurring, Gaussian, Langevin
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.storage import load_codes
from pushforward.model import trained
from pushforward.model.backbone import Backbone, preset
from pushforward.plan import collocation, ddim, exponential, gddim, grid, plan_of
from support.cli import invoke
from support.helpers import FIELD, mixture_denoiser, normal
from support.models import SIZE, saved

SOME = pytest.mark.parametrize("process", [VP(), Blurring(FIELD, blur_max=2.0), Langevin()], ids=lambda p: p.name)
QUASI = {"optimiser": "l-bfgs", "learning_rate": 0.1}


def diffusion(process, *, steps=5, solver=ddim, end=None, **settings):
    """float64, to t_min: every image that it decodes to has a code of loss 0."""
    denoiser = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.3)
    ts = grid.power(process, steps, end=process.t_min if end is None else end)
    model = pf.Model("mixture", process, denoiser, (1, *FIELD))
    return pf.Diffusion(model, solver(process, ts, **settings), dtype=torch.float64)


def decodable(sampler, count=2):
    """Images whose codes are not those that an optimisation begins at."""
    return sampler.sample(count, seed=7).double()


def redecoded(sampler, found, images):
    return (sampler.decode(found.code) - images).square().flatten(1).sum(1)


# -- what is found -------------------------------------------------------------------------------------------------


@SOME
@pytest.mark.parametrize(
    "gradient", [Exact(), Implicit(tolerance=1e-3), Phantom(3)], ids=lambda g: type(g).__name__.lower()
)
def test_decodable_images_are_decoded_again(process, gradient):
    """Loss from 1 or so to 1e-8 by L-BFGS, at which the codes are as good as exact."""
    sampler = diffusion(process)
    images = decodable(sampler)
    found = optimise(sampler.run_by(gradient=gradient), images, steps=60, tolerance=1e-8, **QUASI)
    assert (found.history[0].loss > 0.1).all()
    assert (found.loss <= 1e-8).all()
    torch.testing.assert_close(redecoded(sampler, found, images), found.loss, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "gradient", [Exact(), Implicit(tolerance=1e-2), Phantom(1), Skeleton()], ids=lambda g: type(g).__name__.lower()
)
def test_adam_descends_too(gradient):
    """To a thirtieth of the loss that it began with, in 40 steps of a few; rough gradients will do."""
    sampler = diffusion(VP(), steps=4)
    images = decodable(sampler)
    found = optimise(sampler.run_by(gradient=gradient), images, steps=40, learning_rate=0.2)
    assert (found.loss < found.history[0].loss / 30).all()


def test_any_solver_and_all_steps_at_once():
    """The same codes whether decoded one step after another or together, to what a tolerance of 1e-9 leaves."""
    sampler = diffusion(VP(), solver=exponential, order=2)
    images = decodable(sampler)
    ways = (None, Parallel(tolerance=1e-9, reference=Gaussian(0.3)))
    found = [optimise(sampler.run_by(parallel=way), images, steps=8, tolerance=0.0, **QUASI) for way in ways]
    torch.testing.assert_close(found[0].code.start, found[1].code.start, rtol=0, atol=1e-4)
    assert (found[1].loss < 0.1 * found[1].history[0].loss).all()


@pytest.mark.parametrize("noises", [False, True])
def test_a_stochastic_plan(noises):
    """Its noises are sought, or stay bit for bit as `sample` draws them; either way the image is reached."""
    sampler = diffusion(VP(), eta=0.7)
    images = decodable(sampler)
    found = optimise(sampler, images, noises=noises, seed=2, steps=60, tolerance=1e-8, **QUASI)
    assert (found.loss <= 1e-8).all()
    begun = optimise(sampler, images, seed=2, steps=1).code.noises
    assert torch.equal(found.code.noises, begun) is not noises
    torch.testing.assert_close(redecoded(sampler, found, images), found.loss, rtol=1e-6, atol=1e-12)


def test_a_plan_without_an_inverse_is_served_as_well():
    """To time 0, where the last step projects: the fixed point refuses it, the optimiser finds a code."""
    sampler = diffusion(VP(), solver=gddim, end=0.0)
    images = decodable(sampler)
    with pytest.raises(pf.PushforwardError, match="end"):
        sampler.invert(images)
    assert (optimise(sampler, images, steps=60, tolerance=1e-8, **QUASI).loss <= 1e-8).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_returns_codes_and_how_near_they_lead(method):
    """The error is measured, and that of the exact and the optimised codes is within the tolerance."""
    sampler = diffusion(VP(), steps=12)
    images = decodable(sampler)
    told = []
    found = invert(sampler, images, method, noisy=False, tolerance=1e-4, callback=told.append)
    assert told
    if method in ("naive", "uni-inv", "direct"):  # told of every call
        assert len(told) == found.rounds + found.decoding == int(found.nfe[0])
    error = (found.decode() - images).abs().flatten(1).amax(1)
    assert found.code.end is None
    assert (error <= found.residual * (1 + 1e-6) + 1e-9).all()
    assert (found.residual <= 1e-4).all() == (method not in ("naive", "uni-inv"))
    assert (found.loss is not None) == bool(found.history) == (method == "optimised")
    assert found.nfe.shape == (2,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("begin", ["forward", "random"])
def test_every_evaluation_is_counted_once(method, begin):
    """The network's own count of the states that it saw; an exact gradient asks twice, for the product the second time.

    No method decodes a code to no purpose: what begins at a pass needs that pass's calls alone.
    """
    sampler, seen = diffusion(VP(), steps=6), []
    images = decodable(sampler)
    watched = sampler.around(lambda denoiser: Watched(denoiser, lambda u, *_, **__: seen.append(len(u))))
    found = invert(watched, images, method, noisy=False, begin=begin, iterations=4)
    assert sum(seen) == int(found.nfe.sum())
    if method == "flowopt":  # a decoding for each of four moves and one after the last
        assert (found.nfe == 5 * 6 + (7 if begin == "forward" else 0)).all()
    if method == "optimised":
        assert found.history[0].nfe.tolist() == [12 + (6 if begin == "forward" else 0)] * 2


def test_an_implicit_plan_is_optimised_with_all_steps_at_once():
    sampler = diffusion(VP(), solver=collocation, end=0.0)
    images = sampler.run_by(parallel=Parallel(tolerance=1e-9)).sample(2, seed=7).double()
    found = invert(sampler, images, "optimised", begin="random", tolerance=1e-3)
    assert (found.residual <= 1e-3).all()
    assert (found.decode() - images).abs().max() <= 1e-3


# -- where it begins -----------------------------------------------------------------------------------------------


def test_a_random_beginning_is_the_code_of_sample():
    """So the images of the same seed have loss 0 at once (float32: `sample` gives that), whichever images they are."""
    sampler = diffusion(VP(), eta=0.5)
    images = sampler.sample(4, seed=3).double()
    found = optimise(sampler, images[2:], seed=3, first=2, tolerance=1e-10)
    assert len(found.history) == 1
    assert (found.loss < 1e-10).all()
    assert found.nfe.tolist() == [5, 5]


@SOME
def test_a_forward_beginning_is_nearer(process):
    """Twelve DDIM steps are inverted by a plain forward pass to less than half of a random code's loss."""
    sampler = diffusion(process, steps=12)
    images = decodable(sampler, 4)
    far, near = (optimise(sampler, images, begin=begin, steps=1).history[0] for begin in ("random", "forward"))
    assert (near.loss < 0.5 * far.loss).all()
    assert (near.nfe > far.nfe).all()


def test_an_inversion_that_did_not_converge_is_refined():
    """Two rounds are too few; from there a dozen steps go further than from anywhere else."""
    sampler = diffusion(VP(), steps=12)
    images = decodable(sampler)
    rough = sampler.invert(images, parallel=replace(INVERSE, max_rounds=2, mixing=None))
    before = redecoded(sampler, rough, images)
    found = optimise(sampler, images, begin=rough.code, steps=12, tolerance=0.0, **QUASI)
    elsewhere = optimise(sampler, images, steps=12, tolerance=0.0, **QUASI)
    torch.testing.assert_close(found.history[0].loss, before, rtol=1e-6, atol=0)
    assert torch.equal(found.code.end, rough.code.end)
    assert (found.loss < 1e-3 * before).all()
    assert (found.loss < elsewhere.loss).all()


def test_going_on_from_a_code_goes_on():
    sampler = diffusion(VP(), eta=0.5)
    images = decodable(sampler)
    half = optimise(sampler, images, noises=True, steps=10)
    on = optimise(sampler, images, noises=True, begin=half.code, steps=10)
    torch.testing.assert_close(on.history[0].loss, half.loss)
    assert (on.loss < half.loss).all()


# -- images of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"learning_rate": 0.1}, QUASI], ids=["adam", "l-bfgs"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_batch_is_a_loop(options, eta):
    """Each image has the code and loss that it has alone, though they stop at different steps.

    The evaluations too, but that the batch's last gradient is asked also for an image that is done then.
    """
    sampler = diffusion(VP(), steps=4, eta=eta)
    images = decodable(sampler, 3)
    options = {**options, "steps": 10, "tolerance": 1.5, "noises": eta > 0}
    together = optimise(sampler, images, **options)
    alone = [optimise(sampler, images[i : i + 1], first=i, **options) for i in range(3)]
    torch.testing.assert_close(together.code.start, torch.cat([a.code.start for a in alone]), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(together.loss, torch.cat([a.loss for a in alone]), rtol=1e-6, atol=1e-12)
    more = together.nfe - torch.cat([a.nfe for a in alone])
    assert ((more == 0) | (more == sampler.plan.nfe)).all()
    assert len({len(a.history) for a in alone}) > 1


@pytest.mark.parametrize("learning_rate", [0.1, 3.0])
def test_the_best_code_is_kept(learning_rate):
    """With too high a rate the last code is not the best one."""
    sampler = diffusion(VP())
    images = decodable(sampler)
    found = optimise(sampler, images, learning_rate=learning_rate, steps=15, tolerance=0.0)
    every = torch.stack([record.loss for record in found.history])
    assert torch.equal(found.loss, every.amin(0))
    torch.testing.assert_close(redecoded(sampler, found, images), found.loss, rtol=1e-9, atol=1e-12)
    if learning_rate > 1:
        assert (every[-1] > 1.5 * found.loss).any()


def test_labels_and_guidance_go_with_their_images():
    """Three images of two classes, of which one is done at once: the others keep their own labels. float32."""
    torch.manual_seed(0)
    module = Backbone(preset("tiny", field=(8, 8), in_channels=1, out_channels=1, classes=2)).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model = trained(module.requires_grad_(False), VP(), (1, 8, 8), classes=("a", "b"))
    sampler = pf.Diffusion(model, ddim(VP(), grid.power(VP(), 3)))
    labels = torch.tensor([0, 1, 1])
    images = sampler.given(labels, 2.0).sample(3, seed=1)
    images[1:] *= 0.9
    found = optimise(sampler.given(labels, 2.0), images, seed=1, steps=3)
    again = sampler.given(labels, 2.0).decode(found.code)
    torch.testing.assert_close((again - images).square().flatten(1).sum(1).double(), found.loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.decode(), again)
    assert found.nfe[0] < found.nfe[1] == found.nfe[2]
    assert (found.loss[1:] < found.history[0].loss[1:]).all()
    with pytest.raises(pf.PushforwardError, match="For 2 images give as many labels or prompts, or one; got 3"):
        optimise(sampler.given(labels), images[:2])


# -- effort --------------------------------------------------------------------------------------------------------


def test_evaluations_are_counted():
    """Five a decoding and five products an exact gradient; a skeleton gradient asks for nothing."""
    sampler = diffusion(VP())
    images, told = decodable(sampler), []
    exact = optimise(sampler, images, steps=3, tolerance=0.0, callback=told.append)
    assert [record.nfe.tolist() for record in exact.history] == [[10, 10], [20, 20], [30, 30], [35, 35]]
    assert [record.step for record in told] == [0, 1, 2, 3]
    assert tuple(told) == exact.history
    seconds = [record.seconds for record in told]
    assert seconds == sorted(seconds)
    skeleton = optimise(sampler.run_by(gradient=Skeleton()), images, steps=3, tolerance=0.0)
    assert skeleton.nfe.tolist() == [20, 20]


def test_network_weights_take_no_gradients():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    sampler = diffusion(VP())
    sampler = replace(sampler, model=replace(sampler.model, denoiser=Function(lambda u, _: weight * torch.tanh(u))))
    with torch.no_grad():  # as the caller may be
        found = optimise(sampler, decodable(diffusion(VP())), steps=5)
    assert weight.grad is None
    assert not found.code.start.requires_grad
    assert (found.loss < found.history[0].loss).all()


# -- L-BFGS on its own ---------------------------------------------------------------------------------------------


def test_lbfgs_solves_quadratics_and_a_crooked_valley():
    """Three problems at once, as many steps for each as it takes: 60 suffice for curvatures from 1 to 1000."""
    curvature = torch.logspace(0, 3, 8, dtype=torch.float64)
    scales = torch.tensor([1.0, 1e3], dtype=torch.float64)[:, None]

    def value(x):
        a, b = x[2, ::2], x[2, 1::2]
        valley = (100 * (b - a.square()).square() + (1 - a).square()).sum()
        return torch.cat([(scales * curvature * x[:2].square()).sum(1), valley[None]])

    x = normal(3, 8, seed=1)
    state, least = LBFGS.begin(x), torch.full((3,), torch.inf, dtype=torch.float64)
    for _ in range(120):
        x = state["point"].requires_grad_()
        loss = value(x)
        least = torch.minimum(least, loss.detach())
        state = LBFGS.advance(state, loss.detach(), torch.autograd.grad(loss.sum(), x)[0], 0.1, (8,))
        assert not (state["stuck"] & (least > 1e-12)).any()
    assert (least < 1e-12).all()


def test_a_gradient_that_leads_nowhere_ends_an_image_alone():
    """The first problem's gradient points up: it is given up, the other goes on to its least."""
    x = normal(2, 4, seed=1)
    state, given_up = LBFGS.begin(x), torch.zeros(2, dtype=torch.bool)
    for _ in range(30):
        x = state["point"]
        loss = x.square().sum(1)
        state = LBFGS.advance(state, loss, torch.tensor([[-2.0], [2.0]]) * x, 0.1, (4,))
        given_up |= state["stuck"] & (loss > 1e-12)
    assert given_up.tolist() == [True, False]
    state = LBFGS.advance(state, 0 * loss, 0 * state["point"], 0.1, (4,))  # a lower loss comes too late
    assert bool(state["stuck"][0])
    assert float(state["point"][1].square().sum()) < 1e-12


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "naive"],
        ["--method", "optimise", "--iterations", 2],
        ["--method", "optimise", "--iterations", 2, "--begin", "random", "--eta", 0.5, "--end", 0, "--batch", 1],
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_the_command_writes_codes_that_decode(tmp_path, options):
    """What is on disk decodes to what the report says; two pictures of 8 x 8."""
    arrays = {f"x_{split}": torch.randint(0, 256, (2, SIZE, SIZE, 1)).byte().numpy() for split in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays, y_train=np.zeros(2, int), y_test=np.zeros(2, int))
    model, codes, report = saved(VP(), tmp_path / "m"), tmp_path / "codes.safetensors", tmp_path / "report.json"
    done = invoke(
        "invert", model, tmp_path / "data.npz", "--steps", 4, "--out", codes, "--json", report, "-q", *options
    )
    assert done.exit_code == 0, done.exception
    found = json.loads(report.read_text())
    code, info = load_codes(codes)
    assert (found["method"], found["clean"], found["count"]) == (options[1], True, 2)
    assert (code.noises is not None) is ("--eta" in options)
    plan = plan_of(VP(), info["solver"], info["times"], info["settings"])
    again = pf.Diffusion(pf.load(model), plan).decode(code)
    images = torch.from_numpy(arrays["x_test"]).movedim(-1, 1).float() / 127.5 - 1
    assert found["max_abs_error"] == pytest.approx(float((again - images).abs().max()), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "odd"], "got 'odd'"),
        (["--method", "optimise", "--begin", "odd"], "'odd'"),
        (["--method", "naive", "--solver", "heun"], "use ddim"),
        (["--method", "naive", "--eta", 1], "stochastic"),
        (["--method", "optimise", "--eta", 1], "begin at random"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_bad_options_are_refused_in_a_sentence(tmp_path, options, message):
    picture = tmp_path / "one.png"
    save_image(sheet(torch.zeros(1, 1, SIZE, SIZE), smallest=0), picture)
    model = saved(VP(), tmp_path / "m")
    done = invoke("invert", model, picture, "--steps", 2, "--out", tmp_path / "codes.safetensors", "-q", *options)
    assert isinstance(done.exception, pf.PushforwardError), done.exception
    assert message in str(done.exception)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": normal(0, 1, *FIELD)}, "one or more"),
        ({"images": normal(2, 1, 3, 3)}, "images of shape"),
        ({"images": normal(2, 1, *FIELD) / 0}, "finite numbers"),
        ({"images": torch.zeros(2, 1, *FIELD, dtype=torch.uint8)}, "finite numbers"),
        ({"labels": torch.tensor([0, 1])}, "no classes"),
        ({"guidance": 2.0}, "no effect"),
        ({"steps": 0}, "1 step or more"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"noises": True}, "takes no noises"),
        ({"begin": pf.Code(normal(1, 1, *FIELD))}, "For 2 images give as many codes to begin at"),
        ({"begin": pf.Code(normal(2, 1, 3, 3))}, "The start of the code"),
        ({"begin": pf.Code(normal(2, 1, *FIELD), normal(3, 2, 1, *FIELD))}, "The noises of the code"),
        ({"begin": pf.Code(normal(2, 1, *FIELD), end=normal(1, 1, *FIELD))}, "The end of the code"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(options, message):
    options = {"images": normal(2, 1, *FIELD), **options}
    condition = {name: options.pop(name) for name in ("labels", "guidance") if name in options}
    with pytest.raises(pf.PushforwardError, match=message) as caught:
        optimise(diffusion(VP()).given(**condition), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"eta": 0.5}, "takes noises"), ({"solver": exponential, "order": 2}, "row by row")],
)
def test_a_forward_beginning_of_another_plan_is_refused(settings, message):
    with pytest.raises(pf.PushforwardError, match=message):
        optimise(diffusion(VP(), **settings), normal(2, 1, *FIELD), begin="forward")


def test_adaptive_steps_are_refused():
    sampler = diffusion(VP())
    adaptive = AdaptiveDiffusion(sampler.model)
    with pytest.raises(pf.PushforwardError, match="name a solver"):
        optimise(adaptive, normal(2, 1, *FIELD))


@pytest.mark.parametrize("optimiser", ["adam", "l-bfgs"])
def test_codes_of_a_gan_are_found(optimiser):
    """A linear generator of fewer pixels than numbers: an image has codes of loss 0, and each its own."""
    network = torch.nn.Sequential(torch.nn.Linear(12, 6), torch.nn.Unflatten(1, (1, 3, 2)))
    generator = pf.gan(network, 12)
    images = generator.sample(3, seed=7).detach()
    found = optimise(generator, images, optimiser=optimiser, steps=300, learning_rate=0.05)
    assert found.loss.max() <= 1e-4  # the tolerance
    assert (generator.decode(found.code) - images).abs().max() < 1e-2
    assert not torch.allclose(found.code.start, generator.draw(3, seed=7).start, atol=0.1)
    assert int(found.nfe.max()) < 300
    with pytest.raises(pf.PushforwardError, match="Only a diffusion"):
        optimise(generator, images, begin="forward")

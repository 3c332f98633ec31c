"""Exact inversion: running the plan from the state found gives the state that was asked for."""

import pytest
import torch

import pushforward as pf
from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import Mixing, Parallel, invert, run
from pushforward.execute.backward import one_step_rows
from pushforward.execute.inverse import Inverse
from pushforward.linear import VP, Blurring, Gaussian, Langevin, Process, root
from pushforward.plan import SOLVERS, ddim, exponential, gddim, grid
from support.helpers import EVERY, FIELD, gaussian_denoiser, mixture_denoiser, normal

STOCHASTIC = ("ddpm", "euler-maruyama", "collocation", "sscs")
CASES = {
    **{name: solver for name, solver in SOLVERS.items() if name not in STOCHASTIC},
    "gddim evaluate": lambda p, t: gddim(p, t, corrector="evaluate"),
    "exponential reuse": lambda p, t: exponential(p, t, corrector="reuse", reference=Gaussian(0.3)),
}


def to_t_min(process: Process, steps: int) -> torch.Tensor:
    exponent = 6.0 if process.name == "ve" else 2.0
    return grid.power(process, steps, exponent=exponent, start=0.95 * process.t_max, end=process.t_min)


@EVERY
@pytest.mark.parametrize("solver", CASES.values(), ids=CASES)
def test_running_the_plan_from_the_inverse_gives_the_state_back(process, solver):
    """float64; the state is one that the plan reaches, so that a solution is known to exist."""
    if solver is SOLVERS["o-belm"] and process.blocks == 2:
        pytest.skip("no contraction; it has an algebraic inverse of its own (test_reversible.py)")
    ts = to_t_min(process, 16)
    plan = solver(process, ts)
    denoiser = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.3)
    start = root(process, ts[:1], Gaussian(0.5))[0](normal(2, process.blocks, *FIELD, seed=3))
    end = run(plan, denoiser, start)
    method = Parallel(tolerance=1e-9, reference=Gaussian(0.3), mixing=Mixing(history=5), max_rounds=150)
    found = invert(plan, denoiser, end, method=method)
    scale = float(end.abs().max())
    torch.testing.assert_close(run(plan, denoiser, found.first), end, rtol=0, atol=1e-6 * max(scale, 1.0))


@pytest.mark.parametrize("process", [VP(), Blurring(FIELD, blur_max=2.0), Langevin()], ids=lambda p: p.name)
def test_a_batch_is_a_loop(process):
    plan = ddim(process, to_t_min(process, 10))
    denoiser = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.3)
    end = normal(3, process.blocks, *FIELD, seed=3)
    together = invert(plan, denoiser, end)
    alone = [invert(plan, denoiser, end[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together.first, torch.cat([a.first for a in alone]), rtol=1e-9, atol=1e-9)
    assert together.nfe.tolist() == [int(a.nfe) for a in alone]


def test_no_solution_is_reported_not_returned_as_one():
    """A denoiser that jumps: states it never leads to have no inverse, and the residual says so."""
    process = VP()
    plan = ddim(process, to_t_min(process, 10))
    denoiser = Function(lambda u, _: u.sign())
    found = invert(plan, denoiser, torch.full((1, 1, *FIELD), 0.2, dtype=torch.float64))
    assert float(found.residual) > 1e-2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ddim(VP(), to_t_min(VP(), 4), eta=1.0), "stochastic"),
        (ddim(VP(), grid.uniform(VP(), 4)), "ends at time 0"),
    ],
)
def test_plans_without_an_inverse_are_refused(plan, message):
    with pytest.raises(PushforwardError, match=message):
        invert(plan, Function(lambda u, _: u), torch.zeros(1, 1, *FIELD))


@pytest.mark.parametrize("name", ["fashion-vp", "fashion-blurring", "fashion-langevin"])
def test_codes_of_images_decode_to_them(name):
    """Trained networks, float32, second or first order: 2e-3 of a range of 2 (rounding of Langevin's is 1e-3)."""
    model = pf.load(name)
    labels = torch.tensor([3])
    drawing = SOLVERS["ddim"](model.process, grid.power(model.process, 15))
    images = pf.Diffusion(model, drawing).given(labels).sample(len(labels))
    order = 1 if name == "fashion-vp" else 0  # for the others, extrapolation needs 50 steps to converge
    steps = 100 if name == "fashion-langevin" else 30  # with 50, one image in four has no inverse that is found
    plan = gddim(model.process, grid.power(model.process, steps, end=model.process.t_min), order=order)
    diffusion = pf.Diffusion(model, plan)
    found = diffusion.given(labels).invert(images, seed=1, sequential=name == "fashion-langevin")  # faster by far
    again = diffusion.given(labels).decode(found.code)
    assert float((again - images).abs().max()) < 2e-3
    assert found.code.start.shape == model.state_shape(len(labels))
    if name == "fashion-vp":
        few = Parallel(max_rounds=1)
        assert diffusion.given(labels).invert(images, noisy=False, parallel=few).code.end is None
        at_once = diffusion.given(labels).run_by(parallel=Parallel(tolerance=1e-4)).decode(found.code)
        torch.testing.assert_close(at_once, again, rtol=0, atol=3e-3)


def test_the_noise_of_an_image_depends_on_seed_and_number_alone():
    model = pf.load("fashion-vp")
    diffusion = pf.Diffusion(model, ddim(model.process, grid.power(model.process, 6, end=model.process.t_min)))
    images = torch.zeros(2, *model.shape)
    few = Parallel(max_rounds=1)
    both = diffusion.invert(images, seed=5, parallel=few).code.end
    second = diffusion.invert(images[1:], seed=5, first=1, parallel=few).code.end
    torch.testing.assert_close(both[1:], second, rtol=0, atol=0)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, x: d.invert(x[:, :, :8]), "images of shape"),
        (
            lambda d, x: d.decode(pf.Code(torch.zeros(1, 1, 28, 28), noises=torch.zeros(3, 1, 1, 28, 28))),
            "takes 0 noises",
        ),
        (lambda d, x: d.given(["bag", "coat"]).invert(x), "For 1 image give as many labels or prompts, or one; got 2"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model = pf.load("fashion-vp")
    diffusion = pf.Diffusion(model, ddim(model.process, grid.power(model.process, 4, end=model.process.t_min)))
    with pytest.raises(PushforwardError, match=message):
        change(diffusion, torch.zeros(1, *model.shape))


FOREIGN = torch.stack([torch.full((1, *FIELD), -1.0), torch.ones(1, *FIELD), 0.5 * normal(1, *FIELD, seed=4)]).double()


@pytest.mark.parametrize("process", [VP(), Blurring(FIELD, blur_max=2.0), Langevin()], ids=lambda p: p.name)
@pytest.mark.parametrize("solver", ["ddim", "gddim", "heun"])
@pytest.mark.parametrize("steps", [4, 12])
def test_the_residual_is_the_error_of_the_decoded_and_meets_the_tolerance(process, solver, steps):
    """Foreign images under sharp modes, float64: no rounding forbids 1e-4."""
    plan = SOLVERS[solver](process, to_t_min(process, steps))
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.3)
    clean = process.lift(FOREIGN)
    end = clean + process.covariance(plan.times[-1:]).cholesky()[0](normal(3, process.blocks, *FIELD, seed=5))
    found = invert(plan, denoiser, end, clean=clean)
    error = (run(plan, denoiser, found.first) - end).flatten(1).abs().amax(1)
    torch.testing.assert_close(found.residual, error, rtol=1e-3, atol=1e-9)
    if solver != "gddim":  # whose extrapolation over long steps leads to states that no first one leads to
        assert float(error.max()) <= 1e-4
    assert found.decoding % plan.nfe == 0
    assert (found.nfe >= plan.nfe).all()
    alone = [invert(plan, denoiser, end[i : i + 1], clean=clean[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(found.first, torch.cat([one.first for one in alone]), rtol=0, atol=1e-6)
    assert found.nfe.tolist() == [int(one.nfe) for one in alone]


def test_long_steps_are_solved_row_by_row():
    """Three steps onto modes of deviation .1, where one round of all times together finds nothing.

    Two of the three are found, at least; of the third, between modes, the error is told.
    """
    process = VP()
    plan = ddim(process, grid.power(process, 3, end=process.t_min))
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.01)
    start = root(process, plan.times[:1], Gaussian(0.5))[0](normal(3, 1, *FIELD, seed=3))
    end = run(plan, denoiser, start)
    found = invert(plan, denoiser, end, method=Parallel(tolerance=1e-4, max_rounds=1))
    assert int((found.residual <= 1e-4).sum()) >= 2
    error = (run(plan, denoiser, found.first) - end).flatten(1).abs().amax(1)
    torch.testing.assert_close(found.residual, error, rtol=1e-3, atol=1e-9)
    alone = [invert(plan, denoiser, end[i : i + 1], method=Parallel(tolerance=1e-4, max_rounds=1)) for i in range(3)]
    torch.testing.assert_close(found.first, torch.cat([one.first for one in alone]), rtol=0, atol=1e-6)


def test_foreign_images_of_a_trained_network_come_back():
    """float32: 1e-4, as told; the same code decoded alone differs by rounding."""
    model = pf.load("fashion-vp")
    diffusion = pf.Diffusion(model, ddim(model.process, grid.power(model.process, 20, end=model.process.t_min)))
    white, board = torch.ones(1, 28, 28), (torch.arange(28)[:, None] + torch.arange(28)).remainder(2)[None] * 2.0 - 1
    images = torch.stack([white, board])
    found = diffusion.invert(images)
    for i in range(2):
        again = diffusion.decode(found.code[i : i + 1]).detach()
        error = float((again - images[i]).abs().max())
        assert error <= 1e-4
        assert error == pytest.approx(float(found.residual[i]), abs=2e-5)
    assert found.rounds <= 16


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 28, 28), float("nan")), "finite numbers; 2 of 2"),
        (torch.stack([torch.zeros(1, 28, 28), torch.full((1, 28, 28), float("inf"))]), "the first at place 1"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "floating-point"),
    ],
)
@pytest.mark.parametrize("task", ["invert", "encode", "perturb"])
def test_images_that_are_no_images_are_refused(task, images, message):
    model = pf.load("fashion-vp")
    plan = ddim(model.process, grid.power(model.process, 4, end=model.process.t_min), eta=float(task == "encode"))
    with pytest.raises(PushforwardError, match=message):
        getattr(pf.Diffusion(model, plan), task)(images)


@pytest.mark.parametrize("process", [VP(), Blurring(FIELD, blur_max=2.0), Langevin()], ids=lambda p: p.name)
def test_row_after_row_finds_the_codes_of_all_at_once(process):
    """Where every row contracts there is one solution; a batch is a loop, and errors are within the tolerance."""
    plan = ddim(process, to_t_min(process, 16))
    denoiser = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.3)
    end = run(
        plan, denoiser, root(process, plan.times[:1], Gaussian(0.5))[0](normal(3, process.blocks, *FIELD, seed=3))
    )
    method = Parallel(tolerance=1e-8, mixing=Mixing(history=5, shrink=None), max_rounds=100)
    rows, together = (invert(plan, denoiser, end, method=method, sequential=way) for way in (True, False))
    assert float(rows.residual.max()) <= 1e-8
    torch.testing.assert_close(rows.first, together.first, rtol=0, atol=1e-6)
    alone = [invert(plan, denoiser, end[i : i + 1], method=method, sequential=True) for i in range(3)]
    torch.testing.assert_close(rows.first, torch.cat([one.first for one in alone]), rtol=0, atol=1e-9)
    assert rows.nfe.tolist() == [int(one.nfe) for one in alone]
    assert (rows.nfe < together.nfe).all()
    assert rows.rounds > together.rounds


def test_row_after_row_is_the_closed_form_of_a_gaussian():
    """With D(u) = c u every row is a number: u_n = u_{n+1} / (a + b c)."""
    process, data = VP(), Gaussian(0.4)
    plan = ddim(process, to_t_min(process, 12))
    end = normal(2, 1, *FIELD, seed=3)
    found = invert(plan, gaussian_denoiser(process, data), end, method=Parallel(tolerance=1e-10), sequential=True)
    expected = end
    for n, (a, b) in reversed(list(enumerate(one_step_rows(plan)))):
        expected = (a + b @ data.response(process, plan.node_times[n])).inverse()(expected)
    torch.testing.assert_close(found.first, expected, rtol=0, atol=1e-9)


def test_several_beginnings_find_several_roots():
    """One value, one step under guidance 4 towards one of two modes: the map from first states to last ones folds.

    All three roots are known from a fine grid of first states; beginnings far on either side find the outer two.
    """
    process, plan = VP(), ddim(VP(), torch.tensor([0.3, 0.1], dtype=torch.float64))
    both, right = (
        mixture_denoiser(process, torch.tensor(at, dtype=torch.float64).view(-1, 1, 1, 1), 0.02)
        for at in ([-1.0, 1.0], [1.0])
    )
    denoiser = Function(lambda u, t: 4.0 * right.denoise(u, t) - 3.0 * both.denoise(u, t))
    line = torch.linspace(-8, 8, 100_001, dtype=torch.float64).view(-1, 1, 1, 1)
    ends = run(plan, denoiser, line).flatten()
    fold = (ends.diff() < 0).nonzero()[:, 0]
    middle = 0.5 * (ends[fold[0]] + ends[fold[-1]])
    true = line.flatten()[((ends[:-1] < middle) != (ends[1:] < middle)).nonzero()[:, 0]]
    assert len(true) == 3
    begin = torch.tensor([-6.0, 6.0], dtype=torch.float64).view(-1, 1, 1, 1)
    for sequential in (True, False):
        found = invert(plan, denoiser, middle.expand(2, 1, 1, 1), begin=begin, sequential=sequential)
        assert float(found.residual.max()) <= 1e-4
        torch.testing.assert_close(found.first.flatten(), true[[0, 2]], rtol=0, atol=1e-3)


@pytest.mark.parametrize("sequential", [True, False])
def test_what_is_solved_row_after_row_is_tried_again_above_the_tolerance(monkeypatch, sequential):
    """With the other reference, as far as it is better; all at once only where the error is no rounding."""
    errors = iter([torch.tensor([5e-5, 5e-3, 5e-3]), torch.tensor([1e-5, 6e-3])])

    def found(plan, denoiser, end, **settings):
        return Inverse(end.clone(), next(errors), 3, 4, torch.full((len(end),), 7))

    monkeypatch.setattr("pushforward.maps.diffusion.invert", found)
    model = pf.load("fashion-vp")
    diffusion = pf.Diffusion(model, ddim(model.process, grid.power(model.process, 4, end=model.process.t_min)))
    result = diffusion.invert(torch.zeros(3, *model.shape), sequential=sequential)
    assert result.nfe.tolist() == ([7, 14, 14] if sequential else [7, 7, 7])
    torch.testing.assert_close(result.residual, torch.tensor([5e-5, 1e-5 if sequential else 5e-3, 5e-3]))

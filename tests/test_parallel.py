"""All steps at once: the sequential result for every solver and process, and what is promised on the way there."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pushforward as pf
from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import PARALLEL_METHODS, Mixing, Parallel, parallel, run
from pushforward.execute.coarse import coarse_of
from pushforward.linear import VP, Blurring, Flow, Gaussian, Langevin, Process, fit, root
from pushforward.model import Network
from pushforward.plan import SOLVERS, auto, ddim, exponential, gddim, grid
from support.helpers import EVERY, FIELD, PROCESSES, RESTLESS, gaussian_denoiser, mixture_denoiser, normal, times

EXPLICIT = [name for name in SOLVERS if name != "collocation"]
CASES = {
    **{name: SOLVERS[name] for name in EXPLICIT},
    "ddim eta=0.5": lambda p, t: ddim(p, t, eta=0.5),
    "ddim eta=1": lambda p, t: ddim(p, t, eta=1.0),
    "gddim noise=0.5": lambda p, t: gddim(p, t, noise=0.5),
    "gddim evaluate": lambda p, t: gddim(p, t, corrector="evaluate"),
    "exponential reuse": lambda p, t: exponential(p, t, corrector="reuse", reference=Gaussian(0.3)),
}
STEPS = 8


def problem(process: Process, solver, count: int = 2):
    """A plan, a denoiser with several modes, starts of the right size and noises."""
    exponent = 4.0 if process.name == "ve" else 2.0
    ts = grid.power(process, STEPS, exponent=exponent, start=0.95 * process.t_max, end=process.t_min)
    plan = solver(process, ts)
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1)
    z = normal(count, process.blocks, *FIELD, seed=3)
    start = root(process, ts[:1], Gaussian(1.0))[0](z)
    noises = {k: normal(count, process.blocks, *FIELD, seed=100 + k) for k in plan.noises}
    return plan, denoiser, start, noises.__getitem__


@EVERY
@pytest.mark.parametrize("solver", CASES.values(), ids=CASES)
def test_all_steps_at_once_are_the_steps_one_by_one(process, solver):
    """To the tolerance of 1e-8 in float64; deterministic and stochastic alike, the noise being the same."""
    if solver is SOLVERS["sscs"] and process.name in RESTLESS:
        pytest.skip("refused (test_splitting.py)")
    plan, denoiser, start, noise = problem(process, solver)
    expected = run(plan, denoiser, start, noise=noise)
    method = Parallel(tolerance=1e-8, reference=Gaussian(1.0))
    found = parallel(plan, denoiser, start, noise=noise, method=method)
    assert not found.diverged.any()
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.last, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", PARALLEL_METHODS)
@pytest.mark.parametrize("process", [VP(), Blurring(FIELD, blur_max=2.0), Langevin()], ids=lambda p: p.name)
@pytest.mark.parametrize("solver", ["ddim", "gddim", "unipc", "heun"])
def test_every_method_ends_at_the_sequential_result(name, process, solver):
    """A tolerance below rounding: no method can stop early, all must be exact after as many rounds as calls."""
    plan, denoiser, start, noise = problem(process, SOLVERS[solver])
    method = replace(PARALLEL_METHODS[name], tolerance=1e-30)
    found = parallel(plan, denoiser, start, noise=noise, method=method)
    assert found.rounds <= plan.nfe + (plan.nfe if found.diverged.any() else 0)
    torch.testing.assert_close(found.last, run(plan, denoiser, start), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_asks_no_more_than_it_holds(window):
    plan, denoiser, start, noise = problem(VP(), SOLVERS["gddim"])
    rounds = []
    method = Parallel(tolerance=1e-9, window=window)
    found = parallel(plan, denoiser, start, noise=noise, method=method, callback=rounds.append)
    torch.testing.assert_close(found.last, run(plan, denoiser, start), rtol=1e-7, atol=1e-7)
    assert max(r.nfe for r in rounds) <= window * len(start)
    if window == 1:
        assert found.rounds == plan.nfe


def test_rows_of_a_call_are_limited():
    plan, denoiser, start, _ = problem(VP(), SOLVERS["ddim"], count=3)
    sizes = []

    def counted(u, t):
        sizes.append(len(u))
        return denoiser.denoise(u, t)

    class Batched:
        def at(self, process, at, like):
            ask = Function(counted).at(process, at, like)

            def limited(k, u, of=None):
                assert len(u) <= 5
                return ask(k, u, of)

            return limited

    found = parallel(plan, Batched(), start, method=Parallel(tolerance=1e-9, max_rows=5))
    torch.testing.assert_close(found.last, run(plan, denoiser, start), rtol=1e-7, atol=1e-7)
    assert sizes


@EVERY
@pytest.mark.parametrize("spectrum", [False, True], ids=["scalar", "spectrum"])
def test_gaussian_data_take_two_rounds(process, spectrum):
    """With the reference that the data have, the linear system is the truth: one round solves it, one sees that."""
    variance = torch.linspace(0.5, 0.1, 6, dtype=torch.float64).view(FIELD) if spectrum else 0.3
    data = Gaussian(variance)
    plan, _, start, noise = problem(process, SOLVERS["ddim"])
    found = parallel(plan, gaussian_denoiser(process, data), start, noise=noise, method=Parallel(reference=data))
    assert found.rounds <= 2
    expected = run(plan, gaussian_denoiser(process, data), start)
    torch.testing.assert_close(found.last, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("process", [VP(), Blurring(FIELD, blur_max=2.0), Langevin()], ids=lambda p: p.name)
def test_a_batch_is_a_loop_in_results_and_evaluations(process):
    """Images stop on their own: what one costs does not depend on its neighbours."""
    plan, denoiser, start, _ = problem(process, SOLVERS["ddim"], count=4)
    method = Parallel(tolerance=1e-4)
    together = parallel(plan, denoiser, start, method=method)
    alone = [parallel(plan, denoiser, start[i : i + 1], method=method) for i in range(4)]
    torch.testing.assert_close(together.last, torch.cat([a.last for a in alone]), rtol=1e-9, atol=1e-9)
    assert together.nfe.tolist() == [int(a.nfe) for a in alone]
    assert together.rounds == max(a.rounds for a in alone)


def relative(found, expected):
    """Relative errors of images, `(batch,)`."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


RANDOM = random.Random(0)


def drawn_case():
    """A random run: process, solver, steps, end, how sharp its data are, precision, tolerance, method, window."""
    choices = (
        ["vp", "cosine", "ve", "flow", "blurring", "langevin"],
        list(CASES),
        [6, 10, 16],
        [0.0, 0.05],
        [0.02, 0.1, 0.3],
        [torch.float32, torch.float32, torch.float64],
        [1e-1, 1e-2, 1e-3, 1e-4],
        ["preconditioned"] * 4 + list(PARALLEL_METHODS),
        [None, None, 3],
    )
    return tuple(RANDOM.choice(some) for some in choices)


SWEEP = [drawn_case() for _ in range(50)]


@pytest.mark.parametrize(
    "case", SWEEP, ids=[f"{i}-{c[0]}-{c[1]}-{c[7]}".replace(" ", "-") for i, c in enumerate(SWEEP)]
)
def test_no_random_run_ends_above_its_tolerance_unsaid(case):
    """The truth is the sequential run; the estimate may be exceeded only where it already says more than allowed.

    Modes that are narrow and far apart make the flow's sensitivity high, and it is different in every run.
    """
    name, solver, steps, end, variance, dtype, tolerance, method, window = case
    process = PROCESSES[name]
    if solver == "sscs" and name in RESTLESS:
        pytest.skip("refused (test_splitting.py)")
    exponent = 4.0 if name == "ve" else 2.0
    ts = grid.power(process, steps, exponent=exponent, start=0.95 * process.t_max, end=max(process.t_min, end))
    plan = CASES[solver](process, ts)
    denoiser = mixture_denoiser(process, normal(6, 1, *FIELD, seed=steps), variance)
    start = root(process, ts[:1], Gaussian(1.0))[0](normal(6, process.blocks, *FIELD, seed=9)).to(dtype)
    noises = {k: normal(6, process.blocks, *FIELD, seed=100 + k).to(dtype) for k in plan.noises}
    expected = process.image(run(plan, denoiser, start, noise=noises.__getitem__))
    how = replace(PARALLEL_METHODS[method], tolerance=tolerance, window=window)
    found = parallel(plan, denoiser, start, noise=noises.__getitem__, method=how)
    error = relative(process.image(found.last), expected)
    assert bool((error <= torch.maximum(found.residual, torch.tensor(tolerance))).all()), (error, found.residual)
    assert float(found.residual.min()) > 0
    assert found.rounds <= plan.nfe * (2 if found.diverged.any() else 1)


def test_the_residual_bounds_the_error():
    """What a stopped run says of itself, over tolerances and starts; and it does not go on for long after."""
    process = VP()
    ts = grid.power(process, 60, exponent=2.0, start=0.95, end=process.t_min)
    denoiser = mixture_denoiser(process, normal(6, 1, *FIELD), 0.05)
    start = root(process, ts[:1], Gaussian(1.0))[0](normal(16, 1, *FIELD, seed=3))
    plan = ddim(process, ts)
    expected = run(plan, denoiser, start)
    for tolerance in (1e-2, 1e-3, 1e-4):
        found = parallel(plan, denoiser, start, method=Parallel(tolerance=tolerance))
        assert found.rounds < 30
        assert float(found.residual.max()) <= tolerance
        assert bool((relative(found.last, expected) <= found.residual).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_network_rounds_is_in_the_residual(dtype):
    """Weights of 16 bits: the sequential result is known to some units of their eps, and so is this one."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, *FIELD))
    )
    module = module.to(dtype)

    class Rounded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, u, t, condition=None):
            return self.module(((1 - 0.5 * t.view(-1, 1, 1, 1)) * u).to(dtype)).to(u.dtype)

    process = VP()
    plan = ddim(process, grid.power(process, 24, end=process.t_min))
    denoiser = Network(Rounded(), prediction="sample")
    start = normal(8, 1, *FIELD, seed=3).float()
    expected = run(plan, denoiser, start)
    found = parallel(plan, denoiser, start, method=Parallel(tolerance=1e-7))
    error = relative(found.last, expected)
    assert bool((error <= found.residual).all()), (error, found.residual)
    assert float(found.residual.min()) > 0.1 * torch.finfo(dtype).eps
    assert float(found.residual.max()) < 30 * torch.finfo(dtype).eps
    assert found.rounds < plan.nfe


ABSURD = {
    "mean": Gaussian(0.25, 1e12),
    "mean 300": Gaussian(0.25, 300.0),
    "not a number": Gaussian(0.25, float("nan")),
    "variance": Gaussian(1e12),
    "no variance": Gaussian(1e-12),
    "spectrum": Gaussian(torch.tensor([[1e9, 1e-9], [1.0, 1e9], [0.0, 1.0]], dtype=torch.float64)),
}


@pytest.mark.parametrize("reference", ABSURD.values(), ids=ABSURD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_absurd_reference_costs_rounds_and_nothing_else(reference, dtype):
    plan, denoiser, start, _ = problem(VP(), SOLVERS["ddim"])
    expected = run(plan, denoiser, start.to(dtype))
    found = parallel(plan, denoiser, start.to(dtype), method=Parallel(tolerance=1e-3, reference=reference))
    assert bool((relative(found.last, expected) <= found.residual.clamp_min(1e-14)).all())
    assert float(found.residual.max()) <= 1e-3


def test_a_stopped_run_says_its_residual():
    plan, denoiser, start, _ = problem(VP(), SOLVERS["ddim"])
    found = parallel(plan, denoiser, start, method=Parallel(max_rounds=2))
    assert found.rounds == 2
    assert float(found.residual.max()) > 1e-3


class Explosive:
    """A denoiser that blows up when asked far from any state of the true path, as networks do."""

    def __init__(self, denoiser, bound):
        self.denoiser, self.bound = denoiser, bound

    def at(self, process, at, like):
        ask = self.denoiser.at(process, at, like)

        def exploding(k, u, of=None):
            size = u.flatten(1).abs().amax(1)
            return ask(k, u, of) + torch.where(size > self.bound, torch.inf, 0.0)[:, None, None, None]

        return exploding


@pytest.mark.parametrize("method", ["picard", "anderson", "joint", "triangular"])
def test_a_way_that_a_process_does_not_allow_falls_back_without_a_warning(method):
    """The published ways respond as noise does, which where flow matching has no signal is without bounds.

    Images are then those of step by step, and are said to be: to the network's rounding, not to within "nan".
    """
    process = Flow()
    model = pf.Model("flow", process, mixture_denoiser(process, normal(4, 1, *FIELD), 0.3), (1, *FIELD))
    images = model.sample(3, solver="ddim", steps=8, parallel=method)  # warnings are errors here
    expected = model.sample(3, solver="ddim", steps=8)
    ((_, found),) = model.diffusion("ddim", 8, parallel=method).solved(3)
    assert found.diverged.all()
    assert bool((relative(images, expected) <= found.residual).all())
    assert 0 < float(found.residual.max()) < 1e-4


def test_divergence_falls_back_and_is_reported():
    """Picard's iteration in the noise prediction overshoots a hundredfold on its way; here that is fatal."""
    process = VP()
    plan = ddim(process, grid.uniform(process, 30, end=process.t_min))
    denoiser = Explosive(mixture_denoiser(process, normal(4, 1, *FIELD), 0.1), bound=5.0)
    start = normal(2, 1, *FIELD, seed=3)
    found = parallel(plan, denoiser, start, method=PARALLEL_METHODS["picard"])
    assert found.diverged.all()
    assert 0 < float(found.residual.max()) < 1e-12  # another batch, other low bits
    torch.testing.assert_close(found.last, run(plan, denoiser, start), rtol=1e-9, atol=1e-9)
    good = parallel(plan, denoiser, start)
    assert not good.diverged.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tolerance": 0.0}, "positive"), ({"window": 0}, "window must"), ({"max_rows": 0}, "max_rows must")],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(PushforwardError, match=message):
        Parallel(**settings)


def test_mixing_needs_a_history():
    with pytest.raises(PushforwardError, match="history"):
        Mixing(history=0)


def test_noise_is_asked_for():
    plan = ddim(VP(), grid.uniform(VP(), 3), eta=1.0)
    with pytest.raises(PushforwardError, match="stochastic"):
        parallel(plan, gaussian_denoiser(VP(), Gaussian(0.3)), normal(1, 1, *FIELD))


def test_a_fitted_gaussian_is_that_of_the_images():
    """40 000 images of known mean and spectrum; three standard errors of a variance are 2%."""
    spectrum = torch.linspace(0.5, 0.1, 6, dtype=torch.float64).view(FIELD)
    mean = normal(1, *FIELD, seed=5)
    white = Gaussian(spectrum).data_covariance(1).cholesky()
    found = fit(mean + white(normal(40_000, 1, *FIELD)))
    torch.testing.assert_close(torch.as_tensor(found.variance), spectrum, rtol=0.03, atol=0)
    torch.testing.assert_close(torch.as_tensor(found.mean), mean, rtol=0, atol=0.02)
    halfway = torch.as_tensor(found.tempered().variance)
    torch.testing.assert_close(halfway.square(), torch.as_tensor(found.variance) * found.variance.mean())
    with pytest.raises(PushforwardError, match="two or more images"):
        fit(mean[None])


@pytest.mark.parametrize("name", ["fashion-vp", "fashion-blurring", "fashion-langevin"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_embedded_models_at_once(name, eta):
    """Trained networks in float32: within the tolerance and within what is said, in fewer rounds than steps."""
    model = pf.load(name)
    plan = ddim(model.process, grid.power(model.process, 12, end=model.process.t_min), eta=eta)
    sampler = pf.Diffusion(model, plan)
    labels = torch.tensor([1, 7])
    expected = sampler.given(labels).sample(2)
    ((images, solution),) = sampler.given(labels).run_by(parallel=Parallel(tolerance=3e-3)).solved(2)
    assert bool((relative(images, expected) <= solution.residual).all())
    assert float(solution.residual.max()) <= 3e-3
    assert solution.rounds < 12
    assert not solution.diverged.any()


def test_the_default_sampler_at_once():
    process = VP()
    plan = auto(process, 12, Gaussian(0.3))
    denoiser = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1)
    start = root(process, times(1.0), Gaussian(0.3))[0](normal(2, 1, *FIELD, seed=2))
    found = parallel(plan, denoiser, start, method=Parallel(tolerance=1e-8))
    torch.testing.assert_close(found.last, run(plan, denoiser, start), rtol=1e-6, atol=1e-6)


class Reads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: numbers read, and places found."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        del types
        self.count += function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


def test_a_round_reads_few_numbers():
    """Whether images are left, which calls to make, who is lost and whose moves are large: four in every round."""

    class Restless:
        def at(self, process, at, like):
            return lambda k, u, of=None: u.sin()

    plan, start = ddim(VP(), grid.power(VP(), 12)), normal(2, 1, *FIELD)
    counts = []
    for rounds in (2, 5):
        with Reads() as reads:
            method = Parallel(tolerance=1e-12, max_rounds=rounds, reference=Gaussian(1.0))
            assert parallel(plan, Restless(), start, method=method).rounds == rounds
        counts.append(reads.count)
    assert counts[1] - counts[0] <= 3 * 4


def long_chain(process: Process, count: int = 3, rough: float = 0.0, solver=ddim):
    """Eighty steps of a mixture, whose answers may be rough in time."""
    exponent = 4.0 if process.name == "ve" else 2.0
    plan = solver(process, grid.power(process, 80, exponent=exponent, end=process.t_min))
    inner = mixture_denoiser(process, normal(4, 1, *FIELD), 0.1)
    denoiser = Function(lambda u, t: inner.denoise(u, t) * (1 + rough * math.sin(1e6 * t)))
    start = root(process, plan.times[:1], Gaussian(1.0))[0](normal(count, process.blocks, *FIELD, seed=3))
    return plan, denoiser, start


METHOD = Parallel(tolerance=1e-6, reference=Gaussian(1.0))


@EVERY
@pytest.mark.parametrize("rough", [0.0, 0.02])
def test_few_steps_stand_for_many(process, rough):
    """The step-by-step result, for fewer evaluations, also of a network that a spline in time cannot follow."""
    plan, denoiser, start = long_chain(process, rough=rough)
    expected = run(plan, denoiser, start)
    found, full = (parallel(plan, denoiser, start, method=replace(METHOD, coarse=c)) for c in (METHOD.coarse, None))
    torch.testing.assert_close(found.last, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert found.nfe.double().mean() < (0.9 if rough == 0 else 1) * full.nfe.double().mean()


def test_coarse_steps_tell_cubic_surprises_exactly():
    """A spline through four or more points of a cubic is that cubic."""
    coarse = coarse_of(ddim(VP(), grid.power(VP(), 50)), 9)
    at = torch.arange(50.0, dtype=torch.float64) / 50
    cubic = 1 - 2 * at + 3 * at**2 - at**3
    torch.testing.assert_close(coarse.weights @ cubic[coarse.calls], cubic, rtol=0, atol=1e-12)


def test_no_image_is_done_before_all_its_steps_were_asked():
    """A network that is the reference's own but for one call between the coarse ones."""
    process = VP()
    plan = ddim(process, grid.power(process, 80, end=process.t_min))
    odd = float(plan.asked_times[41])
    inner = gaussian_denoiser(process, Gaussian(1.0))
    denoiser = Function(lambda u, t: inner.denoise(u, t) + (0.5 if t == odd else 0.0))
    start = normal(2, 1, *FIELD)
    found = parallel(plan, denoiser, start, method=METHOD)
    torch.testing.assert_close(found.last, run(plan, denoiser, start), rtol=0, atol=1e-6)


def test_images_with_coarse_rounds_do_not_depend_on_one_another():
    """An easy image next to a hard one is asked and becomes what it is alone."""
    plan, denoiser, start = long_chain(VP(), count=4)
    together = parallel(plan, denoiser, start, method=METHOD)
    alone = [parallel(plan, denoiser, one[None], method=METHOD) for one in start]
    assert together.nfe.tolist() == [int(one.nfe) for one in alone]
    torch.testing.assert_close(together.last, torch.cat([one.last for one in alone]), rtol=0, atol=1e-9)


def test_after_as_many_rounds_as_calls_the_result_is_exact_with_coarse_steps_too():
    plan, denoiser, start = long_chain(VP(), count=2)
    found = parallel(plan, denoiser, start, method=replace(METHOD, tolerance=1e-30))
    torch.testing.assert_close(found.last, run(plan, denoiser, start), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [lambda p, t: ddim(p, t, eta=0.5), SOLVERS["heun"], SOLVERS["collocation"]],
    ids=["noise", "twice", "whole"],
)
def test_plans_whose_surprises_are_not_smooth_have_no_coarse_steps(solver):
    """Noises, two calls at one time, calls that depend on one another."""
    plan = solver(VP(), grid.power(VP(), 80, end=1e-3))
    assert plan.nfe > 34
    assert coarse_of(plan, 17) is None


def test_coarse_steps_are_enough_for_a_spline():
    with pytest.raises(PushforwardError, match="at least 4 coarse steps; got 3"):
        Parallel(coarse=3)

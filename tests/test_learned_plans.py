"""Plans learned by regression: how near they come to the flow, and their files as solvers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pushforward as pf
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, parallel, run
from pushforward.execute.budget import spent
from pushforward.linear import VP, Blurring, Gaussian, Langevin, root
from pushforward.maps.spec import parse
from pushforward.maps.storage import decoder_of, header, load_codes, save_codes
from pushforward.model import Model
from pushforward.plan import auto, ddim, gddim, grid, load_plan, save_plan
from pushforward.training.plans import Learned, evaluations, learn_plan
from support.cli import invoke, refused
from support.helpers import mixture_denoiser, normal
from support.models import saved

pytestmark = pytest.mark.usefixtures("one_thread")
FIELD = (8, 8)
PROCESSES = {"vp": VP(), "blurring": Blurring(field=FIELD), "langevin": Langevin()}


def clusters(process):
    """Four clusters of eight by eight pixels, whose posterior mean is known."""
    return Model("clusters", process, mixture_denoiser(process, normal(4, 1, *FIELD), 0.1), (1, *FIELD), Gaussian(1.0))


@pytest.fixture(scope="module", params=PROCESSES)
def learned(request):
    """A model, and what is learned of it for 3 rounds."""
    model, calls = clusters(PROCESSES[request.param]), []
    found = learn_plan(model, 3, images=144, max_evaluations=30, seed=6, callback=calls.append)
    return model, found, sum(calls)


def test_it_is_nearer_to_the_flow_than_without_learning(learned):
    """On starts of its own, to a run of 200 steps; at half the error in the median where it learns one number a term.

    Blurring's coefficients are shared by bands of frequencies, which fits its rough plan less well.
    """
    model, found, _ = learned
    plan, process = found.plan, model.process
    start = root(process, plan.times[:1], model.reference)[0](normal(32, process.blocks, *FIELD, seed=8))
    exact = process.image(run(auto(process, 200, model.reference), model.denoiser, start))
    usual = pf.plan.in_rounds(process, len(plan.times) - 1, model.reference)
    method = Parallel(rounds=3, reference=model.gaussian.tempered())
    mine, before = run(plan, model.denoiser, start), parallel(usual, model.denoiser, start, method=method).last
    errors = [(process.image(u) - exact).flatten(1).norm(dim=1).median() for u in (mine, before)]
    assert errors[0] < (1.0 if process.name == "blurring" else 0.5) * errors[1]


def test_rounds_and_evaluations_are_what_is_said(learned):
    _, found, calls = learned
    plan = found.plan
    assert plan.rounds == 3
    assert len(repr(found).splitlines()) == 1
    calls_of_all = len(plan.times) - 1
    if plan.process.name == "vp":  # the first call alone, for the mean, and then all others
        assert plan.nfe == 1 + spent(calls_of_all - 1, 2)
    else:
        assert plan.nfe == spent(calls_of_all, 3) <= 30
    assert calls == found.nfe <= evaluations(3, 144, 30)
    assert bool((plan.times.diff() < 0).all())


def test_all_at_once_is_as_step_by_step(learned):
    model, found, _ = learned
    start = normal(4, model.process.blocks, *FIELD, seed=1)
    one_by_one = run(found.plan, model.denoiser, start)
    at_once = parallel(found.plan, model.denoiser, start, method=Parallel(tolerance=1e-6))
    assert torch.allclose(at_once.last, one_by_one, atol=1e-4)  # the tolerance, in deviations of 1, and float32


def test_the_file_is_the_plan(learned, tmp_path):
    model, found, _ = learned
    save_plan(found.plan, tmp_path / "fast.plan", {"model": "clusters"})
    plan = parse(str(tmp_path / "fast.plan")).plan(model)
    start = normal(4, model.process.blocks, *FIELD, seed=1)
    assert torch.equal(run(plan, model.denoiser, start), run(found.plan, model.denoiser, start))
    assert (plan.rounds, plan.steps) == (found.plan.rounds, found.plan.steps)


@pytest.mark.parametrize("make", [lambda p: ddim(p, grid.power(p, 5), eta=1.0), lambda p: gddim(p, grid.power(p, 5))])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_any_plan_can_be_kept(make, process, tmp_path):
    plan = make(process)
    save_plan(plan, tmp_path / "own.plan")
    again = load_plan(tmp_path / "own.plan")
    noises = {k: normal(2, process.blocks, *FIELD, seed=k) for k in plan.noises}
    start, denoiser = normal(2, process.blocks, *FIELD), clusters(process).denoiser
    first, second = (run(one, denoiser, start, noise=noises.__getitem__) for one in (plan, again))
    assert torch.equal(first, second)


def test_frequencies_alike_are_written_once(tmp_path):
    """Waves along either axis, 120 of 256 twice, so that little above half of the numbers is written.

    A file that holds the numbers of all frequencies, as there are some, is the same plan.
    """
    process = Blurring(field=(16, 16))
    plan, path = gddim(process, grid.power(process, 5)), tmp_path / "own.plan"
    save_plan(plan, path)
    terms = [operator.coefficients for node in plan.nodes for operator in node.terms.values()]
    assert path.stat().st_size < 0.65 * 8 * sum(c.numel() for c in terms)
    with safe_open(path, "pt") as file:
        tensors, head = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["coefficients"] = tensors["coefficients"][:, tensors.pop("frequencies")].contiguous()
    save_file(tensors, tmp_path / "all.plan", head)
    for read in (load_plan(path), load_plan(tmp_path / "all.plan")):
        again = [operator.coefficients for node in read.nodes for operator in node.terms.values()]
        assert all(torch.equal(a, b) for a, b in zip(terms, again, strict=True))


def test_codes_know_their_plan(tmp_path, monkeypatch):
    """A file of codes names the plan's by its full path, and another plan in its place is noticed."""
    model = clusters(VP())
    path = tmp_path / "own.plan"
    save_plan(ddim(VP(), grid.power(VP(), 5, end=1e-3)), path)
    with monkeypatch.context() as place:
        place.chdir(tmp_path)
        spec = parse("own.plan")
        there = spec.diffusion(model)
    code = there.draw(3, seed=0)
    info = header("clusters", spec, there, 3)
    save_codes(tmp_path / "codes.safetensors", code, info)
    read, head = load_codes(tmp_path / "codes.safetensors")
    assert torch.equal(decoder_of(head, model).decode(read), there.decode(code))
    save_plan(ddim(VP(), grid.power(VP(), 6, end=1e-3)), path)
    with pytest.raises(PushforwardError, match="another plan than the one that is meant"):
        decoder_of(head, model)


def test_from_above_zero_images_are_inverted():
    """Learned to end at `t_min`; decoding what was found gives the images again."""
    model = clusters(VP())
    plan = learn_plan(model, 4, images=96, seed=5, end=VP().t_min).plan
    images = model.process.image(run(auto(VP(), 50, model.reference), model.denoiser, normal(3, 1, *FIELD, seed=2)))
    found = pf.Diffusion(model, plan).invert(images)
    assert float(found.residual.max()) < 1e-3
    assert torch.allclose(pf.Diffusion(model, plan).decode(found.code), images.float(), atol=2e-3)


@pytest.mark.parametrize("way", ["parallel=preconditioned", "parallel=plain:within=1e-5"])
def test_a_plan_in_a_file_is_taken_all_at_once_as_it_is_said(way, tmp_path):
    model, path = clusters(VP()), tmp_path / "own.plan"
    save_plan(ddim(VP(), grid.power(VP(), 12)), path)
    there = parse(f"{path}:{way}").diffusion(model)
    assert there.parallel is not None
    assert there.parallel.tolerance == (1e-5 if "within" in way else 1e-3)
    images = there.run_by(parallel=None).sample(3)
    allowed = 2 * there.parallel.tolerance * float(images.abs().max())
    assert torch.allclose(there.sample(3), images, rtol=0, atol=allowed)


@pytest.mark.parametrize("said", [":steps=7", ":end=0.01", ":order=2", ":digest=0123", ":rounds=5", ":start=0.5"])
def test_a_plan_takes_no_settings(said, tmp_path):
    path = tmp_path / "own.plan"
    save_plan(ddim(VP(), grid.power(VP(), 5)), path)
    with pytest.raises(PushforwardError, match=r"leave out|another plan"):
        parse(f"{path}{said}").plan(clusters(VP()))


def test_what_makes_no_plan_is_refused(tmp_path):
    model = clusters(VP())
    with pytest.raises(PushforwardError, match=r"2 rounds and 8 images"):
        learn_plan(model, 1)
    with pytest.raises(PushforwardError, match="cannot be learned in"):
        learn_plan(model, 5, max_evaluations=6)
    with pytest.raises(PushforwardError, match=r"ends in \.plan"):
        save_plan(ddim(VP(), grid.power(VP(), 5)), tmp_path / "own.json")
    with pytest.raises(PushforwardError, match="There is no plan"):
        parse(str(tmp_path / "none.plan"))
    (tmp_path / "bad.plan").write_bytes(b"nothing")
    with pytest.raises(PushforwardError, match="damaged or no plan"):
        load_plan(tmp_path / "bad.plan")
    save_file({"weights": torch.zeros(1)}, tmp_path / "bad.plan")
    with pytest.raises(PushforwardError, match="a safetensors file, but no plan"):
        load_plan(tmp_path / "bad.plan")
    save_plan(ddim(Langevin(), grid.power(Langevin(), 5)), tmp_path / "other.plan")
    with pytest.raises(PushforwardError, match="for process 'langevin'"):
        parse(str(tmp_path / "other.plan")).plan(model)


def test_a_plan_that_is_not_better_is_refused():
    """From eight small images, with fewer equations than coefficients, nothing is learned that holds elsewhere."""
    with pytest.raises(PushforwardError, match="no better than 6 rounds without learning"):
        learn_plan(clusters(PROCESSES["blurring"]), 6, images=8)


def test_the_command_writes_a_solver(tmp_path):
    """On an untrained network, whose answers follow its input all the same."""
    saved(VP(), tmp_path / "model")
    path = tmp_path / "fast.plan"
    result = invoke("learn-plan", tmp_path / "model", "--rounds", 2, "--images", 48, "--out", path, "--json", "-", "-q")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["errors"]["learned"]["median"] <= report["errors"]["all at once"]["median"]
    result = invoke("sample", tmp_path / "model", "--solver", path, "--count", 2, "--out", tmp_path / "a.png", "-q")
    assert result.exit_code == 0, result.output
    result = invoke("sample", tmp_path / "model", "--solver", path, "--count", 2, "--out", tmp_path / "b.png",
                    "--parallel", "--check", "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["relative_error"]["worst"] < 1e-3
    refused(invoke("sample", tmp_path / "model", "--solver", path, "--steps", 7), "leave out steps")
    refused(invoke("learn-plan", tmp_path / "model", "--out", tmp_path / "a.txt"), "ends in .plan")


@pytest.mark.parametrize("minutes", ["inf", "nan", "0", "-1"])
def test_a_time_that_is_none_is_refused(tmp_path, minutes):
    saved(VP(), tmp_path / "model")
    refused(
        invoke("learn-plan", tmp_path / "model", "--minutes", minutes, "--out", tmp_path / "a.plan", "-q"),
        "a positive number of minutes",
    )


def test_errors_are_summed_up_by_their_median_and_root_mean_square():
    """Of an even number, as the held-out images are, the median is half-way between the two in the middle."""
    errors = torch.tensor([0.8, 0.1, 0.2, 0.4])
    found = Learned(ddim(VP(), grid.power(VP(), 2)), {"learned": errors}, images=8, nfe=1).summary
    assert found["learned"] == pytest.approx((0.3, (0.85 / 4) ** 0.5))

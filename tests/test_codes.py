"""Codes on disk: what is written comes back, what is damaged is refused; and how Gaussian codes are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pushforward as pf
from pushforward.denoiser import Function
from pushforward.linear import VP, Gaussian, Langevin, process_from_config
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.normality import statistics
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.maps.storage import check_codes, decoder_of, header, load_codes, save_codes
from pushforward.model import Model
from pushforward.plan import SOLVERS, grid, plan_of
from support.helpers import PROCESSES, normal

SHAPE = (1, 3, 2)


def formula(process=None, shape=SHAPE):
    return Model("formula", process or VP(), Function(lambda u, _: torch.zeros_like(u)), shape)


def info(model=None, **changes):
    model = model or formula()
    spec = parse("ddim:eta=0:steps=3:grid=power")
    return {**header("formula", spec, spec.diffusion(model), 2), **changes}


def code(count=2, *, noises=None, end=True, dtype=torch.float32):
    shape = (count, *SHAPE)
    many = None if noises is None else normal(noises, *shape, seed=1).to(dtype)
    return Code(normal(*shape).to(dtype), many, normal(*shape, seed=2).to(dtype) if end else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", [{}, {"end": False}, {"noises": 3, "end": False}], ids=str)
def test_codes_come_back_as_they_were(tmp_path, parts, dtype):
    """Bit for bit, header included, times in full."""
    path, given = tmp_path / "new" / "codes.safetensors", code(dtype=dtype, **parts)
    times = grid.karras(VP(), 7, end=1e-3 / 3)
    spec = parse("gddim:order=2:reference=0.25")
    head = header("formula", spec, Diffusion(formula(), spec.at(formula(), times), labels=torch.tensor([1, 0])), 2)
    save_codes(path, given, {**head, "images": ("a.png", "b.png")})
    again, found = load_codes(path)
    for name in ("start", "noises", "end"):
        before, after = getattr(given, name), getattr(again, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
    assert found.pop("format") == "pushforward-code-1"
    assert found.pop("images") == ["a.png", "b.png"]
    assert found == json.loads(json.dumps(head))
    assert torch.equal(torch.tensor(found["times"], dtype=torch.float64), times)
    assert [p.name for p in path.parent.iterdir()] == ["codes.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


CASES = [*((solver, "vp") for solver in SOLVERS), *(("ddim", name) for name in PROCESSES if name != "vp")]


@pytest.mark.parametrize(("solver", "name"), CASES)
def test_a_header_makes_the_same_plan_again(solver, name):
    """After a way through JSON every coefficient of the plan is the same number: every solver, every process."""
    process = PROCESSES[name]
    settings = {"gddim": {"order": 2, "reference": 0.3}, "exponential": {"order": 2, "reference": 0.3}}.get(solver, {})
    made = dict(settings)
    if "reference" in made:
        made["reference"] = Gaussian(0.3)
    times = grid.uniform(process, 4, start=0.9 * process.t_max, end=max(process.t_min, 0.05 * process.t_max))
    plan = SOLVERS[solver](process, times, **made)
    model = formula(process)
    head = json.loads(json.dumps(header("formula", SamplerSpec(solver, settings=settings), Diffusion(model, plan), 1)))
    again = plan_of(process_from_config(head["process"]), head["solver"], head["times"], head["settings"])
    assert again.process == plan.process
    assert len(again.nodes) == len(plan.nodes)
    for one, other in zip(plan.nodes, again.nodes, strict=True):
        assert (one.time, one.asks, set(one.terms)) == (other.time, other.asks, set(other.terms))
        for register, operator in one.terms.items():
            assert torch.equal(operator.coefficients, other.terms[register].coefficients)


def test_a_folder_is_written_with_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    spec = parse("ddim:steps=2")
    for name, written in {"mine": str(tmp_path / "mine"), "zoo-name": "zoo-name"}.items():
        assert header(name, spec, spec.diffusion(formula()), 1)["model"] == written


def broken(path, kind):
    save_codes(path, code(), info())
    tensors, head = load_file(path), {"format": "pushforward-code-1", **info()}
    match kind:
        case "missing":
            path.unlink()
            return
        case "truncated":
            path.write_bytes(path.read_bytes()[:-20])
            return
        case "cut in the header":
            path.write_bytes(path.read_bytes()[:60])
            return
        case "empty":
            path.write_bytes(b"")
            return
        case "garbage":
            path.write_bytes(b"\x89PNG not codes at all")
            return
        case "weights":
            save_file(tensors, path)
            return
        case "header no JSON":
            save_file(tensors, path, metadata={"pushforward": "{"})
            return
        case "not finite":
            tensors["start"][0, 0, 0, 0] = torch.nan
        case "no start":
            del tensors["start"]
        case "end of another shape":
            tensors["end"] = tensors["end"][:1].clone()
        case "noises of another shape":
            tensors["noises"] = tensors["start"].clone()
        case "unknown tensor":
            tensors["odd"] = tensors["start"].clone()
        case "whole numbers":
            tensors["start"] = tensors["start"].int()
        case _:
            head.update(kind)
    head = {key: value for key, value in head.items() if value != "gone"}
    save_file(tensors, path, metadata={"pushforward": json.dumps(head)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "There is no file of codes"),
        ("truncated", "damaged"),
        ("cut in the header", "damaged"),
        ("empty", "damaged"),
        ("garbage", "damaged"),
        ("weights", "but no file of codes"),
        ("header no JSON", "but no file of codes"),
        ("not finite", "no finite code"),
        ("no start", "no finite code"),
        ("end of another shape", "no finite code"),
        ("noises of another shape", "no finite code"),
        ("unknown tensor", "no finite code"),
        ("whole numbers", "no finite code"),
        ({"format": "pushforward-code-2"}, "reads 'pushforward-code-1'"),
        ({"times": "gone"}, "lacks the entry 'times'"),
        ({"times": [1.0, "x"]}, "entry 'times'"),
        ({"labels": "gone"}, "lacks the entry 'labels'"),
        ({"labels": [0]}, "a label each"),
        ({"guidance": "much"}, "entry 'guidance'"),
    ],
    ids=str,
)
def test_damaged_files_are_refused_in_a_sentence(tmp_path, kind, message):
    path = tmp_path / "codes.safetensors"
    broken(path, kind)
    with pytest.raises(pf.PushforwardError, match=message) as caught:
        load_codes(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_settings_of_another_kind_are_refused_in_a_sentence():
    with pytest.raises(pf.PushforwardError, match="'ddim' takes a number as eta; got 'x'"):
        decoder_of({**info(), "solver": "ddim", "settings": {"eta": "x"}}, formula())


def test_a_code_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "codes.safetensors"
    save_codes(path, code(), info())
    before = path.read_bytes()
    bad = Code(torch.full((2, *SHAPE), torch.inf))
    with pytest.raises(pf.PushforwardError, match="no finite code"):
        save_codes(path, bad, info())
    assert path.read_bytes() == before
    with pytest.raises(pf.PushforwardError, match=r"ends in \.safetensors"):
        save_codes(tmp_path / "codes.png", code(), info())
    assert [p.name for p in tmp_path.iterdir()] == ["codes.safetensors"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (formula(Langevin()), "for process 'vp', not 'langevin'"),
        (formula(VP(beta_max=19.0)), "'vp' with other parameters"),
        (formula(shape=(3, 3, 2)), r"shape \(1, 3, 2\) an image; model 'formula' needs \(3, 3, 2\)"),
    ],
    ids=["process", "parameters", "shape"],
)
def test_codes_of_another_model_are_refused(tmp_path, model, message):
    path = tmp_path / "codes.safetensors"
    save_codes(path, code(), info())
    found, head = load_codes(path)
    check_codes(found, head, formula())
    check_codes(code(), info(), formula())  # before a way through JSON, too
    with pytest.raises(pf.PushforwardError, match=message):
        check_codes(found, head, model)


def test_statistics_of_normal_numbers():
    """200 images of 256 numbers: 4 deviations of each estimate; 5 % rejected, give or take 4 deviations of a coin."""
    z = normal(200, 1, 16, 16)
    found = statistics(z)
    size = z.numel() ** 0.5
    assert abs(found["mean"]) < 4 / size
    assert abs(found["std"] - 1) < 4 / (2**0.5 * size)
    assert abs(found["horizontal"]) < 4.2 / size
    assert abs(found["vertical"]) < 4.2 / size
    assert found["p_value"] > 1e-3
    assert abs(found["rejected"] - 0.05) < 4 * (0.05 * 0.95 / 200) ** 0.5
    assert len(found["images"]) == 200
    assert found["images"][3]["mean"] == pytest.approx(float(z[3].mean()), abs=1e-12)
    assert found["images"][3]["std"] == pytest.approx(float(z[3].std(correction=0)), abs=1e-12)


@pytest.mark.parametrize(
    ("spoil", "least"),
    [(lambda z: 0.66 * z, 0.95), (lambda z: z + 0.5, 0.95), (lambda z: z.sign(), 0.95), (lambda z: z, 0.0)],
    ids=["narrow", "shifted", "two points", "normal"],
)
def test_the_test_of_normality_finds_what_is_not(spoil, least):
    """Against N(0, 1), so that mean and deviation count, not the shape alone."""
    found = statistics(spoil(normal(20, 1, 16, 16)))
    assert found["rejected"] >= least
    assert (found["p_value"] < 1e-6) == (least > 0)


@pytest.mark.parametrize("rho", [0.6, -0.4])
def test_neighbours(rho):
    """Correlation `rho` along rows, none along columns, and the other way; 80,000 values, 8 deviations."""
    drawn = normal(40, 2, 32, 32)
    rows = drawn.clone()
    for i in range(1, 32):
        rows[..., i] = rho * rows[..., i - 1] + (1 - rho**2) ** 0.5 * drawn[..., i]
    found, turned = statistics(rows), statistics(rows.mT)
    assert found["horizontal"] == pytest.approx(rho, abs=0.03)
    assert found["vertical"] == pytest.approx(0, abs=0.03)
    assert turned["vertical"] == pytest.approx(found["horizontal"], abs=1e-12)
    assert turned["horizontal"] == pytest.approx(found["vertical"], abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "horizontal", "vertical"),
    [((5,), False, False), ((5, 7), False, False), ((5, 2, 9), True, False), ((5, 2, 1, 9), True, False),
     ((5, 2, 4, 3, 3), True, True)],
)  # fmt: skip
def test_statistics_of_codes_of_any_shape(shape, horizontal, vertical):
    found = statistics(normal(*shape))
    assert (found["horizontal"] is not None) == horizontal
    assert (found["vertical"] is not None) == vertical
    assert len(found["images"]) == 5
    json.dumps(found)


def test_neighbours_by_hand():
    """Values 1, 2, 3 less their mean are -1, 0, 1, whose neighbours' products are 0; on a checkerboard all are -1."""
    assert statistics(torch.tensor([[[1.0, 2.0, 3.0]]]))["horizontal"] == 0
    board = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])
    assert statistics(board)["horizontal"] == statistics(board)["vertical"] == -1
    assert statistics(torch.ones(1, 1, 2, 2))["horizontal"] is None

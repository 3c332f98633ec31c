"""Latencies measured, kept and used to choose how a plan is run."""

import json
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel
from pushforward.execute import autotune as module
from pushforward.execute.autotune import Latency, choose, measure, measured, read, rounds_expected, write
from pushforward.execute.distributed import Sharded
from pushforward.linear import VP
from pushforward.model import Network
from pushforward.plan import SOLVERS, Plan, grid
from support.helpers import FIELD, PROCESSES, normal

SIZES = tuple(2**i for i in range(10))
GPU = Latency(SIZES, tuple(0.02 + 1e-5 * b for b in SIZES))
CPU = Latency(SIZES, tuple(0.01 * b for b in SIZES))

pytestmark = pytest.mark.filterwarnings("ignore:The network is told times from 0 to 1:UserWarning")  # it ignores them


class Net(nn.Module):
    """A network with parameters that counts its calls."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.calls: list[int] = []

    def forward(self, u: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        self.calls.append(len(u))
        return u if condition is None else u + condition.view(-1, 1, 1, 1)


@lru_cache
def plan_of(steps: int, solver: str = "ddim") -> Plan:
    return SOLVERS[solver](VP(), grid.uniform(VP(), steps))


def waiting(seconds: float, each: float = 0.0, fails_above: int | None = None) -> Function:
    def wait(u: Tensor, t: float) -> Tensor:
        if fails_above is not None and len(u) > fails_above:
            raise torch.OutOfMemoryError("made up")
        time.sleep(seconds + each * len(u))
        return u

    return Function(wait)


LIKE = torch.zeros(2, 1, *FIELD)


def test_seconds_are_interpolated_and_larger_calls_are_split() -> None:
    latency = Latency((1, 2, 8), (1.0, 2.0, 5.0))
    rows = [0, 0.5, 1, 1.5, 2, 4, 8, 9, 20]
    assert [latency.seconds(r) for r in rows] == [0, 1, 1, 1.5, 2, 3, 5, 6, 13]
    assert latency.seconds(8, most=2) == 8
    assert latency.seconds(5, most=2) == 5
    assert latency.seconds(9, most=100) == 6


def test_two_ranks_answer_twice_the_rows_in_the_same_time() -> None:
    latency = Latency((1, 4), (1.0, 2.0))
    for rows in (1, 2, 4, 8, 40):
        assert latency.shared(2).seconds(2 * rows) == latency.seconds(rows)


@pytest.mark.parametrize(
    ("batches", "seconds"),
    [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((0, 1), (1.0, 1.0)), ((1,), (0.0,)), ((1,), (float("nan"),))],
)
def test_latencies_that_cannot_be_are_refused(batches: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(PushforwardError, match="increasing batch sizes"):
        Latency(batches, seconds)


def test_rounds_are_as_measured_and_never_more_than_calls() -> None:
    """8, 9 and 10 rounds within half a round, which is how well they are known."""
    for nfe, rounds in ((50, 8), (100, 9), (1000, 10)):
        assert abs(rounds_expected(nfe) - rounds) <= 0.56
    assert [rounds_expected(nfe) for nfe in (1, 2, 3)] == [1, 2, 3]
    assert rounds_expected(100, 1e-5) > rounds_expected(100) + 2
    assert rounds_expected(100, 10.0) >= 1


@pytest.mark.parametrize("steps", [50, 100, 1000])
def test_where_rows_are_free_all_steps_run_at_once(steps: int) -> None:
    choice = choose(plan_of(steps), GPU, 1)
    assert isinstance(choice.method, Parallel)
    assert choice.seconds["sequential"] == pytest.approx(steps * GPU.seconds(1))
    assert min(choice.seconds.values()) < choice.seconds["sequential"] / 4
    assert "times as fast" in choice.reason
    assert "\n" not in choice.reason


@pytest.mark.parametrize(
    ("solver", "steps"), [(name, 8) for name in SOLVERS] + [("ddim", n) for n in (1, 2, 3, 5, 20, 50)]
)
def test_where_every_row_costs_the_same_steps_run_one_after_another(solver: str, steps: int) -> None:
    plan = plan_of(steps, solver)
    if plan.implicit:
        assert choose(plan, CPU, 2).method is not None
        return
    choice = choose(plan, CPU, 2)
    assert choice.method is None
    assert choice.reason.startswith("parallel would take ")
    assert choice.reason.endswith("; running sequentially")
    assert f"{2 * plan.nfe} evaluations at once cost" in choice.reason


def test_the_reason_gives_the_numbers_of_the_table() -> None:
    """All by hand: 100 calls of 1 s; at once 5 rounds of 60 rows at 40 s, 5 of 80% of 50 at 1.3, of 90% of 25 at 2."""
    linear = Latency((1, 200), (1.0, 1.0 + 199 * 39 / 59))
    choice = choose(plan_of(100), linear, 1, rounds=lambda nfe, tolerance: 5.0)
    expected = {"sequential": 100.0, "parallel": 5 * linear.seconds(60), "window 50": 6.5 * linear.seconds(40),
                "window 25": 10 * linear.seconds(22.5)}  # fmt: skip
    assert linear.seconds(60) == pytest.approx(40)
    assert choice.seconds == pytest.approx(expected)
    least = min(s for name, s in expected.items() if name != "sequential")
    assert f"take {least / 100:.2g} times as long" in choice.reason
    assert f"100 evaluations at once cost {linear.seconds(100):.2g} times one" in choice.reason


def test_a_window_is_chosen_where_only_so_many_rows_are_free() -> None:
    """Up to 32 rows cost nothing more, beyond them much: then 25 steps at a time are the most that are free."""
    knee = Latency((1, 32, 64), (1.0, 1.0, 8.0))
    choice = choose(plan_of(100), knee, 1)
    assert choice.method is not None
    assert choice.method.window == 25
    assert "window 25 steps wide" in choice.reason


@pytest.mark.parametrize(("given", "expected"), [(None, 512), (64, 64), (4000, 512)])
def test_calls_are_no_larger_than_measured(given: int | None, expected: int) -> None:
    choice = choose(plan_of(1000), Latency(SIZES, (1e-3,) * 10), 4, method=Parallel(max_rows=given, tolerance=1e-2))
    assert choice.method is not None
    assert choice.method.max_rows == expected
    assert choice.method.tolerance == 1e-2
    calls = 0.6 * 4000 / expected * 1e-3 * rounds_expected(1000, 1e-2)
    assert choice.seconds["parallel"] == pytest.approx(calls, rel=0.2)


def test_small_calls_are_not_limited() -> None:
    choice = choose(plan_of(50), GPU, 1)
    assert choice.method is not None
    assert choice.method.max_rows is None


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(PushforwardError, match="at least 1 image; got 0"):
        choose(plan_of(5), GPU, 0)


@pytest.mark.parametrize("name", list(PROCESSES))
def test_measuring_asks_every_size_on_every_process(name: str) -> None:
    process = PROCESSES[name]
    net = Net()
    like = normal(2, process.blocks, *FIELD)
    found = measure(Network(net, condition=torch.tensor([5.0, 7.0])), process, like, (1, 2, 4))
    assert found.batches == (1, 2, 4)
    assert set(net.calls) == {1, 2, 4}
    assert net.calls.count(1) >= 2  # one to warm up
    assert sum(found.seconds_a_call) < 1


def test_measured_seconds_are_those_that_pass() -> None:
    """A call waits 10 ms and 5 ms a row: never less, and more only as a busy machine makes it."""
    found = measure(waiting(0.01, 0.005), VP(), LIKE, (1, 2, 4))
    for rows, seconds in zip(found.batches, found.seconds_a_call, strict=True):
        assert 0.01 + 0.005 * rows <= seconds < 0.1 + 0.005 * rows


def test_measuring_ends_with_a_slow_call_and_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW", 0.05)
    assert measure(waiting(0.06), VP(), LIKE).batches == (1,)
    monkeypatch.setattr(module, "BUDGET", 0.3)
    monkeypatch.setattr(module, "SLOW", 10.0)
    began = time.perf_counter()
    found = measure(waiting(0.0, 0.01), VP(), LIKE)
    assert 1 < found.largest < 64
    assert time.perf_counter() - began < 2.0


def test_measuring_ends_where_memory_does_but_not_before_the_first_size() -> None:
    assert measure(waiting(0.0, fails_above=4), VP(), LIKE).batches == (1, 2, 4)
    with pytest.raises(torch.OutOfMemoryError):
        measure(waiting(0.0, fails_above=0), VP(), LIKE)


def test_a_network_is_measured_once(tmp_path: Path) -> None:
    net = Net()
    first = measured(Network(net), VP(), LIKE, (1, 2, 4), tmp_path)
    asked = len(net.calls)
    assert asked > 0
    assert measured(Network(net), VP(), LIKE, (1, 2, 4), tmp_path) == first
    assert measured(Sharded(Network(net)), VP(), LIKE, (1, 2, 4), tmp_path) == first
    assert len(net.calls) == asked
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("what", ["shape", "dtype", "parameters", "class", "guidance", "process", "threads"])
def test_anything_that_changes_the_time_is_measured_anew(what: str, tmp_path: Path) -> None:
    class Other(Net):
        pass

    measured(Network(Net()), VP(), LIKE, (1,), tmp_path)
    net = {"parameters": Net(8), "class": Other()}.get(what, Net())
    like = {"shape": torch.zeros(1, 1, 4, 4), "dtype": LIKE.double()}.get(what, LIKE)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1 if what == "threads" else threads)
        guidance = 2.0 if what == "guidance" else 1.0
        measured(
            Network(net, guidance=guidance), PROCESSES["flow"] if what == "process" else VP(), like, (1,), tmp_path
        )
    finally:
        torch.set_num_threads(threads)
    assert net.calls
    assert len(list(tmp_path.iterdir())) == 2


DAMAGED = ["", "{", "[]", "3", '{"batches": [1]}', '{"batches": [2, 1], "seconds": [1, 1]}',
           '{"batches": [1], "seconds": [NaN]}', '{"batches": null, "seconds": 1}', "\x00\xff"]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_measured_anew(text: str, tmp_path: Path) -> None:
    net = Net()
    measured(Network(net), VP(), LIKE, (1, 2), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(text.encode("latin-1"))
    net.calls.clear()
    found = measured(Network(net), VP(), LIKE, (1, 2), tmp_path)
    assert net.calls
    assert list(tmp_path.iterdir()) == [path]
    assert read(path) == found


def test_a_formula_is_not_taken_for_another(tmp_path: Path) -> None:
    measured(Function(lambda u, t: u), VP(), LIKE, (1,), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_gives_back_what_was_written_and_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "latency.json"
    write(CPU, path, about={"device": "made up"})
    assert read(path) == CPU
    assert json.loads(path.read_text())["about"] == {"device": "made up"}
    assert list(path.parent.iterdir()) == [path]


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    """A file in the place of the folder stops even root."""
    (tmp_path / "file").write_text("")
    found = measured(Network(Net()), VP(), LIKE, (1,), tmp_path / "file")
    assert found.batches == (1,)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured(Network(Net()), VP(), LIKE, (1,))
    assert len(list((tmp_path / "pushforward").glob("latency-*.json"))) == 1
    for useless in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert module.cache_folder() == tmp_path / ".cache" / "pushforward"

"""Network calls shared over two processes, started as users do, and what is checked in one."""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pushforward as pf
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, parallel, run
from pushforward.execute import distributed as across
from pushforward.execute.distributed import Sharded
from pushforward.linear import VP, Process
from pushforward.model import Network
from pushforward.plan import SOLVERS, Plan, grid
from support.helpers import FIELD, PROCESSES, normal

LABELS = torch.tensor([0.5, -0.5, 1.5])
ROWS = (1, 2, 3, 8, 9)
PIPELINES = {"stable_diffusion": "unet", "flux": "transformer"}
SOLVED = ("ddim", "ddpm", "heun")


def plan_of(process: Process, solver: str) -> Plan:
    return SOLVERS[solver](process, grid.uniform(process, 6))


def network() -> Network:
    """A smooth network that depends on its label, so that rows must keep theirs."""

    def answer(u: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        bent = torch.tanh(0.3 * u[:, :1])
        return bent if label is None else bent * label.to(u).view(-1, *[1] * (u.ndim - 1))

    return Network(answer, prediction="sample", condition=LABELS)


class Counting:
    """A denoiser that keeps how many rows it was asked."""

    def __init__(self, denoiser: Any, fails: bool = False):
        self.denoiser, self.fails, self.rows = denoiser, fails, []

    def at(self, process: Process, times: Tensor, like: Tensor) -> Any:
        ask = self.denoiser.at(process, times, like)

        def counted(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            self.rows.append(len(u))
            if self.fails:
                raise torch.OutOfMemoryError("made up")
            return ask(k, u, of)

        return counted


def solved(process: Process, solver: str, denoiser: Any) -> tuple[Tensor, Tensor, list[int]]:
    """States of all steps at once, the last state one after another, and the rows of every call."""
    plan = plan_of(process, solver)
    start = normal(3, process.blocks, *FIELD)
    noises = {k: normal(*start.shape, seed=k) for k in plan.noises}
    calls: list[int] = []
    solution = parallel(plan, denoiser, start, noise=noises.__getitem__, method=Parallel(tolerance=1e-12),
                        callback=lambda r: calls.append(r.nfe))  # fmt: skip
    return solution.states, run(plan, denoiser, start, noise=noises.__getitem__), calls


def asked(denoiser: Any, rows: int, *, labelled: bool = True) -> Tensor:
    """One call of so many rows at mixed times; one time and the batch's own labels if not `labelled`."""
    process = VP()
    times = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    like = normal(3, 1, *FIELD)
    ask = denoiser.at(process, times, like)
    if not labelled:
        return ask(1, like)
    return ask(torch.arange(rows) % 3, normal(rows, 1, *FIELD, seed=1), (torch.arange(rows) + 1) % 3)


def refusal(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def everything() -> dict[str, Any]:
    """What one of two ranks finds, as `test_...` below expect it."""
    main = across.join()
    assert across.join() is main
    rank = dist.get_rank()
    found: dict[str, Any] = {"main": main, "size": across.size(), "same": across.same({"rank": rank})}
    for rows in ROWS:
        counting = Counting(network())
        found[f"answer {rows}"] = asked(Sharded(counting), rows)
        found[f"rows {rows}"] = counting.rows
    found["answer plain"] = asked(Sharded(network()), 3, labelled=False)
    found["answer half"] = asked_in(torch.bfloat16)
    for name, process in PROCESSES.items():
        for solver in SOLVED:
            counting = Counting(network())
            found[f"solved {name} {solver}"] = (*solved(process, solver, Sharded(counting)), counting.rows)
    for kind in PIPELINES:
        found[f"piped {kind}"] = piped(kind)
    found["failed"] = refusal(lambda: asked(Sharded(Counting(network(), fails=rank == 1)), 4))
    found["after"] = asked(Sharded(network()), 4)
    found["drew apart"] = refusal(lambda: Sharded(network()).at(VP(), torch.ones(1).double(), normal(2, 1, seed=rank)))
    found["ran apart"] = refusal(lambda: asked(Sharded(network()), 4 + rank))
    found["gradient"] = refusal(gradient)
    first = dist.new_group([0])
    found["left out"] = refusal(lambda: across.size(first))
    if main:
        found["alone"] = asked(Sharded(network(), first), 4)
    return found


def piped(kind: str) -> tuple[Tensor, list[int]]:
    """Images of a tiny pipeline, all steps at once, and the rows of its network's calls."""
    from support import pipelines

    torch.set_num_threads(1)
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as folder:
        pipe = getattr(pipelines, kind)(Path(folder))
    model = pf.from_pipeline(pipe.to(torch.float64), prompt="a fox", guidance_scale=3.0, height=8, width=8)
    rows: list[int] = []
    pipe.components[PIPELINES[kind]].register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    images = model.sample(3, solver="ddim", steps=4, parallel=True)
    return images, rows[:-3]  # without those that bring the images out, in which the network is passed over


def asked_in(dtype: torch.dtype) -> Tensor:
    like = normal(3, 1, *FIELD).to(dtype)
    return Sharded(network()).at(VP(), torch.tensor([0.5], dtype=torch.float64), like)(0, like)


def gradient() -> None:
    u = normal(3, 1, *FIELD).requires_grad_()
    Sharded(network()).at(VP(), torch.tensor([0.5], dtype=torch.float64), u)(0, u)


def dies() -> None:
    """Rank 1 is killed while rank 0 waits for its answers."""
    if not across.join():
        os._exit(3)
    asked(Sharded(network()), 4)


def torchrun(what: str, folder: Path, limit: float) -> subprocess.CompletedProcess[str]:
    """This file under torchrun with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               __file__, what, str(folder)]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun("everything", folder, 280)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_join_and_one_is_the_main_one(ranks: list[dict[str, Any]]) -> None:
    assert [r["main"] for r in ranks] == [True, False]
    assert [r["size"] for r in ranks] == [2, 2]
    assert [r["same"] for r in ranks] == [{"rank": 0}, {"rank": 0}]


@pytest.mark.parametrize("rows", ROWS)
def test_each_rank_is_asked_half_the_rows_and_has_all_answers(rows: int, ranks: list[dict[str, Any]]) -> None:
    """To 1e-12: a row's numbers differ by rounding only, for the size of the batch that it is computed in."""
    half = -(-rows // 2)
    assert ranks[0][f"rows {rows}"] == [half]
    assert ranks[1][f"rows {rows}"] == ([rows - half] if rows > 1 else [])
    assert ranks[0][f"answer {rows}"].equal(ranks[1][f"answer {rows}"])
    torch.testing.assert_close(ranks[0][f"answer {rows}"], asked(network(), rows), rtol=0, atol=1e-12)


def test_one_time_for_all_rows_and_the_batchs_own_labels(ranks: list[dict[str, Any]]) -> None:
    """To 1e-12: rounding."""
    assert ranks[0]["answer plain"].equal(ranks[1]["answer plain"])
    torch.testing.assert_close(ranks[0]["answer plain"], asked(network(), 3, labelled=False), rtol=0, atol=1e-12)
    assert ranks[0]["answer half"].dtype == torch.bfloat16
    assert ranks[0]["answer half"].equal(ranks[1]["answer half"])


@pytest.mark.parametrize("solver", SOLVED)
@pytest.mark.parametrize("name", list(PROCESSES))
def test_a_plan_gives_what_it_gives_in_one_process(name: str, solver: str, ranks: list[dict[str, Any]]) -> None:
    """To 1e-9 of the largest value: rounding, which the rounds may enlarge."""
    first, second = (r[f"solved {name} {solver}"] for r in ranks)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
    counting = Counting(network())
    states, last, calls = solved(PROCESSES[name], solver, counting)
    scale = float(states.abs().max())
    torch.testing.assert_close(first[0], states, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(first[1], last, rtol=0, atol=1e-9 * scale)
    whole = first[2] + [3] * plan_of(PROCESSES[name], solver).nfe
    assert len(first[2]) > 1
    assert first[3] == [-(-n // 2) for n in whole]
    assert second[3] == [n // 2 for n in whole if n > 1]
    assert calls == first[2]


@pytest.mark.parametrize("kind", PIPELINES)
def test_rounds_of_a_pipeline_are_shared(kind: str, ranks: list[dict[str, Any]]) -> None:
    """Images are one process's, to rounding; each rank asks its pipeline about its half of a round's rows."""
    (first, some), (second, others) = (r[f"piped {kind}"] for r in ranks)
    whole, rows = piped(kind)
    assert first.equal(second)
    torch.testing.assert_close(first, whole, rtol=0, atol=1e-5)
    copies = 2 if kind == "stable_diffusion" else 1
    assert some == [copies * -(-n // copies // 2) for n in rows]
    assert others == [n - m for n, m in zip(rows, some, strict=True) if n > m]
    assert max(some) > copies


def test_a_network_that_fails_on_one_rank_stops_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["failed"] == ("PushforwardError: The network failed on rank 1 of 2; its own message says why.")
    assert ranks[1]["failed"] == "OutOfMemoryError: made up"
    assert ranks[0]["after"].equal(ranks[1]["after"])  # and they can go on together


def test_ranks_that_differ_are_told(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "same plan" in found["drew apart"]
        assert "[4, 5] rows" in found["ran apart"]
        assert "carry no gradients" in found["gradient"]


def test_a_rank_outside_the_group_is_told(ranks: list[dict[str, Any]]) -> None:
    """To 1e-12: rounding."""
    assert ranks[0]["left out"] == "nothing was raised"
    assert "Rank 1 is not in the process group" in ranks[1]["left out"]
    torch.testing.assert_close(ranks[0]["alone"], asked(network(), 4), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_wait(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert torchrun("dies", tmp_path, 280).returncode != 0
    assert time.perf_counter() - began < 120  # far below the ten minutes that ranks wait for one another


def leaves() -> None:
    across.join()
    importlib.import_module("torch.distributed.nn")  # as libraries do; its functions take the group as a default
    linger()


def trains() -> None:
    from pushforward.training.config import TrainConfig
    from pushforward.training.trainer import train
    from support.training import TINY, some_data

    with tempfile.TemporaryDirectory() as folder:
        train(TrainConfig(steps=2, **TINY), some_data(), Path(folder) / "model")  # type: ignore[arg-type]
    linger()


def linger() -> None:
    """Leave a thread of gloo with an object of Python's, as happens now and then by itself."""
    time.sleep(dist.get_rank())  # the first rank lets go of its tensor while its thread waits for the second's
    mine = torch.zeros(1)
    mine.lingers = Lingering()  # type: ignore[attr-defined]
    dist.all_gather([torch.zeros(1), torch.zeros(1)], mine, async_op=True)
    del mine
    time.sleep(2 - dist.get_rank())


class Lingering:
    """Takes a while to be let go."""

    def __del__(self) -> None:
        for _ in range(300):
            time.sleep(0.01)


@pytest.mark.parametrize("what", ["leaves", "trains"])
def test_processes_that_leave_wait_for_their_threads(what: str, tmp_path: Path) -> None:
    """A thread that comes back to Python after its end would abort the process."""
    done = torchrun(what, tmp_path, 120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No torchrun, whoever started the tests; and no process group afterwards."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_without_torchrun_nothing_is_shared() -> None:
    assert across.join()
    assert not dist.is_initialized()
    assert across.size() == 1
    assert across.same("value") == "value"
    u = normal(3, 1, *FIELD).requires_grad_()
    times = torch.tensor([0.5], dtype=torch.float64)
    answer = Sharded(network()).at(VP(), times, u)(0, u)
    assert answer.equal(network().at(VP(), times, u)(0, u))
    assert answer.requires_grad


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_shares_nothing() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert across.join()
    assert asked(Sharded(network()), 4).equal(asked(network(), 4))


@pytest.mark.usefixtures("alone")
def test_torchrun_without_join_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(PushforwardError, match=r"call `execute.distributed.join\(\)` first"):
        asked(Sharded(network()), 4)


@pytest.mark.usefixtures("alone")
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(PushforwardError, match="use --nproc-per-node 1"):
        across.join()


if __name__ == "__main__":
    result = globals()[sys.argv[1]]()
    torch.save(result, Path(sys.argv[2]) / f"{dist.get_rank()}.pt")

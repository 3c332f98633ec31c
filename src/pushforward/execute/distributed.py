"""A batch of time steps shared over several processes: every rank asks its own part of the network's rows.

An executor runs the same on every rank, on the same states, so every rank knows all rows of a call. `Sharded` has each
ask an equal share of them and gathers the answers, so that every rank goes on with the same bits. It is a denoiser like
any other, and no executor knows of it:

    main = join()                                         # started by `torchrun --nproc-per-node 2 script.py`
    solution = parallel(plan, Sharded(denoiser), start)   # the same `start` on every rank
    if main: ...

A call takes as long as one of `rows / ranks` rows and the gathering of the answers. Ranks must be machines alike: what
the executor does between the calls, it does on each rank, to the same bits only on the same hardware.

A rank whose network raises tells the others, and all of them raise. A rank that dies outright ends the others' wait:
`torchrun` stops them, `gloo` notices the broken connection, and any wait ends after `TIMEOUT`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pushforward.data.files import digest
from pushforward.denoiser import Ask, Wrapper
from pushforward.errors import PushforwardError
from pushforward.linear import Process

TIMEOUT = timedelta(hours=1)  # the longest that ranks of `join` wait for one another
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sharded(Wrapper):
    """A denoiser that shares the rows of each call over the ranks of a process group.

    With no process group, or a single rank, it is the denoiser itself. Answers carry no gradients.

    Args:
        inner: the network, on every rank with the same weights and condition.
        group: whose ranks share; all by default.
    """

    group: dist.ProcessGroup | None = None

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`.

        Raises:
            PushforwardError: there is no process group although `torchrun` started several processes, this process is
                not in the group, or the ranks were given different states or times.
        """
        ranks = size(self.group)
        ask = self.inner.at(process, times, like)
        if ranks == 1:
            return ask
        rank = dist.get_rank(self.group)
        seen: list[object] = [None] * ranks
        dist.all_gather_object(seen, digest(times, like), self.group)
        if len(set(seen)) > 1:
            raise PushforwardError(
                f"The {ranks} ranks ask about different states or times; give every rank the same plan, and a start "
                "and noises drawn from the same seed."
            )

        def share(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            if u.requires_grad and torch.is_grad_enabled():
                raise PushforwardError(
                    "Answers gathered from several ranks carry no gradients; use the denoiser without `Sharded`."
                )
            rows = -(-len(u) // ranks)
            mine = slice(rank * rows, min((rank + 1) * rows, len(u)))
            own = u.new_zeros(rows, *u.shape[1:])
            failure: Exception | None = None
            if mine.start < mine.stop:
                level = k[mine] if isinstance(k, Tensor) and k.ndim else k
                image = torch.arange(len(u), device=u.device) if of is None else of
                try:
                    with torch.no_grad():
                        own[: mine.stop - mine.start] = ask(level, u[mine], image[mine])
                except Exception as error:  # the others must hear of it before it goes on
                    failure = error
            self._agree(len(u), failure, u.device)
            every = [torch.empty_like(own) for _ in range(ranks)]
            dist.all_gather(every, own, self.group)
            return torch.cat(every)[: len(u)]

        return share

    def _agree(self, rows: int, failure: Exception | None, device: torch.device) -> None:
        """Raise on every rank if one failed, or if they are not at the same call."""
        mine = torch.tensor([rows, failure is not None], device=device)
        every = [torch.empty_like(mine) for _ in range(size(self.group))]
        dist.all_gather(every, mine, self.group)
        if failure is not None:
            raise failure
        asked, failed = torch.stack(every).T.tolist()
        if any(failed):
            raise PushforwardError(
                f"The network failed on rank {failed.index(1)} of {len(failed)}; its own message says why."
            )
        if len(set(asked)) > 1:
            raise PushforwardError(
                f"The ranks ran apart: they ask about {asked} rows; share only over hardware that is the same."
            )


def join(device: str = "auto") -> bool:
    """Join the processes that `torchrun` started, if it did; later calls change nothing.

    On GPUs, each process takes the one of its local rank as its current device, so that "cuda" means that.

    Args:
        device: "cpu" to leave GPUs alone; anything else takes them if there are any.

    Returns:
        Whether this is the main rank, which alone should print and write files.

    Raises:
        PushforwardError: there are more processes than GPUs.
    """
    if not dist.is_available():
        return True
    if not dist.is_initialized():
        if not _launched():
            return True
        cuda = torch.cuda.is_available() and device != "cpu"
        if cuda:
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise PushforwardError(
                    f"Local rank {local} has no GPU of its own, there being {gpus}; use --nproc-per-node {gpus}."
                )
            torch.cuda.set_device(local)
        leave_at_exit()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    return dist.get_rank() == 0


def leave_at_exit() -> None:
    """See that a process group, to be made after this call, ends before Python does.

    A thread of a group that comes back to Python after its end aborts the process.
    """
    if dist.is_available():
        importlib.import_module("torch.distributed.nn.functional")  # imported later, its defaults would keep the group
        atexit.register(_leave)


def size(group: dist.ProcessGroup | None = None) -> int:
    """Return how many ranks share a call: 1 without a process group.

    Raises:
        PushforwardError: there should be a process group, or this process should be in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None or (_launched() and int(os.environ["WORLD_SIZE"]) > 1):
            raise PushforwardError(
                "There is no process group to share network calls over; call `execute.distributed.join()` first."
            )
        return 1
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise PushforwardError(
            f"Rank {dist.get_rank()} is not in the process group given to `Sharded`; call it on the group's ranks only."
        )
    return ranks


def same(value: _T, group: dist.ProcessGroup | None = None) -> _T:
    """Return the first rank's `value`, anything that can be pickled, on every rank: what must not differ, as times.

    Raises:
        PushforwardError: as `size`.
    """
    ranks = size(group)
    if ranks == 1:
        return value
    every: list[_T | None] = [None] * ranks
    dist.all_gather_object(every, value, group)
    return every[0]  # type: ignore[return-value]


def _launched() -> bool:
    """Whether `torchrun`, or a launcher that sets the same variables, started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # what trained in parallel holds the group, and itself

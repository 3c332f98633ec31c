"""When a training stops and saves: at a user's or a machine's request, and by the clock.

A first SIGINT (Ctrl-C), SIGTERM or SIGHUP is a request: the work goes on to a place from which it can be continued. A
second one ends the process there and then; files are written whole or not at all, so it damages none.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

__all__ = ["Agreement", "Clock", "Interrupted", "Stop", "stopping"]

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
FIRST, EVERY = 30.0, 180.0  # seconds of training to the first checkpoint or picture, and between others
SHARE = 0.02  # of the time that they may cost
_LATE = 2  # steps after which processes act on what they told one another: reading it sooner would have GPUs wait
_ECHO = 1.0  # seconds in which a launcher passes on a Ctrl-C that reached its workers already


class Interrupted(KeyboardInterrupt):
    """A training that stopped at a request, with all of its work saved; the message says where and how to go on.

    Args:
        message: for the user.
        number: number of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """What a process ends with after it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class Stop:
    """A request to stop, as a handler of signals; its `number` is that of the signal, 0 without a request."""

    def __init__(self) -> None:
        self.number = 0
        self._when = 0.0
        self._echo = _ECHO if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Note the first request; end the process at the second."""
        now = time.monotonic()
        if not self.number:
            self.number, self._when = number, now
        elif now - self._when >= self._echo:
            os._exit(128 + number)


@contextmanager
def stopping() -> Iterator[Stop]:
    """While the block runs, signals are requests to it (in the main thread: others get no signals).

    with stopping() as stop:
        while not stop.number:
            ...
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    hung = getattr(signal, "SIGHUP", None)  # ignored under nohup, and so it stays
    numbers = [n for n in SIGNALS if n != hung or signal.getsignal(n) is not signal.SIG_IGN]
    before = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Agreement:
    """The same time and the same request to stop on all processes, so that all stop at the same step.

    Args:
        accelerator: accelerator of the processes.
        stop: the request to this process.
        seconds: of training, before any are agreed on.
    """

    def __init__(self, accelerator: Any, stop: Stop, seconds: float) -> None:
        self.accelerator, self.stop, self.seconds = accelerator, stop, seconds
        self.number = 0  # of the signal, once all processes know it
        self._told = deque[Tensor]()  # seconds and signals, of the latest steps

    def agree(self, seconds: float, *, now: bool = False) -> float:
        """Tell the others this process's time and request; the time that all go by, of some steps ago or of `now`."""
        if self.accelerator.num_processes == 1:
            return seconds
        mine = torch.tensor([[seconds, self.stop.number]], device=self.accelerator.device)
        self._told.append(self.accelerator.gather(mine).amax(0))
        while len(self._told) > (0 if now else _LATE):
            self.seconds, number = self._told.popleft().tolist()
            self.number = int(number)
        return self.seconds

    @property
    def stopped(self) -> bool:
        """Whether all processes know of a request to stop."""
        if self.accelerator.num_processes == 1:
            self.number = self.stop.number
        return self.number != 0


class Clock:
    """When something is due by the clock: soon for the first time, then at such times that it costs little.

    Args:
        now: seconds, of any clock.
    """

    def __init__(self, now: float):
        self.due = now + FIRST

    def done(self, now: float, cost: float) -> None:
        """It was done, at a cost of so many seconds."""
        self.due = now + max(EVERY, cost / SHARE)

"""When a training stops and saves: at a user's or a machine's request, and by the clock.

A first SIGINT (Ctrl-C), SIGTERM or SIGHUP is a request: the work goes on to a place from which it can be continued. A
second one ends the process there and then; files are written whole or not at all, so it damages none.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Clock", "Interrupted", "Stop", "stopping"]

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
FIRST, EVERY = 30.0, 180.0  # seconds of training to the first checkpoint or picture, and between others
SHARE = 0.02  # of the time that they may cost
_ECHO = 1.0  # seconds in which a launcher passes on a Ctrl-C that reached its workers already


class Interrupted(KeyboardInterrupt):
    """A training that stopped at a request, with all of its work saved; the message says where and how to go on.

    Args:
        message: for the user.
        number: of the signal.
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

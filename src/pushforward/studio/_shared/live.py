"""Work that shows what it does: a function with a callback, as a generator of what the callback is told."""

from __future__ import annotations

from collections.abc import Callable, Generator
from queue import Queue
from threading import Event, Lock, Thread
from typing import Generic, TypeVar

__all__ = ["Stopped", "live"]

T = TypeVar("T")
_WORKING = Lock()  # one at a time: models are not made for several callers


class Stopped(Exception):
    """Nobody looks any more; the callback raises it to end the work."""


class _End(Generic[T]):
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def live(work: Callable[[Callable[[T], None]], T]) -> Generator[T, None, None]:
    """Yield what `work(tell)` tells, always the latest, and then what it returns.

    The work runs in a thread of its own. If the generator is closed, the next call of `tell` raises `Stopped`.

    Raises:
        BaseException: what the work raised.
    """
    told: Queue[T | _End[T]] = Queue()
    closed = Event()

    def tell(news: T) -> None:
        if closed.is_set():
            raise Stopped
        told.put(news)

    def run() -> None:
        with _WORKING:
            try:
                tell(work(tell))
                told.put(_End())
            except BaseException as error:
                told.put(_End(error))

    Thread(target=run, daemon=True).start()
    try:
        while True:
            news = told.get()
            while not told.empty() and not isinstance(told.queue[0], _End):
                news = told.get()
            if isinstance(news, _End):
                break
            yield news
    finally:
        closed.set()
    if news.error is not None:
        raise news.error

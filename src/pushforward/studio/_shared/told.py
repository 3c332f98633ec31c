"""Functions of the page: errors become sentences in it, and files are removed once they are handed over."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator
from functools import wraps
from html import escape
from typing import Any

from pushforward.errors import PushforwardError

__all__ = ["sentence", "spoken"]

_NO_MEMORY = ("allocate memory", "out of memory", "array is too big")


def sentence(error: Exception) -> str:
    """What a visitor is told of an error: one sentence, with nothing of the server's files."""
    if isinstance(error, PushforwardError):
        return str(error)
    if isinstance(error, MemoryError) or any(part in str(error) for part in _NO_MEMORY):
        return "There is not enough memory for this: take fewer or smaller images."
    return (
        f"This failed with an error of its own ({type(error).__name__}); the terminal that runs the page shows where."
    )


def spoken(function: Callable[..., Generator[Any, None, None]]) -> Callable[..., Generator[Any, None, None]]:
    """The generator, with its errors told in the page."""

    @wraps(function)
    def told(*arguments: Any) -> Generator[Any, None, None]:
        import gradio as gr

        try:
            yield from function(*arguments)
        except Exception as error:
            if isinstance(error, gr.Error):
                raise
            if not isinstance(error, PushforwardError):
                traceback.print_exc()
            raise gr.Error(escape(sentence(error), quote=False), duration=15, print_exception=False) from None

    return told

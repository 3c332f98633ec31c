"""Functions of the page: errors become sentences in it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Mapping
from functools import wraps
from html import escape
from typing import Any, TypeVar

from pushforward.data.memory import is_lack
from pushforward.errors import PushforwardError

__all__ = ["Updates", "said", "sentence", "spoken"]

LONGEST = 800  # characters of a sentence; it may repeat what a visitor wrote
T = TypeVar("T")
Updates = Generator[dict[Any, Any], None, None]  # new values of outputs


def sentence(error: Exception) -> str:
    """What a visitor is told of an error: one sentence, not too long, with nothing of the server's files."""
    if isinstance(error, PushforwardError):
        says = str(error)
        return says if len(says) <= LONGEST else f"{says[: LONGEST // 2]} … {says[-LONGEST // 2 :]}"
    if is_lack(error):
        return "There is not enough memory for this: take fewer or smaller images."
    return (
        f"This failed with an error of its own ({type(error).__name__}); the terminal that runs the page shows where."
    )


def said(function: Callable[..., T]) -> Callable[..., T]:
    """The function, with its errors told in the page."""

    @wraps(function)
    def told(*arguments: Any) -> T:
        try:
            return function(*arguments)
        except Exception as error:
            raise _shown(error) from None

    return told


def spoken(function: Callable[[Any], Updates], says: Any, none: Mapping[Any, Any]) -> Callable[[Any], Updates]:
    """The generator of updates, with its errors told in the page, and in its output `says`, where they stay.

    Args:
        function: the generator.
        says: the output.
        none: what other outputs are before the first update.
    """

    @wraps(function)
    def told(data: Any) -> Updates:
        yield {says: "Waiting for the model …", **none}
        try:
            yield from function(data)
        except Exception as error:
            yield {says: f"**{escape(sentence(error), quote=False)}**"}
            raise _shown(error) from None

    return told


def _shown(error: Exception) -> Exception:
    """An error as Gradio shows it; what is not ours is printed with all that is known of it."""
    import gradio as gr

    if not isinstance(error, PushforwardError):
        traceback.print_exception(error)
    return gr.Error(escape(sentence(error), quote=False), duration=15, print_exception=False)

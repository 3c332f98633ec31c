"""Keys and messages of watermarks as commands are told them."""

from __future__ import annotations

from typing import Annotated

import typer

from pushforward.data.files import held_by
from pushforward.errors import PushforwardError

__all__ = ["KeyOption", "key_of", "message_of", "shown"]

KeyOption = Annotated[
    str, typer.Option(help="Use this secret: a text, or the file that holds it. It is written nowhere.")
]


def key_of(text: str) -> bytes:
    """The bytes of a key: a file's, without the end of its last line, or the text's.

    Raises:
        PushforwardError: there are none.
    """
    held = held_by(text)
    key = text.encode() if held is None else held.rstrip(b"\r\n")
    if not key:
        raise PushforwardError("The key is empty; give --key some text, or a file that holds some.")
    return key


def message_of(text: str | None) -> bytes | None:
    """The bytes of a message: of a text, or of hexadecimal digits after 0x.

    Raises:
        PushforwardError: it is empty, or these are no such digits.
    """
    if text is None:
        return None
    try:
        message = bytes.fromhex(text[2:]) if text.startswith("0x") else text.encode()
    except ValueError:
        raise PushforwardError(f"--message 0x is followed by pairs of hexadecimal digits; got {text!r}.") from None
    if not message:
        raise PushforwardError("The message is empty; leave --message out to mark images by a key alone.")
    return message


def shown(message: bytes) -> str:
    """A message as `message_of` reads it: as a text, if it is one."""
    try:
        text = message.decode()
    except UnicodeDecodeError:
        text = ""
    return text if text.isprintable() and text and not text.startswith("0x") else f"0x{message.hex()}"

"""Pictures that visitors give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pushforward.errors import PushforwardError
from pushforward.studio._shared.models import Shelf
from pushforward.studio._shared.told import said

if TYPE_CHECKING:
    from torch import Tensor

    from pushforward.verbs import Model

__all__ = ["PIXELS", "Photo", "draw_into", "photo_area", "read_photo"]

PIXELS = 40_000_000


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture, brought to a model's shape.

    Args:
        values: in [-1, 1], `(1, channels, height, width)`.
        number: by which commands number it: it says what the picture shows.
        file: the same as a PNG, which commands read as these values.
    """

    values: Tensor
    number: int
    file: bytes


def photo_area(label: str, elem_id: str) -> Any:
    """Where a picture is dropped, pasted or chosen."""
    import gradio as gr

    area: Any = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"],
                         elem_id=elem_id, format="png", height=220, elem_classes="photo",
                         placeholder="Drop a picture here, or click to choose one.")  # fmt: skip
    # `read_photo` opens the file. Gradio would, too, and where it cannot, tell the visitor where the file lies.
    area.preprocess = lambda given: None if given is None else given.path
    return area


def read_photo(path: str | None, model: Model) -> Photo:
    """Read a picture that was uploaded.

    Args:
        path: where it lies; it is never shown.
        model: whose images' shape it is brought to.

    Raises:
        PushforwardError: no picture, too large a one, one that cannot be read, or a model that takes none.
    """
    import warnings

    from PIL import Image

    from pushforward.data.reading import UNREADABLE, read_image

    shape = model.image_shape or ()
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise PushforwardError(f"Model {model.name!r} does not say the size of its images, so it takes none.")
    if path is None:
        raise PushforwardError("Give a picture first: drop one, or have the model draw one.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
        if width * height > PIXELS:
            raise PushforwardError(
                f"The picture has {width} x {height} pixels; this page takes {PIXELS // 10**6} million at most."
            )
        read = read_image(path, size=(shape[1], shape[2]), channels=shape[0])
    except PushforwardError:  # a ValueError, too
        raise
    except UNREADABLE:
        raise PushforwardError("This file cannot be read as a picture; give a PNG, JPEG or WebP.") from None
    return photo_of(read)


def photo_of(read: Tensor) -> Photo:
    """A picture of bytes, uint8 `(channels, height, width)`."""
    from pushforward.data.pictures import content_number, from_bytes, sheet
    from pushforward.studio._shared.results import png

    values = from_bytes(read)[None]
    return Photo(values, content_number(read), png(sheet(values, smallest=0)))


def draw_into(area: Any, button: Any, shelf: Shelf, model: Any, what: Any, seed: Any, *, step: int = 0) -> None:
    """Have a button draw a picture, for who has none at hand: the model's of a class or prompt, `step` seeds on."""
    from pushforward.data.pictures import sheet
    from pushforward.maps.labels import UNSAID

    @said
    def take(name: str, shows: str | None, of: float) -> Any:
        labels = [shows] if shows else UNSAID
        return sheet(shelf.open(name).sample(1, labels=labels, first=int(of or 0) + step, steps=20), smallest=0)

    button.click(take, [model, what, seed], area, concurrency_id="models", show_progress="minimal",
                 api_visibility="private")  # fmt: skip

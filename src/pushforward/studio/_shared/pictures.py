"""States and images as a page shows them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from pushforward.studio._shared.results import png

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pushforward.verbs import Model

__all__ = ["copying", "embedded", "figures", "picture", "preview", "row", "table", "traces", "viewed"]

# Okabe and Ito's, which the colour-blind tell apart
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")


def viewed(model: Model, states: Tensor) -> Tensor:
    """States `(count, k * channels, *field)` as images, each scaled to their range; of latents, three channels."""
    images = model.process.image(states).detach().float().cpu()
    if images.shape[1] not in (1, 3):
        images = images[:, :3] if images.shape[1] > 3 else images[:, :1]
    return images / images.flatten(1).abs().amax(1).clamp_min(1.0)[:, None, None, None]


def picture(images: Tensor, smallest: int = 96) -> Image.Image:
    """Images `(count, channels, height, width)` in one picture, about square."""
    from pushforward.data.pictures import sheet

    return sheet(images, smallest=smallest)


def preview(images: Tensor) -> Image.Image:
    """The same, but large enough to be looked at: about as high as the controls beside it."""
    across = round(len(images) ** 0.5) or 1
    return picture(images, max(96, 480 // -(-len(images) // across)))


def row(images: Tensor, smallest: int = 0) -> Image.Image:
    """Images side by side, by default in their own pixels."""
    from pushforward.data.pictures import sheet

    return sheet(images, columns=len(images), smallest=smallest)


def embedded(image: Image.Image, says: str, least: int = 0) -> str:
    """An image in HTML, as wide as there is room; `says` is read out where it is not seen.

    Args:
        image: the image.
        says: what it shows.
        least: pixels that it has at least in width.
    """
    data = base64.b64encode(png(image)).decode("ascii")
    style = f"width:100%;min-width:{least}px;image-rendering:pixelated;display:block;margin:0"
    return f'<img alt="{escape(says)}" title="{escape(says)}" style="{style}" src="data:image/png;base64,{data}">'


def figures(shown: Sequence[tuple[Image.Image | None, str, str]]) -> str:
    """Pictures side by side, each with its name and, in HTML, what there is to say of it; they wrap on a phone."""
    parts = [
        f'<figure style="margin:0">{"" if image is None else embedded(image, name)}'
        f"<figcaption><b>{escape(name)}</b><br>{says}</figcaption></figure>"
        for image, name, says in shown
    ]
    columns = "display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:16px"
    return f'<div style="{columns}">{"".join(parts)}</div>'


def copying(name: str, text: str) -> str:
    """A button in HTML that copies a text."""
    # Browsers hand out the clipboard on this machine and over HTTPS only; elsewhere the text is shown, to be copied.
    does = (
        "const b=this,t=b.dataset.text;(navigator.clipboard?navigator.clipboard.writeText(t):Promise.reject()).then("
        "()=>{b.textContent='Copied';setTimeout(()=>{b.textContent=b.dataset.name},2000)},()=>prompt('Copy this:',t))"
    )
    style = "font-size:.8em;padding:2px 8px;margin:2px;cursor:pointer"
    data = f'data-name="{escape(name)}" data-text="{escape(text)}"'
    return f'<button type="button" style="{style}" {data} onclick="{does}">{escape(name)}</button>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, first: str = "auto") -> str:
    """A table in HTML, of cells that are HTML; it scrolls sideways where there is no room.

    Args:
        header: the columns' names.
        rows: the cells.
        caption: what it shows.
        first: width of the first column.
    """
    left = "text-align:left"
    head = "".join(f'<th scope="col" style="{left}">{escape(cell)}</th>' for cell in header)
    head = head.replace(left, f"{left};width:{first};min-width:120px", 1) if first != "auto" else head
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in rows)
    return (
        f"<div>{escape(caption)}</div>"
        f'<div style="overflow-x:auto" tabindex="0" role="region" aria-label="{escape(caption)}">'
        '<table style="width:100%">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def traces(lines: Sequence[Sequence[float]], says: str) -> str:
    """Curves in HTML, one of each chain, on one scale."""
    values = [value for curve in lines for value in curve]
    low, high = min(values), max(values)
    span, longest = (high - low) or 1.0, max(2, max(map(len, lines)))
    curves = []
    for k, curve in enumerate(lines):
        places = " ".join(f"{600 * i / (longest - 1):.1f},{150 - 140 * (value - low) / span:.1f}"
                          for i, value in enumerate(curve))  # fmt: skip
        stroke = f'stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="1.5" vector-effect="non-scaling-stroke"'
        curves.append(f'<polyline points="{places}" fill="none" {stroke}><title>Chain {k}</title></polyline>')
    return (
        f'<svg viewBox="0 0 600 160" role="img" aria-label="{escape(says)}" preserveAspectRatio="none" '
        f'style="width:100%;height:160px">{"".join(curves)}</svg>'
        f"<div>{escape(says)}: from {low:.4g} to {high:.4g}</div>"
    )

"""The page: a model, and a tab for each thing to do with it."""

from __future__ import annotations

import json
from contextlib import suppress
from threading import Thread
from typing import Any

from pushforward.errors import PushforwardError
from pushforward.studio import compare, edit, guide, inpaint, plan, sample
from pushforward.studio._shared.models import Shelf, choices_of
from pushforward.studio._shared.told import said

__all__ = ["Shelf", "make_page", "open_page", "settings"]

TABS = {
    "Sample": (sample, "Draw images from random codes, and watch them form."),
    "Compare": (compare, "Draw the same images with several solvers, and see how far each is from the exact ones."),
    "Edit": (edit, "Change what a picture shows, or find the code that the model draws it from."),
    "Inpaint": (inpaint, "Paint over a part of a picture, and have the model fill it again."),
    "Guide": (guide, "Search the codes for images with a colour, of a class, or like a picture."),
    "Plan": (plan, "See what a solver adds up in each step: states, the network's answers and noise."),
}
_UPLOAD = "20mb"
_CSS = """
.photo img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
.token {max-height: 6em; overflow-y: auto}
"""
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched


def make_page(shelf: Shelf) -> Any:
    """The page as Gradio's `Blocks`, to be launched."""
    import gradio as gr

    with gr.Blocks(title="Pushforward studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# Pushforward studio\nDraw, edit, invert and guide images with diffusion models.")
        model = gr.Dropdown(list(shelf.names), value=shelf.names[0], label="Model", elem_id="model")
        told: list[Any] = []
        for name, (tab, does) in TABS.items():
            with gr.Tab(name):
                gr.Markdown(does)
                told += tab.layout(shelf, model)

        def offer(name: str) -> dict[Any, Any]:
            choices = choices_of(shelf.open(name))
            return {one: gr.Dropdown(choices=choices) for one in told}

        # What was written for another model goes at once, not as the model is loaded: then there are new words.
        empty = json.dumps([[] if one.multiselect else None for one in told])
        model.input(None, None, told, js=f"() => {empty}", api_visibility="private")
        for event in (page.load, model.change):
            event(said(offer), model, told, show_progress="hidden", api_visibility="private")
        # A reload of the page would lose what is written and chosen.
        kinds = (gr.Dropdown, gr.Slider, gr.Number, gr.Checkbox, gr.CheckboxGroup, gr.Radio, gr.Textbox, gr.ColorPicker)
        controls = [one for one in page.blocks.values() if isinstance(one, kinds)]
        kept = gr.BrowserState([one.value for one in controls])
        page.load(None, kept, controls, js="kept => kept", api_visibility="private")
        gr.on([one.input for one in controls], None, controls, kept, js="(...all) => [all]", api_visibility="private")
    page.queue(default_concurrency_limit=1, max_size=32)
    return page


def open_page(
    shelf: Shelf, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = True,
    auth: tuple[str, str] | None = None,
) -> Any:  # fmt: skip
    """Serve the page; what is returned has its `local_url`, and `block_thread()` waits for its end.

    Args:
        shelf: models that it offers.
        host: address that it listens on.
        port: by default the first free one from 7860 on.
        browser: open it in the browser.
        auth: name and password that visitors must give.

    Raises:
        PushforwardError: no port is free, or not this one.
    """
    page = make_page(shelf)
    try:
        page.launch(
            **settings(), server_name=host, server_port=port, inbrowser=browser, auth=auth, share=False, quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise PushforwardError(f"The page cannot be served at {host}, port {port or '7860 to 7959'}: {error}") from None
    Thread(target=_begin, args=(shelf,), daemon=True).start()  # it takes as long as the first look around
    return page


def _begin(shelf: Shelf) -> None:
    """Load the first model; one that cannot be loaded is told of in the page, as the others."""
    with suppress(PushforwardError):
        shelf.open(shelf.names[0])


def settings() -> dict[str, Any]:
    """How a page is launched, wherever: colours that the colour-blind tell apart, fonts that are there, and limits."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", secondary_hue="orange", neutral_hue="slate", **_FONTS)
    return {
        "theme": theme, "css": _CSS, "max_file_size": _UPLOAD, "allowed_paths": [], "footer_links": [],
        "show_error": True, "enable_monitoring": False, "ssr_mode": False,
    }  # fmt: skip

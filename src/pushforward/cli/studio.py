"""Open a page in the browser to sample, compare, edit, inpaint and guide.

Examples are in `pushforward studio --help`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Annotated

import typer

from pushforward.cli._shared.options import DeviceOption
from pushforward.errors import PushforwardError

__all__ = ["studio"]


def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models to offer: embedded ones, folders, or hub names of `diffusers`; by default the embedded ones."
        ),
    ] = None,
    *,
    host: Annotated[
        str, typer.Option(help="Listen on this address; one that other machines reach needs --auth.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="Listen on this port; by default the first free one from 7860 on.", min=1, max=65535),
    ] = None,
    auth: Annotated[
        str | None, typer.Option(metavar="NAME:PASSWORD", help="Let in only who gives this name and password.")
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the browser.")] = False,
    clip: Annotated[
        str | None, typer.Option(help="Guide by texts with this CLIP: a folder or hub name of `transformers`.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    r"""Open a page in the browser to sample, compare, edit, inpaint and guide.

    It listens on this machine alone, and runs until Ctrl-C. Install its extra first: pip install 'pushforward[studio]'.

    \b
    pushforward studio
    pushforward studio fashion-vp ./my-model ./my-diffusers-folder --port 8000
    pushforward studio --host 0.0.0.0 --auth ada:lovelace --no-open
    """
    if find_spec("gradio") is None:
        raise PushforwardError("The page needs Gradio: pip install 'pushforward[studio]'.")
    name, colon, password = (auth or "").partition(":")
    if auth is not None and not (name and colon and password):
        raise PushforwardError("--auth is a name and a password with a colon between them, as ada:lovelace.")
    if not _own(host) and auth is None:
        raise PushforwardError(f"Other machines reach {host}: add --auth NAME:PASSWORD, or leave --host out.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
    if device != "auto":
        from pushforward.cli._shared.models import pick_device

        pick_device(device)  # what is wrong is said before the page opens
    from pushforward.studio._shared.models import EMBEDDED, Shelf
    from pushforward.studio.page import open_page

    shelf = Shelf(tuple(dict.fromkeys(models or EMBEDDED)), device, clip)
    page = open_page(shelf, host=host, port=port, browser=not no_open, auth=(name, password) if auth else None)
    typer.echo(f"The page is at {page.local_url} until Ctrl-C.")
    page.block_thread()


def _own(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

"""The verb ``clipsys ui``.

Heavy imports stand inside the function: this module is loaded to print its help.
"""

from __future__ import annotations

from typing import Annotated

import typer

from clipsys.commands import options


def ui(
    collection: options.CollectionFolder,
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 7860,
    host: Annotated[
        str,
        typer.Option(help="Address to serve on; 0.0.0.0 shows the images to the whole network."),
    ] = "127.0.0.1",
    model: options.MovedModel = None,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
) -> None:
    """Serve the app for a collection: search by text and image, classification."""
    from clipsys.retrieval import Collection
    from clipsys.ui.server import serve

    with Collection.open(collection, model=model) as photos:
        serve(
            photos,
            host=host,
            port=port,
            open_browser=open_browser,
            say=lambda address: typer.echo(f"serving {photos.path} on {address}  (Ctrl-C ends)"),
        )

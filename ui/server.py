"""Serves the app on one port, or says why not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import fastapi
import gradio as gr
import uvicorn

from clipsys.processes.ports import bind
from clipsys.retrieval import Collection
from clipsys.ui import style
from clipsys.ui.app import build_app

#: The largest file that may be uploaded.
MAX_UPLOAD = "64mb"
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def create_server_app(collection: Collection) -> fastapi.FastAPI:
    """The app as an ASGI application, with nothing else beside it."""
    # Without documentation routes: their pages load scripts from the network.
    server_app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    blocks = build_app(collection)
    # Gradio 6.31 checks that a path in a request is one of its uploads only in apps that were
    # launched, not in mounted ones: without this, a request could name any file of this machine.
    blocks.has_launched = True
    mounted: fastapi.FastAPI = gr.mount_gradio_app(
        server_app,
        blocks,
        path="/",
        theme=style.theme(),
        css=style.CSS,
        footer_links=[],
        run_history=False,
        show_error=False,  # an unforeseen error's text may hold paths; ours are shown all the same
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    return mounted


def serve(
    collection: Collection,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves a collection until it is interrupted.

    Args:
        collection: an open one; its encoder is loaded before the port is opened.
        host: address to listen on. Other than the loopback address, everybody who reaches it can
            see the images.
        port: no other is tried when it is taken.
        open_browser: opens the page in the default browser.
        say: called with the address once it is being served.

    Raises:
        ServerError: the port is taken or not allowed, or the host is not one of this machine's.
    """
    with bind(host, port) as bound, suppress(KeyboardInterrupt):
        collection.encoder  # noqa: B018  (the first search should not wait for the model)
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"

        def announce() -> None:
            say(address)
            if open_browser:
                webbrowser.open(address)

        # Uploads go to a folder of our own and are gone when the server is.
        with tempfile.TemporaryDirectory(prefix="clipsys-uploads-") as uploads:
            os.environ["GRADIO_TEMP_DIR"] = uploads
            asyncio.run(serve_on(collection, bound, announce))


async def serve_on(
    collection: Collection, bound: socket.socket, on_start: Callable[[], None]
) -> None:
    """Serves a collection on a listening socket until the task is cancelled or a signal comes."""
    # The app is made inside the running loop: outside, Gradio opens loops of its own for its locks
    # and never closes them.
    app = create_server_app(collection)
    await _Server(uvicorn.Config(app, log_level="warning"), on_start).serve(sockets=[bound])


class _Server(uvicorn.Server):
    """A server that says when it has started, and ends quietly.

    Uvicorn raises the signal that ended it once more after its shutdown: Ctrl-C would end in a
    traceback, and SIGTERM would kill the process before the folder of uploads is removed.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread
            return
        loop = asyncio.get_running_loop()
        for number in _ENDING_SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in _ENDING_SIGNALS:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

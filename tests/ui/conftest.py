from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from clipsys.processes.ports import bind
from clipsys.retrieval import Collection
from clipsys.ui.server import serve_on
from tests.retrieval.colours import COLOURS, ColourEncoder, paint


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one image of each colour and a table with captions and metadata."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["path,caption,number,label"]
    for number, name in enumerate(COLOURS):
        paint(folder / f"{name}.png", name)
        rows.append(f"{name}.png,a {name} square,{number},{name}")
    (folder / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def collection(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    folder = tmp_path_factory.mktemp("app") / "collection"
    (photos / "broken.jpg").write_bytes(b"not an image")
    with Collection.create(folder, ColourEncoder()) as made:
        made.add(photos / "table.csv", photos, show_progress=False)
        yield made


@pytest.fixture(scope="session")
def address(collection: Collection) -> Iterator[str]:
    """The app, being served."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []
    started = threading.Event()

    async def serve(bound: socket.socket) -> None:
        task = asyncio.ensure_future(serve_on(collection, bound, started.set))
        running.append((asyncio.get_running_loop(), task))
        with suppress(asyncio.CancelledError):
            await task

    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=lambda: asyncio.run(serve(bound)))
        thread.start()
        assert started.wait(30)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        loop, task = running[0]
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)

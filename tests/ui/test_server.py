from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pytest
from fastapi.testclient import TestClient
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from clipsys.cli import main
from clipsys.errors import ServerError
from clipsys.processes.ports import bind
from clipsys.retrieval import Collection
from clipsys.ui.server import create_server_app
from tests.retrieval.colours import COLOURS


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


def search(client: Client, text: str, **options: Any) -> list[dict[str, Any]]:
    values = {
        "k": 3,
        "negative": "",
        "where": "",
        "words": "",
        "relevant_only": False,
        "diverse": False,
        **options,
    }
    result = client.predict(text, *values.values(), api_name="/search")
    return list(result[1]["value"] if isinstance(result[1], dict) else result[1])


def test_page_is_served_and_describes_no_interface_to_the_network(collection: Collection) -> None:
    async def make() -> fastapi.FastAPI:
        return create_server_app(collection)

    with TestClient(asyncio.run(make())) as browser:
        assert browser.get("/").status_code == 200
        for path in ("/docs", "/redoc"):
            assert browser.get(path).status_code == 404


def test_thumbnails_are_served_and_the_photographs_are_not(
    collection: Collection, photos: Path, client: Client, address: str
) -> None:
    search(client, "red", k=len(COLOURS))
    thumbnails = list((collection.path / "thumbnails").glob("*.webp"))
    assert len(thumbnails) == len(COLOURS)
    served = httpx.get(f"{address}/gradio_api/file={thumbnails[0]}")
    assert (served.status_code, served.headers["content-type"]) == (200, "image/webp")
    for hidden in (
        photos / "red.png",
        collection.path / "items.sqlite",
        collection.path / "thumbnails" / ".." / "manifest.json",
    ):
        assert httpx.get(f"{address}/gradio_api/file={hidden}").status_code == 403


def test_search_through_the_interface(client: Client) -> None:
    captions = [entry["caption"] for entry in search(client, "red", where="number<2")]
    assert len(captions) == 2
    assert captions[0].endswith("a red square")


def test_words_and_a_weighted_line_through_the_interface(client: Client) -> None:
    assert [one["caption"] for one in search(client, "", words="blue")] == ["a blue square"]
    captions = [one["caption"] for one in search(client, "3*blue + red", k=1)]
    assert captions[0].endswith("a blue square")
    # What clients of earlier versions send goes on working.
    assert "red" in client.predict("red", 2, "", "", api_name="/search")[0]


def test_errors_of_the_library_reach_the_page_as_one_line(client: Client) -> None:
    with pytest.raises(AppError, match="Say what to look for"):
        search(client, " ")
    with pytest.raises(AppError, match="filter &#x27;number&#x27; is not understood"):
        search(client, "red", where="number")


def test_classification_through_the_interface(client: Client, photos: Path) -> None:
    result = client.predict(
        handle_file(photos / "blue.png"), "red, blue", "a photo of a {}.", api_name="/classify"
    )
    assert result["label"] == "blue"


def test_hostile_upload_is_a_friendly_line(client: Client, tmp_path: Path) -> None:
    upload = tmp_path / "photo.jpg"
    upload.write_bytes(b"not a photo")
    for api_name, rest in (("/classify", ["a, b", "a {}."]), ("/search_by_image", ["", 3, "", ""])):
        with pytest.raises(AppError, match="The uploaded file: not an image in a known format"):
            client.predict(handle_file(upload), *rest, api_name=api_name)
        with pytest.raises(AppError, match="Choose an image first"):
            client.predict(None, *rest, api_name=api_name)


def test_path_on_the_server_is_not_taken_for_an_upload(address: str, photos: Path) -> None:
    stolen = {"path": str(photos / "red.png"), "meta": {"_type": "gradio.FileData"}}
    call = f"{address}/gradio_api/call/classify"
    asked = httpx.post(call, json={"data": [stolen, "red, blue", "a {}."]})
    answer = httpx.get(f"{call}/{asked.json()['event_id']}").text
    assert "event: error" in answer
    assert "confidences" not in answer


def test_taken_port_is_an_error_that_names_it_and_the_remedy() -> None:
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} on 127.0.0.1 is taken; .*--port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1"])
def test_host_that_is_not_ours_is_an_error(host: str) -> None:
    with pytest.raises(ServerError, match=host):
        bind(host, 0)


def test_command_on_a_taken_port_ends_with_one_line(
    collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            main(["ui", str(collection.path), "--port", str(port)])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: port {port} on 127.0.0.1 is taken")
    assert error.count("\n") == 1


def test_command_on_what_is_no_collection_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["ui", str(tmp_path / "none")])
    assert end.value.code == 1
    assert "there is no collection here" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_server_ends_quietly_and_removes_the_uploads(
    collection: Collection, tmp_path: Path, ending: signal.Signals
) -> None:
    script = (
        "import sys; from clipsys.retrieval import Collection\n"
        "from clipsys.ui.server import serve; from tests.retrieval.colours import ColourEncoder\n"
        "with Collection.open(sys.argv[1], ColourEncoder()) as photos:\n"
        "    serve(photos, port=int(sys.argv[2]), say=lambda a: print(a, flush=True))"
    )
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", script, str(collection.path), str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert httpx.get(address).status_code == 200
            assert len(list(tmp_path.glob("clipsys-uploads-*"))) == 1
            process.send_signal(ending)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()  # does nothing to one that has ended
    assert (process.returncode, errors) == (0, "")
    assert list(tmp_path.glob("clipsys-uploads-*")) == []

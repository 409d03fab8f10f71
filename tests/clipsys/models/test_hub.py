"""The hub that nobody answers for: a port that accepts and is silent, and one that refuses."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from clipsys.errors import ModelError
from clipsys.models import hub
from clipsys.models.open_clip_models import build_model, load_model
from tests.conftest import TINY_MODEL


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An endpoint whose connections are accepted and never answered."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "ANSWER_TIMEOUT_S", 0.2)
        monkeypatch.setattr(hub, "_silent", {})
        yield endpoint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf-hub:nobody/no-such-model", "its weights are not on this machine"),
        ("ViT-B-32/laion2b_s34b_b79k", "its weights are not on this machine"),
        ("ViT-B-16-SigLIP2/webli", "its weights are not on this machine"),
    ],
)
def test_a_silent_hub_is_one_line_within_seconds(
    spec: str,
    message: str,
    silent_hub: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(ModelError, match=message) as caught:
        load_model(spec)
    assert time.monotonic() - started < 5
    assert f"the hub {silent_hub} cannot be reached (no answer within 0.2 s)" in str(caught.value)
    assert "HF_HUB_OFFLINE=1" in str(caught.value) and "\n" not in str(caught.value)
    assert not [one for one in caplog.records if one.name.startswith("huggingface_hub")]
    assert not constants.HF_HUB_OFFLINE  # as it was


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("hf_tokenizer_name", "the tokenizer nobody/nothing of its text tower is not on this mach"),
        ("hf_model_name", "nobody/nothing is not on this machine"),
    ],
)
def test_a_part_of_an_architecture_that_the_hub_has_is_named(
    key: str, message: str, silent_hub: str
) -> None:
    config = {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], key: "nobody/nothing"}}
    with pytest.raises(ModelError, match=message) as caught:
        build_model(config)
    assert silent_hub in str(caught.value) and f"text_cfg.{key} to a folder" in str(caught.value)


def test_a_silent_hub_is_asked_once(silent_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []
    ask = hub._ask
    monkeypatch.setattr(hub, "_ask", lambda endpoint: questions.append(endpoint) or ask(endpoint))
    for _ in range(3):
        with hub.quiet_hub() as reason:
            assert reason
    assert questions == [silent_hub]


class _Forbidding(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_hub_that_answers_is_left_to_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), _Forbidding)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.quiet_hub() as reason:
        assert reason == "" and not constants.HF_HUB_OFFLINE
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_refused_connection_and_a_wish_to_stay_offline_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert "Connection refused" in hub._ask(endpoint)
    assert "HF_HUB_OFFLINE is set" in hub._why_unreachable(endpoint, offline=True)

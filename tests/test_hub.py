"""A hub that nobody reaches is asked once, and then what is on this machine is all there is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mmtune import hub
from mmtune.encoding.processor import load_processor
from mmtune.errors import CapabilityError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    hub._is_reached.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "getproxies", dict)


def endpoint(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_listens_is_asked(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint(listener))
    hub.look_here_without_hub("some/model")
    assert not constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_one_that_does_not_is_left_alone(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint(listener))
    listener.close()
    hub.look_here_without_hub(str(tmp_path))
    assert not constants.HF_HUB_OFFLINE, "a folder asks nobody"
    with pytest.raises(CapabilityError, match="some/model' is not on this machine and the hub did not give it"):
        load_processor("some/model")
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1", "processes started from here know"


def test_a_proxy_may_reach_it(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint(listener))
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy:3128"})
    listener.close()
    hub.look_here_without_hub("some/model")
    assert not constants.HF_HUB_OFFLINE

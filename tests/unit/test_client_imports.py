"""The SDK loads grpcio, protobuf and its own few files, and nothing of the servers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import baton

HEAVY = {
    *("torch", "ray", "zmq", "msgspec", "msgpack", "numpy", "yaml", "tokenizers", "jinja2"),
    *("starlette", "uvicorn", "prometheus_client", "click", "rich", "safetensors"),
    *("router", "cluster", "kv_transfer", "prefill_worker", "decode_worker"),
}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout))


def test_the_sdk_loads_nothing_of_the_servers():
    loaded = modules_after("import baton; baton.Client; baton.AsyncClient")
    assert {name.split(".")[0] for name in loaded} & HEAVY == set()
    own = {name for name in loaded if name.startswith("baton.protocol.")}
    assert own <= {"baton.protocol.errors", "baton.protocol.ids", "baton.protocol.slo"}


def test_the_protocol_loads_no_grpc():
    assert "grpc" not in modules_after("import baton.protocol.errors")


@pytest.mark.parametrize("name", baton.__all__)
def test_every_public_name_is_there(name):
    assert getattr(baton, name) is getattr(baton, name)
    assert name in dir(baton)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        _ = baton.Clinet


def test_the_public_names_are_these():
    assert set(baton.__all__) == {
        *("AsyncClient", "AsyncStream", "BatonError", "ChatMessage", "Choice", "Chunk"),
        *("Client", "Completion", "Stream"),
    }

"""Readiness means that a request could be placed, not only that processes are up."""

from __future__ import annotations

from baton.protocol.config import RouterConfig
from baton.protocol.messages import HelloReply
from baton.protocol.spec import WorkerInfo
from router.decider import RouterDecider
from router.detokenizer import Detokenizer
from router.events import Announced, Greeted
from tests.support.tiny_text import tiny_tokenizer


def ready(prefill_layout: str, decode_layout: str) -> str | None:
    tokenizer = tiny_tokenizer()
    decider = RouterDecider("r", 1, RouterConfig(), lambda spec: Detokenizer(tokenizer))
    for worker, role, layout in (("p", "prefill", prefill_layout), ("d", "decode", decode_layout)):
        info = WorkerInfo(worker_id=worker, incarnation="1", role=role, address="a", pid=1)
        decider.handle(Announced(info), 0.0)
        decider.handle(
            Greeted(worker, HelloReply("", 1, worker, "1", role, layout, "kv", 100)), 0.0
        )
    return decider.ready()


def test_a_pair_with_one_layout_is_ready():
    assert ready("same", "same") is None


def test_a_pair_with_two_layouts_is_not_and_says_why():
    assert "KV layout" in (ready("one", "other") or "")

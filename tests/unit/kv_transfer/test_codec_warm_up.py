"""No hand-over waits for a codec to be compiled."""

from __future__ import annotations

import logging
import threading

import pytest

from baton.protocol.layout import KvLayout
from kv_transfer.codec_warm_up import CodecWarmUp
from kv_transfer.coding import KvCoding


def test_codecs_become_ready_one_after_the_other_and_once() -> None:
    used: list[str] = []
    go_on = threading.Event()

    def use(name: str) -> None:
        used.append(name)
        if name == "second":
            go_on.wait()

    warm_up = CodecWarmUp(use)
    try:
        warm_up.begin(["first", "second"])
        warm_up.begin(["second", "third"])
        assert not warm_up.is_ready("third")
    finally:
        go_on.set()
    warm_up.wait()
    assert all(map(warm_up.is_ready, ("first", "second", "third")))
    warm_up.close()
    assert used == ["first", "second", "third"]


def test_one_that_does_not_work_is_never_ready_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def use(name: str) -> None:
        raise ZeroDivisionError

    warm_up = CodecWarmUp(use)
    with caplog.at_level(logging.ERROR):
        warm_up.begin(["broken"])
        warm_up.wait()
    warm_up.close()
    assert not warm_up.is_ready("broken")
    assert "the KV codec broken does not work here" in caplog.text


def test_closing_neither_waits_for_the_one_being_compiled_nor_begins_another() -> None:
    begun, go_on, used = threading.Event(), threading.Event(), list[str]()

    def use(name: str) -> None:
        used.append(name)
        begun.set()
        go_on.wait()

    warm_up = CodecWarmUp(use)
    warm_up.begin(["first", "second"])
    assert begun.wait(20)
    (thread,) = (t for t in threading.enumerate() if t.name == "kv codec warm-up")
    assert thread.daemon
    warm_up.close()
    assert not warm_up.is_ready("first")
    go_on.set()
    thread.join(20)
    assert not thread.is_alive()
    assert used == ["first"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_codec_can_be_tried_out_on_any_dtype(dtype: str) -> None:
    layout = KvLayout.uniform(
        num_layers=2, num_kv_heads=1, head_dim=16, dtype=dtype, model_digest="m"
    )
    coding = KvCoding(layout)
    try:
        assert coding.is_ready("raw")
        assert not coding.is_ready("split")
        coding.try_out("split")
        coding.try_out("int8")
    finally:
        coding.close()

"""Writes beside the event loop: told of when they are over, also when their link is."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from baton.protocol.layout import KvLayout
from decode_worker.decider import FrameArrived, KvWritten
from decode_worker.kv_input import KvInput
from kv_transfer.coding import KvCoding
from kv_transfer.frames import RAW, FrameCut, Framing
from kv_transfer.instructions import WriteKv
from tests.property.test_frames import make_frame

LAYOUT = KvLayout.uniform(
    num_layers=2, num_kv_heads=2, head_dim=4, dtype="bfloat16", model_digest="m"
)
FRAMING = Framing(LAYOUT, 2)
CUT = FrameCut(0, 2, 0, 8)
RAW_FRAME, ROWS = make_frame(FRAMING, 0, CUT)
ROWS = np.random.default_rng(1).integers(0, 1 << 16, len(ROWS) // 2, dtype="<u2").tobytes()


class Store:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.threads: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def write_kv(
        self, table: Any, start: int, count: int, layer: int, layers: int, kv: Any
    ) -> None:
        assert self.may_go_on.wait(20)
        self.threads.append(threading.get_ident())
        self.written.append(bytes(kv))


class Input:
    """Lets every frame in, but for those of no tokens."""

    def __init__(self, *, writes_beside: bool = False) -> None:
        self.store, self.events = Store(), []
        self.coding = KvCoding(LAYOUT)
        self.input = KvInput(self.store, self.coding, self.feed, writes_beside=writes_beside)

    def feed(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, FrameArrived) and event.frame.num_tokens:
            self.input.accept(WriteKv(event.frame, (0,), 8))

    async def come(self, codec: str, payload: bytes) -> None:
        frame = msgspec.structs.replace(RAW_FRAME, codec=codec, num_bytes=len(payload))
        await self.input.on_frame(frame, memoryview(payload), 0, "zeromq")

    @property
    def problems(self) -> list[str]:
        return [e.problem for e in self.events if isinstance(e, KvWritten)]


async def test_raw_rows_are_written_at_once_and_coded_ones_beside_the_loop() -> None:
    made = Input()
    coded = bytes(made.coding.encode("split", memoryview(ROWS), CUT, 8))
    await made.come(RAW, ROWS)
    await made.come("split", coded)
    assert made.store.written == [ROWS, ROWS]
    own, other = made.store.threads
    assert own == threading.get_ident() != other
    assert made.problems == ["", ""]
    made.coding.close()


async def test_raw_rows_too_go_beside_the_loop_where_a_write_may_wait() -> None:
    made = Input(writes_beside=True)
    await made.come(RAW, ROWS)
    assert made.store.threads != [threading.get_ident()]
    made.coding.close()


async def test_what_does_not_decode_is_told_and_not_written() -> None:
    made = Input()
    await made.come("split", b"nonsense")
    assert made.store.written == []
    [problem] = made.problems
    assert "KV stream" in problem
    made.coding.close()


async def test_what_was_not_let_in_is_not_written() -> None:
    made = Input()
    frame = msgspec.structs.replace(RAW_FRAME, num_tokens=0)
    await made.input.on_frame(frame, memoryview(ROWS), 0, "zeromq")
    assert (made.store.written, made.problems) == ([], [])
    made.coding.close()


async def test_a_link_that_closes_under_a_write_waits_for_its_end_and_tells() -> None:
    made = Input(writes_beside=True)
    made.store.may_go_on.clear()
    task = asyncio.get_running_loop().create_task(made.come(RAW, ROWS))
    await asyncio.sleep(0.01)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    assert made.problems == []
    made.store.may_go_on.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert made.problems == ["its write was broken off"]
    assert made.store.written == [ROWS]
    made.coding.close()


async def test_a_write_that_fails_in_another_way_is_not_taken_for_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some transports go on behind such an error, which costs one sender its link."""
    made = Input()

    def write_kv(*where: Any) -> None:
        raise RuntimeError("no such block")

    monkeypatch.setattr(made.store, "write_kv", write_kv)
    with pytest.raises(RuntimeError, match="no such block"):
        await made.come(RAW, ROWS)
    assert made.problems == ["its write was broken off"]
    made.coding.close()


@pytest.mark.parametrize(("wanted", "prepared"), [("raw", []), ("split", ["split"])])
async def test_the_first_frame_from_afar_makes_ready_what_is_configured_and_no_more(
    wanted: str, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(KvCoding, "try_out", lambda coding, name: tried.append(name))
    made = Input()
    names = made.coding.names(wanted)
    made.input = KvInput(made.store, made.coding, made.feed, writes_beside=False, codecs=names)
    await made.come(RAW, ROWS)
    made.coding.wait_until_prepared()
    assert tried == prepared
    made.coding.close()

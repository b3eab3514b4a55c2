"""What of NCCL one GPU can show: a communicator of one rank that sends to itself.

It is joined without blocking, a move that never ends meets its deadline, and an abort ends what
hangs. Two ranks on one GPU are refused by NCCL; docs/unverified.md says how to run two.
"""

from __future__ import annotations

import threading

import pytest
import torch

from kv_transfer.transports import pair_group
from kv_transfer.transports.pair_group import nccl_group, wait_for_nccl

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
NUM_BYTES = 16 * 2**20


def self_group(name: str) -> object:
    store = torch.distributed.PrefixStore(name, torch.distributed.HashStore())
    return nccl_group(store, 0, 1, DEVICE)


def exchange(group: object, sent: torch.Tensor, received: torch.Tensor) -> object:
    """Grouped, since a send alone would wait for its receive for ever."""
    group._start_coalescing()  # type: ignore[attr-defined]
    group.send([sent], 0, 0)  # type: ignore[attr-defined]
    group.recv([received], 0, 0)  # type: ignore[attr-defined]
    return group._end_coalescing()  # type: ignore[attr-defined]


def test_a_rank_sends_to_itself() -> None:
    group = self_group("itself")
    for seed in range(3):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        sent = torch.randint(
            0, 256, (NUM_BYTES,), dtype=torch.uint8, device=DEVICE, generator=generator
        )
        received = torch.zeros_like(sent)
        wait_for_nccl(exchange(group, sent, received))
        assert torch.equal(sent, received)
    group.abort()  # type: ignore[attr-defined]


def test_a_move_that_does_not_end_meets_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that it waits for is held up by a kernel that spins for about a second."""
    monkeypatch.setattr(pair_group, "MOVE_DEADLINE_S", 0.05)
    group = self_group("deadline")
    sent = torch.zeros(NUM_BYTES, dtype=torch.uint8, device=DEVICE)
    first = exchange(group, sent, torch.zeros_like(sent))
    torch.cuda.synchronize()
    wait_for_nccl(first)
    torch.cuda._sleep(2_000_000_000)
    with pytest.raises(RuntimeError, match="no word of the other side"):
        wait_for_nccl(exchange(group, sent, torch.zeros_like(sent)))
    torch.cuda.synchronize()
    group.abort()  # type: ignore[attr-defined]


def test_a_group_is_aborted_off_the_thread_and_another_takes_its_place() -> None:
    group = self_group("first")
    aborting = threading.Thread(target=group.abort, daemon=True)  # type: ignore[attr-defined]
    aborting.start()
    aborting.join(30.0)
    assert not aborting.is_alive()
    sent = torch.ones(1_000, dtype=torch.uint8, device=DEVICE)
    received = torch.zeros_like(sent)
    again = self_group("second")
    wait_for_nccl(exchange(again, sent, received))
    assert torch.equal(sent, received)
    again.abort()  # type: ignore[attr-defined]

"""What came is what joins the batch: as good, as much of it, and no older blocks than are whole."""

from __future__ import annotations

import pytest

from baton.engine.block_pool import BlockPool
from baton.engine.scheduler import Scheduler, Sequence
from baton.protocol.block_hash import KV_FLOORS, classes_for
from baton.protocol.sampling import SamplingParams
from decode_worker.handover import arrived_job
from kv_transfer.instructions import Arrived
from tests.support.core import EOS_ID, body, engine_config

PROMPT = tuple(range(40))


def arrive(pool: BlockPool, *, quality: str = "exact", complete_from: int = 0) -> Sequence:
    came = Arrived(
        "r/0",
        body("r", PROMPT, max_tokens=4),
        (7,),
        tuple(pool.allocate("r/0", pool.blocks_for(len(PROMPT) + 4))),
        asked_at=0.0,
        reserve_wait_s=0.0,
        transfer_s=0.0,
        num_bytes=1,
        num_frames=1,
        num_tokens=len(PROMPT),
        complete_from=complete_from,
        quality=quality,
    )
    return arrived_job(came, 0.0)[1]


def num_found(floor: str, quality: str = "exact", complete_from: int = 0) -> int:
    """Tokens that a request of that floor, which begins alike, finds in the cache."""
    pool = BlockPool(16, 8)
    scheduler = Scheduler(pool, engine_config(), frozenset({EOS_ID}))
    scheduler.add_computed(arrive(pool, quality=quality, complete_from=complete_from))
    other = Sequence(
        "other/0", (*PROMPT, 1), [], SamplingParams(max_tokens=1), accepts=classes_for(floor)
    )
    scheduler.add(other)
    scheduler.schedule()
    return other.num_cached


@pytest.mark.parametrize("floor", KV_FLOORS)
def test_kv_that_came_through_a_lossy_codec_serves_no_higher_floor(floor: str) -> None:
    assert num_found(floor, quality="exact") == 40
    assert num_found(floor, quality="medium") == (40 if floor in ("medium", "low") else 0)


def test_blocks_that_came_without_some_layers_rows_are_found_by_nobody() -> None:
    assert num_found("exact", complete_from=0) == 40
    assert num_found("exact", complete_from=8) == 0, "the first is missing"

"""A request whose KV has arrived: whether it can go on, as what, and what is told of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from baton.engine.scheduler import NewToken, Sequence
from baton.protocol.messages import HopTimes
from baton.worker.jobs import Job, sequence_of
from kv_transfer.frames import RAW
from kv_transfer.instructions import Arrived


@dataclass(slots=True)
class DecodeJob(Job):
    """``arrived`` tells of its hand-over, once; None where both phases are here."""

    arrived: HopTimes | None = None


def nothing_follows(arrived: Arrived, vocab_size: int) -> str:
    """Why no token can follow what the prefill side drew; empty when one can."""
    body = arrived.body
    outputs = (*body.output_ids, *arrived.token_ids)
    if max(outputs) < vocab_size and len(outputs) < body.sampling.max_tokens:
        return ""
    return f"the prefill side drew {arrived.token_ids[-1]}, which nothing can follow"


def arrived_job(arrived: Arrived, now: float) -> tuple[DecodeJob, Sequence]:
    """The sequence owns the blocks of its KV already: they are held under its id."""
    body = arrived.body
    hop = HopTimes(
        reserve_wait_s=arrived.reserve_wait_s,
        transfer_s=arrived.transfer_s,
        transfer_bytes=arrived.num_bytes,
        transfer_frames=arrived.num_frames,
        codec="+".join(sorted(arrived.codecs)) or RAW,
        transport=arrived.transport,
        transfer_raw_bytes=arrived.num_raw_bytes,
        exposed_s=arrived.exposed_s,
        recomputed_tokens=len(body.prompt_ids) + len(body.output_ids) - arrived.num_tokens,
    )
    deadline_at = arrived.asked_at + body.deadline_in_s
    sequence = sequence_of(arrived.transfer_id, body)
    sequence.num_computed = arrived.num_tokens
    sequence.complete_from = arrived.complete_from
    sequence.quality = arrived.quality
    sequence.output_ids += arrived.token_ids
    sequence.block_table = tuple(arrived.blocks)
    return DecodeJob(body, now, deadline_at, started_at=now, arrived=hop), sequence


def hop_times(job: DecodeJob, new: NewToken, now: float) -> HopTimes | None:
    """What goes with a token about the request's way: with the first drawn here, and the last."""
    assert job.started_at is not None
    sequence, hop = new.sequence, None
    if job.arrived is not None:
        hop = msgspec.structs.replace(job.arrived, first_step_s=now - job.started_at)
        job.arrived = None
    elif new.place == len(job.body.output_ids):
        hop = HopTimes(
            queued_s=job.started_at - job.arrived_at,
            prefill_s=now - job.started_at,
            num_chunks=sequence.num_chunks,
        )
    if new.finish_reason and sequence.num_preemptions:
        hop = msgspec.structs.replace(hop or HopTimes(), preemptions=sequence.num_preemptions)
    return hop

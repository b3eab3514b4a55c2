"""A request at a prefill worker, and what the decode worker and the router hear of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from baton.engine.scheduler import Sequence
from baton.protocol.messages import HopTimes, RequestBody, WorkerRef
from baton.worker.jobs import Job


@dataclass(slots=True, kw_only=True)
class PrefillJob(Job):
    """Open until its KV is acknowledged, or it ended here."""

    decode: WorkerRef

    @property
    def goes_on(self) -> bool:
        """Whether tokens are wanted behind the one that is drawn here."""
        return self.body.sampling.max_tokens > len(self.body.output_ids) + 1

    def handed_on(self, now: float) -> RequestBody:
        """With what is left of its deadline."""
        left_s = max(0.0, self.deadline_at - now)
        return msgspec.structs.replace(self.body, deadline_in_s=left_s)

    def hop_times(self, sequence: Sequence, now: float) -> HopTimes:
        """Once its first token is drawn."""
        assert self.started_at is not None
        return HopTimes(
            queued_s=self.started_at - self.arrived_at,
            prefill_s=now - self.started_at,
            num_chunks=sequence.num_chunks,
            preemptions=sequence.num_preemptions,
        )

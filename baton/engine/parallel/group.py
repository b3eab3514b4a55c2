"""What the ranks of one worker exchange during a forward pass; nothing when there is one rank.

Columns of Q, K, V, gate and up, rows of output and down, and rows of the vocabulary are split
over the ranks (Megatron-LM, arXiv 1909.08053, section 3): two sums a layer, one for the
embedding, and the logits of the rows that sample.
Shapes: T rows, h hidden size, S rows that sample, V vocabulary.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import GatherOptions, ProcessGroupGloo, Store
from torch.nn.functional import embedding, pad

from baton.engine.parallel.shard import Shard
from baton.protocol.errors import RankLost


class Group(Protocol):
    """The collectives of a forward pass. Every rank calls the same ones in the same order."""

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Rows ``[T, h]`` of the whole vocabulary's table, of which ``table`` is this rank's."""
        ...

    def reduce(self, part: Tensor) -> Tensor:
        """The sum of all ranks' ``part``, the same bits on each. ``part`` may be reused."""
        ...

    def join_logits(self, part: Tensor) -> Tensor:
        """``[S, V]`` on rank 0 from each rank's columns; what other ranks get is not logits."""
        ...


class Alone:
    """One rank has everything and exchanges nothing."""

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return embedding(token_ids, table)

    def reduce(self, part: Tensor) -> Tensor:
        return part

    def join_logits(self, part: Tensor) -> Tensor:
        return part


ALONE: Group = Alone()


class RankGroup:
    """Collectives over torch's process groups, each with a deadline.

    Sums over gloo add the ranks' parts in the order of their ranks: gloo's own all-reduce cuts
    a tensor into pieces and begins each at another rank, so that the same row would add in
    another order in another batch. NCCL's order depends on the size as well; ``ordered`` takes
    the slower way there too.
    """

    def __init__(
        self, backend: Any, shard: Shard, vocab_size: int, deadline_s: float, *, ordered: bool
    ) -> None:
        self._backend = backend
        self._shard = shard
        self._vocab_size = vocab_size
        self._deadline_s = deadline_s
        self._ordered = ordered

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        rows = token_ids - self._shard.rank * len(table)
        is_here = (rows >= 0) & (rows < len(table))
        found = embedding(rows.where(is_here, 0), table)
        return self.reduce(found.masked_fill_(~is_here[:, None], 0))

    def reduce(self, part: Tensor) -> Tensor:
        if not self._ordered:
            self._wait(self._backend.allreduce([part]))
            return part
        part = part.contiguous()
        parts = part.new_empty((self._shard.size * len(part), *part.shape[1:]))
        self._wait(self._backend._allgather_base(parts, part))
        first, *others = parts.chunk(self._shard.size)
        for other in others:
            first += other
        return first

    def join_logits(self, part: Tensor) -> Tensor:
        part = part.contiguous()
        options = GatherOptions()
        options.rootRank = 0
        if self._shard.rank != 0:
            self._wait(self._backend.gather([], [part], options))
            return part
        parts = [torch.empty_like(part) for _ in range(self._shard.size)]
        self._wait(self._backend.gather([parts], [part], options))
        return torch.cat(parts, dim=-1)[:, : self._vocab_size]

    def abort(self) -> None:
        """End what waits for ranks that are gone. Idempotent; nothing works afterwards."""
        self._backend.abort()

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as exc:
            raise RankLost(
                f"rank {self._shard.rank} of {self._shard.size} waited for the others in vain "
                f"(deadline {self._deadline_s:g} s): {exc}"
            ) from exc

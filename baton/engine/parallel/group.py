"""What the ranks of one worker exchange during a forward pass; nothing when there is one rank.

Columns of Q, K, V, gate and up, rows of output and down, and rows of the vocabulary are split
over the ranks (Megatron-LM, arXiv 1909.08053, section 3): two sums a layer, one for the
embedding, and the logits of the rows that sample.
Shapes: T rows, h hidden size, S rows that sample, V vocabulary.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import GatherOptions, Store

from baton.engine.parallel.shard import Shard
from baton.protocol.errors import RankLost


class Table(Protocol):
    """The rows of this rank's part of the vocabulary."""

    def __len__(self) -> int: ...

    def __call__(self, token_ids: Tensor) -> Tensor: ...


class Group(Protocol):
    """The collectives of a forward pass. Every rank calls the same ones in the same order."""

    def embed(self, token_ids: Tensor, table: Table) -> Tensor:
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

    def embed(self, token_ids: Tensor, table: Table) -> Tensor:
        return table(token_ids)

    def reduce(self, part: Tensor) -> Tensor:
        return part

    def join_logits(self, part: Tensor) -> Tensor:
        return part


ALONE: Group = Alone()


class RankGroup:
    """Collectives over torch's process groups, each with a deadline.

    ordered: add the parts in the order of ranks. An all-reduce cuts a tensor into pieces and
    begins each at another rank, so that the same row would add in another order in another
    batch; of two parts, either order gives the same bits.
    """

    def __init__(
        self, backend: Any, shard: Shard, vocab_size: int, deadline_s: float, *, ordered: bool
    ) -> None:
        self._backend = backend
        self._shard = shard
        self._vocab_size = vocab_size
        self._deadline_s = deadline_s
        self._ordered = ordered

    def embed(self, token_ids: Tensor, table: Table) -> Tensor:
        rows = token_ids - self._shard.rank * len(table)
        is_here = (rows >= 0) & (rows < len(table))
        found = table(rows.where(is_here, 0))
        return self.reduce(found.masked_fill_(~is_here[:, None], 0))

    def reduce(self, part: Tensor) -> Tensor:
        part = part.contiguous()
        if not self._ordered:
            self._wait(self._backend.allreduce([part]))
            return part
        parts = [torch.empty_like(part) for _ in range(self._shard.size)]
        self._wait(self._backend.allgather([parts], [part]))
        total, *others = parts
        for other in others:
            total += other
        return total

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
        """End what another thread waits for. Idempotent; nothing works afterwards."""
        if self._backend is not None:
            self._backend.abort()

    def close(self) -> None:
        """Let go of the connections; no thread is in here."""
        self.abort()
        self._backend = None

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as exc:
            # It holds the connections, and the traceback would hold it.
            del work
            raise RankLost(
                f"rank {self._shard.rank} of {self._shard.size} waited for the others in vain "
                f"(deadline {self._deadline_s:g} s): {exc}"
            ) from exc


LOOPBACK_HOST, LOOPBACK_INTERFACE = "127.0.0.1", "lo"
MEET_DEADLINE_S = 60.0
"""All processes are up before the first one calls the others."""
_DISTRIBUTED: Any = torch.distributed
"""Its stubs leave out the stores and the options of process groups."""


def host_store(num_ranks: int) -> tuple[Store, int]:
    """Where the ranks find each other, and its port: on loopback only, unlike torch's own."""
    listener = socket.create_server((LOOPBACK_HOST, 0))
    port = int(listener.getsockname()[1])
    store: Store = _DISTRIBUTED.TCPStore(
        LOOPBACK_HOST,
        port,
        num_ranks,
        is_master=True,
        timeout=timedelta(seconds=MEET_DEADLINE_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def find_store(port: int, num_ranks: int) -> Store:
    """Raises RankLost when rank 0's store is not there."""
    timeout = timedelta(seconds=MEET_DEADLINE_S)
    try:
        store: Store = _DISTRIBUTED.TCPStore(
            LOOPBACK_HOST, port, num_ranks, is_master=False, timeout=timeout
        )
    except RuntimeError as exc:
        raise RankLost(f"rank 0 cannot be found on port {port}: {exc}") from exc
    return store


def join(
    store: Store,
    shard: Shard,
    vocab_size: int,
    device: torch.device,
    deadline_s: float,
    *,
    deterministic: bool,
) -> RankGroup:
    """Meet the other ranks. Raises RankLost when one does not come within MEET_DEADLINE_S.

    deadline_s: of each collective later.
    The group is not torch's global one: two executors of one process, as in tests, are two groups.
    """
    try:
        backend = _backend(store, shard, device, timedelta(seconds=MEET_DEADLINE_S))
    except RuntimeError as exc:
        raise RankLost(
            f"rank {shard.rank} of {shard.size} did not meet the others within "
            f"{MEET_DEADLINE_S:g} s: {exc}"
        ) from exc
    backend._set_default_timeout(timedelta(seconds=deadline_s))
    ordered = shard.size > 2 and (deterministic or device.type == "cpu")
    return RankGroup(backend, shard, vocab_size, deadline_s, ordered=ordered)


def _backend(store: Store, shard: Shard, device: torch.device, timeout: timedelta) -> Any:
    if device.type == "cuda":
        nccl = _DISTRIBUTED.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timeout
        backend = nccl(store, shard.rank, shard.size, options)
        backend.eager_connect_single_device(device)
        return backend
    gloo = _DISTRIBUTED.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(interface=LOOPBACK_INTERFACE)]
    return gloo(store, shard.rank, shard.size, options)

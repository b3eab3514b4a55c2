"""Rank 0's side of the other ranks: their processes, what they are told, and their end.

Each rank is a child of this process. It ends when its channels close or this process dies, so
none is ever left over; when one of them dies, the worker cannot go on: see ``loss``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from baton.engine.parallel.channel import Channel, pair
from baton.engine.parallel.group import RankGroup, host_store, join
from baton.engine.parallel.messages import (
    Failed,
    Join,
    KvDone,
    KvRange,
    KvRequest,
    LoadSettings,
    Ready,
    Start,
    Started,
    encode_plan,
)
from baton.engine.plan import StepPlan
from baton.protocol.errors import InternalError, PeerError, RankLost, from_code

STEP_DEADLINE_S = 30.0
"""Longest wait of one rank for another within a step; ranks do the same work at the same time."""
START_DEADLINE_S = 300.0
"""Until a new process has imported torch, and until one that loads as much as this one is done."""
CLOSE_GRACE_S = 2.0
REAP_S = 1.0


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    steps: Channel
    kv: Channel


class Ranks:
    """``step`` belongs to the engine thread, ``ask`` to the thread that reads and writes KV.

    The thread that calls ``start`` must live as long as the ranks: the kernel ends them with it.
    """

    def __init__(self, settings: LoadSettings, deadline_s: float) -> None:
        self._settings = settings
        self._deadline_s = deadline_s
        self._ranks: list[_Rank] = []
        self._group: RankGroup | None = None
        self._num_steps = 0
        self._loss: RankLost | None = None

    @classmethod
    def start(
        cls, settings: LoadSettings, vocab_size: int, device: torch.device, deadline_s: float
    ) -> Ranks:
        """Start ranks 1 and up, and meet them. Raises RankLost; no process is left then."""
        ranks = cls(settings, deadline_s)
        try:
            ranks._start(vocab_size, device)
        except BaseException:
            ranks.close()
            raise
        return ranks

    def _start(self, vocab_size: int, device: torch.device) -> None:
        settings = self._settings
        store, port = host_store(settings.num_ranks)
        for number in range(1, settings.num_ranks):
            self._ranks.append(_spawn(number))
        for rank in self._ranks:
            own = msgspec.structs.replace(settings, rank=rank.number)
            told = Join(settings=own, store_port=port, deadline_s=self._deadline_s)
            rank.steps.send(told, self._deadline_s)
        self._expect(Started)
        try:
            self._group = join(
                store,
                settings.shard,
                vocab_size,
                device,
                self._deadline_s,
                deterministic=settings.deterministic,
            )
        except RankLost as exc:
            raise self._lost(exc) from exc

    @property
    def group(self) -> RankGroup:
        assert self._group is not None
        return self._group

    def await_ready(self) -> None:
        """Until all have loaded. Raises what a rank raised while it loaded, and RankLost."""
        self._expect(Ready)

    def _expect(self, wanted: type[Started] | type[Ready]) -> None:
        for rank in self._ranks:
            try:
                answer: Start = rank.steps.receive(Start, START_DEADLINE_S)
            except PeerError as exc:
                raise self._lost(exc) from exc
            if isinstance(answer, Failed):
                raise from_code(answer.code, f"rank {rank.number}: {answer.message}")
            if not isinstance(answer, wanted):
                raise InternalError(f"rank {rank.number} said {answer!r} before {wanted.__name__}")

    @contextlib.contextmanager
    def step(self, plan: StepPlan) -> Iterator[None]:
        """All ranks run ``plan``; this one does within the block. Raises RankLost for whatever
        goes wrong there: the ranks no longer agree on where they are."""
        self._check()
        body = encode_plan(plan)
        try:
            for rank in self._ranks:
                rank.steps.send_encoded(body, self._deadline_s)
            yield
        except RankLost as exc:
            raise self._lost(exc) from exc
        except Exception as exc:
            raise self._lost(RankLost(f"rank 0 raised {type(exc).__name__}: {exc}")) from exc
        self._num_steps += 1

    def ask(self, requests: Sequence[KvRequest]) -> list[memoryview]:
        """One request to each rank, in their order; the payloads of the answers."""
        self._check()
        try:
            for rank, request in zip(self._ranks, requests, strict=True):
                rank.kv.send(request, self._deadline_s)
            answers: list[KvDone] = [r.kv.receive(KvDone, self._deadline_s) for r in self._ranks]
        except PeerError as exc:
            raise self._lost(exc) from exc
        return [answer.payload for answer in answers]

    def range(
        self,
        block_table: Sequence[int],
        start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
    ) -> KvRange:
        """What is asked now may lean on the steps that are done here, and on no other."""
        return KvRange(
            self._num_steps, tuple(block_table), start, num_tokens, layer_start, num_layers
        )

    @property
    def size(self) -> int:
        """With this one."""
        return self._settings.num_ranks

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that become readable when a rank has gone: it says nothing there."""
        return tuple(rank.steps.fileno() for rank in self._ranks)

    def loss(self) -> RankLost:
        """Why the worker must end; call when one of ``fds`` is readable. A step in flight is
        ended too, should it wait where the loss of a rank goes unnoticed."""
        if self._group is not None:
            self._group.abort()
        return self._lost(RankLost("a rank has closed its end"))

    def close(self) -> None:
        """End all ranks and wait for them. Idempotent."""
        if self._loss is None:
            self._loss = RankLost("the ranks have been ended")
        if self._group is not None:
            self._group.close()
        for rank in self._ranks:
            rank.steps.close()
            rank.kv.close()
        for rank in self._ranks:
            try:
                rank.process.wait(CLOSE_GRACE_S)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()

    def _check(self) -> None:
        if self._loss is not None:
            raise self._loss

    def _lost(self, cause: PeerError) -> RankLost:
        """The first loss, with what the operating system knows of the processes."""
        if self._loss is None:
            self._loss = RankLost(f"{self._told(cause)}; this worker ends", hop="ranks")
        return self._loss

    def _told(self, cause: PeerError) -> str:
        """A rank that was killed is why the others ended; otherwise the cause comes first.

        A dead process lets go of its sockets a moment before it can be asked for its end.
        """
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(REAP_S / len(self._ranks))
        ended = [(rank, rank.process.poll()) for rank in self._ranks]
        killed = [_describe(rank, code) for rank, code in ended if code is not None and code < 0]
        if killed:
            return ", ".join(killed)
        others = [_describe(rank, code) for rank, code in ended if code is not None]
        return ", ".join([cause.message, *others])


def _describe(rank: _Rank, code: int) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"rank {rank.number} (process {rank.process.pid}) {how}"


def _spawn(number: int) -> _Rank:
    """Standard output is the worker's own; what a rank prints goes to the log."""
    name = f"rank {number}"
    with contextlib.ExitStack() as on_failure:
        steps, steps_of_rank = pair(name)
        on_failure.callback(steps.close)
        kv, kv_of_rank = pair(name)
        on_failure.callback(kv.close)
        with steps_of_rank, kv_of_rank:
            process = _process(steps_of_rank.fileno(), kv_of_rank.fileno())
        on_failure.pop_all()
    return _Rank(number, process, steps, kv)


def _process(*fds: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "baton.engine.parallel.rank", *map(str, fds)]
    try:
        return subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=fds,
            env=os.environ | {"PYTHONPATH": _import_path()},
        )
    except OSError as exc:
        raise RankLost(f"a rank's process cannot be started: {exc}", hop="ranks") from exc


def _import_path() -> str:
    """This very package first, however this process came to find it."""
    own = str(Path(__file__).resolve().parents[3])
    return os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))

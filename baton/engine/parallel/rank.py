"""A rank other than 0: ``python -m baton.engine.parallel.rank``, started by rank 0 alone.

The main thread runs plans; a second one reads and writes KV beside them. Nothing outlives rank
0: the kernel ends this process with it, and so does the end of either channel.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

from baton.engine.executor import Executor
from baton.engine.parallel.channel import Channel
from baton.engine.parallel.group import find_store, join
from baton.engine.parallel.messages import (
    Failed,
    Join,
    KvDone,
    KvRange,
    KvRequest,
    PlanForRanks,
    ReadKv,
    Ready,
    Started,
    plan_of,
)
from baton.protocol.errors import BatonError, InternalError, RankLost

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


class StepCount:
    """How many steps are done, for a thread that has to wait for them."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._changed = threading.Condition()

    def add(self) -> None:
        with self._changed:
            self._num_steps += 1
            self._changed.notify_all()

    def wait_for(self, num_steps: int, deadline_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_steps >= num_steps, deadline_s):
                raise InternalError(f"step {num_steps} did not end within {deadline_s:g} s")


def serve_kv(kv: Channel, executor: Executor, done: StepCount, deadline_s: float) -> None:
    """Until rank 0 has closed its end; then, and on any error, the process ends."""
    code = 1
    try:
        while True:
            request: KvRequest = kv.receive(KvRequest, None)
            done.wait_for(request.range.num_steps, deadline_s)
            kv.send(KvDone(_answer(request, executor)), deadline_s)
    except RankLost:
        code = 0
    except Exception:
        log.exception("KV could not be read or written")
    finally:
        _end(code)


def _answer(request: KvRequest, executor: Executor) -> memoryview:
    r: KvRange = request.range
    place = (r.block_table, r.start, r.num_tokens, r.layer_start, r.num_layers)
    if isinstance(request, ReadKv):
        return executor.read_kv(*place)
    executor.write_kv(*place, request.payload)
    return memoryview(b"")


def run(steps: Channel, kv: Channel) -> None:
    """Until rank 0 has closed its end. Raises RankLost when another rank is gone."""
    told: Join = steps.receive(Join, None)
    try:
        executor = _load(told, steps)
    except RankLost:
        raise
    except BatonError as exc:
        steps.send(Failed(exc.code, exc.message), told.deadline_s)
        return
    steps.send(Ready(), told.deadline_s)
    done = StepCount()
    threading.Thread(
        target=serve_kv, args=(kv, executor, done, told.deadline_s), name="kv", daemon=True
    ).start()
    while True:
        try:
            told_plan = steps.receive(PlanForRanks, None)
        except RankLost:
            return
        executor.forward_logits(plan_of(told_plan))
        done.add()


def _load(told: Join, steps: Channel) -> Executor:
    """What is refused is refused before the others wait for this rank."""
    settings = told.settings
    spec, device = Executor.prepare(settings)
    steps.send(Started(), told.deadline_s)
    store = find_store(told.store_port, settings.num_ranks)
    group = join(
        store,
        settings.shard,
        spec.vocab_size,
        device,
        told.deadline_s,
        deterministic=settings.deterministic,
    )
    return Executor.load_part(settings, group)


def _die_with(parent: int) -> None:
    """A stopped process notices no closed channel, but it does notice this."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        _end(0)


def _end(code: int) -> NoReturn:
    """At once: collectives that wait for a rank that is gone would hold up an orderly end."""
    logging.shutdown()
    os._exit(code)


def main() -> NoReturn:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    steps_fd, kv_fd, parent = (int(word) for word in sys.argv[1:])
    # Said to all processes of a group, these two are for rank 0 to act on.
    for said in (signal.SIGINT, signal.SIGTERM):
        signal.signal(said, signal.SIG_IGN)
    _die_with(parent)
    code = 1
    try:
        run(
            Channel(socket.socket(fileno=steps_fd), "rank 0"),
            Channel(socket.socket(fileno=kv_fd), "rank 0"),
        )
        code = 0
    except RankLost as exc:
        log.error("this rank ends: %s", exc.message)
    except Exception:
        log.exception("this rank ends")
    finally:
        _end(code)


if __name__ == "__main__":
    main()

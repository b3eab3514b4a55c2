"""Ranks of a worker that die or fall silent: the worker ends, with a reason, and leaves nothing.

A step is caught in the middle by stopping a rank first: the others then wait for it in a
collective, for as long as the test likes (up to their deadline).
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from baton.engine.executor import Executor
from baton.engine.plan import SequenceChunk, StepPlan
from baton.protocol.config import KvTransferConfig, ModelConfig, PoolConfig
from baton.protocol.errors import BatonError, RankLost, Unavailable
from baton.protocol.sampling import SamplingParams
from baton.protocol.spec import WorkerSpec
from cluster.process_launcher import ProcessLauncher
from tests.support.clusters import (
    RESTART_S,
    assert_no_residue,
    running_cluster,
    tiny_config,
    until,
)
from tests.support.reference_streams import ReferenceStreams
from tests.support.tiny_checkpoint import TINY_LLAMA, write_checkpoint

GREEDY = SamplingParams(temperature=0.0)
WAIT_S = 60.0
SHORT_DEADLINE_S = 1.0
TORCH_FDS = 2
"""A pipe that torch opens once, with the first group of a process."""
FOUR_KV_HEADS = TINY_LLAMA | {"num_key_value_heads": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", FOUR_KV_HEADS)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = children_of(os.getpid())
    fds = psutil.Process().num_fds()
    yield
    assert set(children_of(os.getpid())) <= set(before)
    assert psutil.Process().num_fds() <= fds + TORCH_FDS


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def ranks_of(pid: int) -> list[psutil.Process]:
    return [p for p in children_of(pid) if "baton.engine.parallel.rank" in p.cmdline()]


def load(folder: Path, size: int, deadline_s: float) -> Executor:
    return Executor.load(
        folder,
        dtype="float32",
        device="cpu",
        num_blocks=16,
        block_size=8,
        num_threads=1,
        tensor_parallel=size,
        rank_deadline_s=deadline_s,
    )


def plan(step: int) -> StepPlan:
    return StepPlan(step, (SequenceChunk("s", (3, 4, 5), 0, (step,), True, GREEDY),))


class Step(threading.Thread):
    """One step on a thread of its own, as a worker runs it; ``error`` is what it raised."""

    def __init__(self, executor: Executor, number: int) -> None:
        super().__init__(name="engine")
        self._executor = executor
        self._number = number
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._executor.execute(plan(self._number))
        except BatonError as exc:
            self.error = exc

    def end(self) -> Exception | None:
        self.join(WAIT_S)
        assert not self.is_alive(), "the step still waits"
        return self.error


def shared_files(process: psutil.Process) -> set[str]:
    return {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm")}


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_killed_in_mid_step(folder: Path, size: int) -> None:
    before = shared_files(psutil.Process())
    executor = load(folder, size, WAIT_S)
    try:
        victim, *others = ranks_of(os.getpid())
        assert len(others) == size - 2
        executor.execute(plan(1))
        assert not shared_files(victim)
        assert shared_files(psutil.Process()) == before
        victim.send_signal(signal.SIGSTOP)
        step = Step(executor, 2)
        step.join(0.5)
        assert step.is_alive(), "it waits for the stopped rank"
        victim.send_signal(signal.SIGKILL)
        error = step.end()
        assert isinstance(error, RankLost)
        assert f"(process {victim.pid}) was ended by SIGKILL" in error.message
        with pytest.raises(RankLost, match="SIGKILL"):
            executor.execute(plan(3))
        with pytest.raises(RankLost, match="SIGKILL"):
            executor.read_kv((1,), 0, 3, 0, 1)
    finally:
        executor.close()


def test_a_rank_that_falls_silent_in_mid_step(folder: Path) -> None:
    """It is not dead, so only the deadline tells; closing ends it although it is stopped."""
    executor = load(folder, 2, SHORT_DEADLINE_S)
    try:
        (victim,) = ranks_of(os.getpid())
        victim.send_signal(signal.SIGSTOP)
        error = Step(executor, 1).end()
        assert isinstance(error, RankLost)
        assert "waited for the others in vain (deadline 1 s)" in error.message
        assert victim.status() == psutil.STATUS_STOPPED
    finally:
        executor.close()
    assert not victim.is_running()


def test_a_rank_that_is_silent_when_asked_for_kv(folder: Path) -> None:
    executor = load(folder, 2, SHORT_DEADLINE_S)
    try:
        executor.execute(plan(1))
        ranks_of(os.getpid())[0].send_signal(signal.SIGSTOP)
        with pytest.raises(RankLost, match="rank 1 was silent for 1 s"):
            executor.read_kv((1,), 0, 3, 0, 1)
    finally:
        executor.close()


def test_a_step_that_raises_on_rank_0_ends_the_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are in the middle of it: no later step could meet them."""
    executor = load(folder, 2, WAIT_S)

    def broken(*_: object) -> None:
        raise MemoryError("no room")

    try:
        monkeypatch.setattr(executor._decoder, "forward", broken)
        with pytest.raises(RankLost, match="rank 0 raised MemoryError: no room"):
            executor.execute(plan(1))
        monkeypatch.undo()
        with pytest.raises(RankLost, match="no room"):
            executor.execute(plan(2))
    finally:
        executor.close()


def worker_spec(folder: Path, role: str = "mixed") -> WorkerSpec:
    return WorkerSpec(
        worker_id="m-0",
        pool=msgspec.convert(
            {"name": "m", "role": role, "tensor_parallel": 2, "engine": {"num_blocks": 64}},
            PoolConfig,
        ),
        model=ModelConfig(path=str(folder), dtype="float32"),
        kv_transfer=KvTransferConfig(),
    )


def ignore(done: int, total: int) -> None:
    """Progress of loading."""


@pytest.mark.parametrize("role", ["mixed", "prefill"])
async def test_an_idle_worker_ends_with_its_rank(folder: Path, tmp_path: Path, role: str) -> None:
    async with ProcessLauncher(tmp_path) as launcher:
        worker = await launcher.start_worker(worker_spec(folder, role), ignore)
        (victim,) = ranks_of(worker.info.pid)
        victim.send_signal(signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            assert await worker.wait() == "exit code 1"
    log = (tmp_path / "m-0.log").read_text()
    assert f"m-0 ends: rank 1 (process {victim.pid}) was ended by SIGKILL" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_ranks_end_with_their_worker(
    folder: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Also one that is stopped, and so notices no closed channel."""
    async with ProcessLauncher(tmp_path) as launcher:
        worker = await launcher.start_worker(worker_spec(folder), ignore)
        (rank,) = ranks_of(worker.info.pid)
        if how == signal.SIGKILL:
            rank.send_signal(signal.SIGSTOP)
        os.kill(worker.info.pid, how)
        async with asyncio.timeout(WAIT_S):
            await worker.wait()
        await until(lambda: not is_alive(rank), "the rank is gone")


async def test_a_worker_killed_while_it_starts_leaves_no_rank(folder: Path, tmp_path: Path) -> None:
    async with ProcessLauncher(tmp_path) as launcher:
        starting = asyncio.ensure_future(launcher.start_worker(worker_spec(folder), ignore))
        await until(lambda: bool(ranks_of(os.getpid())), "a rank is starting")
        (rank,) = ranks_of(os.getpid())
        worker = rank.parent()
        assert worker is not None
        worker.kill()
        with pytest.raises(Unavailable):
            await starting
        await until(lambda: not is_alive(rank), "the rank is gone")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_streams_go_on_when_a_rank_is_killed_among_them(tmp_path: Path) -> None:
    """kill -9 of a rank while streams run: its worker counts as lost and is started again, with
    new ranks; the streams go on elsewhere, and no token is lost."""
    config = tiny_config()
    prefill, decode = config.pools
    split = msgspec.structs.replace(decode, name="s", tensor_parallel=2)
    config = msgspec.structs.replace(config, pools=(prefill, decode, split))
    async with running_cluster(config, tmp_path, supervise=True) as cluster:
        pid = cluster.pid_of("s-0")
        (victim,) = ranks_of(pid)
        async with ReferenceStreams(cluster, num_streams=4, max_tokens=200) as streams:
            assert streams.num_running == 4
            loads = await cluster.client.loads()
            assert {w.worker_id: w.num_running for w in loads.workers}["s-0"] > 0
            victim.kill()
            await until(lambda: not is_alive(victim), "the rank is dead")
            assert streams.num_running > 0, "it died while streams ran"
        streams.assert_exact()
        restarted = "the worker was started again"
        await until(lambda: cluster.pid_of("s-0") != pid, restarted, RESTART_S)
        assert len(ranks_of(cluster.pid_of("s-0"))) == 1
        assert not psutil.pid_exists(pid)
        cluster.idle_fds.clear()
        cluster.idle_tasks.clear()
        await assert_no_residue(cluster)
    assert "s-0 ends: rank 1" in (tmp_path / "s-0.log").read_text()

"""A system that was stopped gets a few attempts to answer, not more."""

import asyncio

import pytest

from benchmarks.engine.engine_process import EngineFailed
from benchmarks.peer.ask import WAKE_ATTEMPTS, wake
from benchmarks.peer.client_process import Client
from benchmarks.peer.job import Answered, Job
from benchmarks.peer.systems import System

SYSTEM = System("x", "", "1P+1D", 1, ())


class ScriptedClient(Client):
    """Fails so many jobs, then answers."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_jobs = 0

    async def run(self, job: Job) -> tuple[Answered, ...]:
        self.num_jobs += 1
        error = "connection reset" if self.num_jobs <= self.num_failures else ""
        return tuple(Answered(0.0, error=error) for _ in job.bodies)


def test_a_connection_that_is_out_of_date_is_forgiven() -> None:
    client = ScriptedClient(1)
    asyncio.run(wake(SYSTEM, client, [b"{}", b"{}"]))
    assert client.num_jobs == 2


def test_one_that_does_not_wake_is_an_error() -> None:
    client = ScriptedClient(WAKE_ATTEMPTS)
    with pytest.raises(EngineFailed, match=r"2 of 2 requests failed, .* connection reset"):
        asyncio.run(wake(SYSTEM, client, [b"{}", b"{}"]))
    assert client.num_jobs == WAKE_ATTEMPTS

"""The pacer that other tests and benchmarks trust: it must be as slow as it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.pacer import Bucket, paced


@contextmanager
def sink() -> Iterator[tuple[str, list[bytes]]]:
    """Says "." to every byte string of ``SIZE`` bytes that has come."""
    server = socket.create_server(("127.0.0.1", 0))
    received: list[bytes] = []

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(1 << 16):
                received.append(data)
                if sum(map(len, received)) % SIZE == 0:
                    connection.sendall(b".")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}", received
    finally:
        thread.join()
        server.close()


SIZE = 400_000


def seconds(connection: socket.socket, payload: bytes) -> float:
    began = time.monotonic()
    connection.sendall(payload)
    assert connection.recv(1) == b"."
    return time.monotonic() - began


def test_what_goes_through_is_the_same_and_takes_its_time() -> None:
    payload = bytes(range(256)) * (SIZE // 256) + b"x" * (SIZE % 256)
    with sink() as (target, received), paced(target, 16e6) as pacer:
        host, _, port = pacer.address.partition(":")
        with socket.create_connection((host, int(port))) as connection:
            fast = seconds(connection, payload)
            pacer.bytes_per_s = 5e5
            slow = seconds(connection, payload)
    assert b"".join(received) == payload * 2
    assert pacer.num_bytes == [2 * SIZE, 2]
    assert slow / fast > 3, f"{fast} s at 16 MB/s, {slow} s at 0.5 MB/s"


@pytest.mark.parametrize("size", [100, 10_000])
def test_a_bucket_lets_through_its_rate_and_no_more(size: int) -> None:
    bucket = Bucket(1e6)
    passed = [bucket.take(size, now=5.0) for _ in range(1_000)]
    assert passed == sorted(passed)
    assert passed[-1] - 5.0 == pytest.approx(size * 1_000 / 1e6, abs=0.003)
    assert bucket.take(1_000, now=1_000.0) == pytest.approx(1_000.0, abs=0.003), "saves up little"

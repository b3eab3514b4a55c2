"""The benchmark of KV transports measures every way there is. No times are asserted."""

from __future__ import annotations

import asyncio

from benchmarks import kv_transport
from benchmarks.kv_transport import measure


def test_every_way_is_measured(monkeypatch):
    monkeypatch.setattr(kv_transport, "KINDS", ("shared_memory",))
    rates = asyncio.run(measure(2, 2, 1, lambda line: None))
    assert [(r.way, r.lands, len(r.runs_gb_s)) for r in rates] == [
        ("memcpy", True, 2),
        ("socket", True, 2),
        ("shared_memory", False, 2),
        ("shared_memory", True, 2),
    ]
    assert all(min(r.runs_gb_s) > 0 for r in rates)

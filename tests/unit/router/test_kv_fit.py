"""Which prefill worker's KV a decode worker takes, and what is said when it takes none's."""

from __future__ import annotations

import msgspec
import pytest

from baton.protocol.layout import KvLayout
from baton.protocol.messages import HelloReply
from baton.protocol.spec import WorkerInfo
from router.kv_fit import goes_unchanged, kv_fit, why_none_fits
from router.members import Member, Members

LAYOUT = KvLayout.uniform(
    num_layers=2,
    num_kv_heads=1,
    head_dim=4,
    dtype="float32",
    model_digest="m",
    windows=(8, None),
)
OTHER_MODEL = msgspec.structs.replace(LAYOUT, model_digest="n")


def member(worker_id: str, layout: KvLayout, version: int = 2) -> Member:
    """As a router knows a worker that speaks that version."""
    role = {"p": "prefill", "d": "decode"}[worker_id[0]]
    info = WorkerInfo(worker_id=worker_id, incarnation="1", role=role, address="a", pid=1)
    reply = HelloReply("", version, worker_id, "1", role, layout.fingerprint(version))
    if version > 1:
        reply = msgspec.structs.replace(reply, layout=layout)
    members = Members(lease_s=10.0)
    members.announce(info, 0.0)
    members.greeted(worker_id, reply, 0.0)
    found = members.get(worker_id)
    assert found is not None
    return found


@pytest.mark.parametrize("prefill_version", [1, 2])
@pytest.mark.parametrize("decode_version", [1, 2])
def test_workers_of_both_versions_are_compared(prefill_version: int, decode_version: int) -> None:
    decode = member("d-0", LAYOUT, decode_version)
    equal = member("p-0", LAYOUT, prefill_version)
    assert goes_unchanged(equal, decode)
    assert not kv_fit(equal, decode).reason
    for layout in (OTHER_MODEL, LAYOUT.with_dtype("float16")):
        other = member("p-1", layout, prefill_version)
        assert not goes_unchanged(other, decode)
        found = kv_fit(other, decode)
        is_cast = layout is not OTHER_MODEL and prefill_version == decode_version == 2
        assert (found.is_cast, bool(found.reason)) == (is_cast, not is_cast)


def test_layouts_that_version_1_cannot_tell_apart_are_told_apart() -> None:
    wider = KvLayout.uniform(
        num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32", model_digest="m", windows=(9, 9)
    )
    prefill, decode = member("p-0", wider), member("d-0", LAYOUT)
    assert prefill.fingerprint == decode.fingerprint
    assert not goes_unchanged(prefill, decode)


def test_the_reason_is_that_of_the_pair_that_comes_nearest() -> None:
    decodes = [member("d-0", OTHER_MODEL), member("d-1", LAYOUT)]
    text = why_none_fits([member("p-0", LAYOUT.with_dtype("float16"))], decodes)
    assert text == (
        "no prefill worker's KV layout fits a decode worker's: p-0 to d-1: dtype float16 at the "
        "prefill end, float32 at the decode end; start both with one dtype"
    )
    text = why_none_fits([member("p-0", LAYOUT)], decodes[:1])
    assert text.endswith("p-0 to d-0: model m at the prefill end, n at the decode end")
    text = why_none_fits([member("p-0", LAYOUT, 1)], decodes[:1])
    assert "model folder, dtype or version differ" in text

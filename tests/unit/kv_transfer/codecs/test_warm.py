"""Warming up leaves nothing to compile, and a machine without a place for caches still compiles."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from baton.protocol.layout import KvLayout
from kv_transfer.codecs import (
    float_forms_compiled,
    float_values,
    fp8_compiled,
    int_groups,
    nibbles,
    rans_compiled,
    rans_tables,
    split_compiled,
    symbol_counts,
)
from kv_transfer.codecs.jit import kernel
from kv_transfer.codecs.registry import WITHOUT_PROFILE, make
from kv_transfer.coding import KvCoding
from tests.support.kv_samples import DTYPES, PART, Geometry, kv_like

MODULES = (
    float_forms_compiled,
    float_values,
    fp8_compiled,
    int_groups,
    nibbles,
    rans_compiled,
    rans_tables,
    split_compiled,
    symbol_counts,
)


def num_compiled() -> int:
    dispatchers = [v for m in MODULES for v in vars(m).values() if hasattr(v, "signatures")]
    assert len(dispatchers) > 20
    return sum(len(d.signatures) for d in dispatchers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_warming_up_nothing_is_left_to_compile(dtype):
    geometry = Geometry(dtype, 2, 16)
    codecs = [make(name, geometry) for name in WITHOUT_PROFILE]
    layout = KvLayout.uniform(
        num_layers=2, num_kv_heads=2, head_dim=16, dtype=dtype, model_digest="m"
    )
    coding = KvCoding(layout)
    for name in WITHOUT_PROFILE:
        coding.try_out(name)
    coding.close()
    before = num_compiled()
    kv = kv_like(geometry, 3, 600)
    for codec in codecs:
        out = np.empty_like(kv)
        stream = codec.encode(kv, PART)
        for arrived in (stream, bytes(stream), bytearray(stream)):
            codec.decode(arrived, PART, out)
    assert num_compiled() == before


def test_without_a_place_for_caches_kernels_are_compiled_all_the_same(monkeypatch):
    compile_ = numba.njit

    def njit(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    monkeypatch.setattr(numba, "njit", njit)

    @kernel
    def doubled(x):
        return 2 * x

    assert doubled(4) == 8
    assert doubled.signatures

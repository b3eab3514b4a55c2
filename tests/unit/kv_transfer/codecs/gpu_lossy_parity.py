"""The lossy codecs' kernels write and read the host's streams, bit for bit; see ``gpu_parity``."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from kv_transfer.codecs.contract import CodecError, KvPart
from kv_transfer.codecs.gpu.floats import TORCH_DTYPES, bits_of
from kv_transfer.codecs.gpu.lossy_codec import GpuLossyCodec
from kv_transfer.codecs.lossy import LossyCodec
from kv_transfer.codecs.lossy_profile import Profile
from tests.support.kv_profiles import Geometry, Source

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TOKENS = 300 if torch.cuda.is_available() else 3
"""Triton's interpreter decodes some hundred symbols a second."""
PART = KvPart(0, 36, 36 + NUM_TOKENS)


@cache
def source(dtype: str, groups: int, pairs: int) -> Source:
    return Source(Geometry(dtype), 2, groups, pairs)


@cache
def profile(groups: int, pairs: int) -> Profile:
    return source("bfloat16", groups, pairs).profile()


@pytest.mark.parametrize(
    ("dtype", "groups", "pairs", "level"),
    [("bfloat16", 1, 8, "kv4"), ("float16", 2, 4, "kv1"), ("float32", 1, 0, "kv3")],
)
def test_streams_are_the_hosts(dtype: str, groups: int, pairs: int, level: str) -> None:
    made = source(dtype, groups, pairs)
    kv = made.kv(NUM_TOKENS, seed=1)
    flat = kv.view(np.float32 if dtype == "float32" else np.uint16)
    flat[0, 0, 1, 1, 3] = np.float32(np.nan) if dtype == "float32" else 0x7FC1
    host = LossyCodec(made.geometry, profile(groups, pairs), level)
    device = GpuLossyCodec(made.geometry, profile(groups, pairs), level)
    signed = kv.view(np.int32 if dtype == "float32" else np.int16).copy()
    on_device = torch.from_numpy(signed).view(TORCH_DTYPES[dtype]).to(DEVICE)
    stream = bytes(host.encode(kv, PART))
    assert bytes(device.encode(on_device, PART)) == stream
    expected, out = np.empty_like(kv), torch.zeros_like(on_device)
    host.decode(stream, PART, expected)
    device.decode(stream, PART, out)
    assert bits_of(out).cpu().numpy().tobytes() == expected.tobytes()


def test_a_frame_cut_short_is_refused() -> None:
    made = source("bfloat16", 1, 8)
    kv = made.kv(NUM_TOKENS, seed=2)
    stream = bytes(LossyCodec(made.geometry, profile(1, 8), "kv2").encode(kv, PART))
    device = GpuLossyCodec(made.geometry, profile(1, 8), "kv2")
    out = torch.zeros(kv.shape, dtype=torch.bfloat16, device=DEVICE)
    for length in (0, 40, len(stream) - 4):
        with pytest.raises(CodecError):
            device.decode(stream[:length], PART, out)

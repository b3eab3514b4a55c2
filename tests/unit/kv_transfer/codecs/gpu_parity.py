"""The Triton kernels write and read the host's streams, bit for bit.

Collected by name: in Triton's interpreter by ``tests/integration/test_codec_kernels.py``, on a
GPU by ``test_on_gpu``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kv_transfer.codecs import entropy_layer, rans, rans_compiled
from kv_transfer.codecs.container import header_for
from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.gpu import codecs as gpu
from kv_transfer.codecs.gpu import floats
from kv_transfer.codecs.gpu import rans as gpu_rans
from kv_transfer.codecs.gpu.floats import TORCH_DTYPES
from kv_transfer.codecs.registry import make
from tests.support.kv_samples import DTYPES, PART, Geometry, bits, kv_like, random_bits, sealed

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = ((1, 1, 1, 1), (2, 70, 1, 5), (2, 90, 2, 16), (1, 3, 3, 7))
"""Layers, tokens, heads, head_dim."""
REAL_SHAPE = (4, 1000, 8, 128)


def tensor(kv: NDArray, dtype: str) -> torch.Tensor:
    signed = kv.view(np.int32 if dtype == "float32" else np.int16)
    return torch.from_numpy(signed.copy()).view(TORCH_DTYPES[dtype]).to(DEVICE)


def shapes() -> list[tuple[int, ...]]:
    return [*SHAPES, *([REAL_SHAPE] if ON_GPU else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", gpu.NAMES)
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_streams_are_the_hosts(name, dtype, shape, monkeypatch):
    layers, tokens, heads, dim = shape
    # The interpreter takes its time for every step of a lane: more lanes, fewer steps.
    monkeypatch.setattr(entropy_layer, "lanes_for", lambda n: 64)
    geometry = Geometry(dtype, heads, dim)
    kv = kv_like(geometry, layers + 1, tokens)
    kv[-1] = random_bits(geometry, 1, tokens, seed=2)[0]
    host, device = make(name, geometry), gpu.make(name, geometry)
    stream = host.encode(kv, PART)
    on_device = tensor(kv, dtype)
    assert bytes(device.encode(on_device, PART)) == bytes(stream)
    expected, out = np.empty_like(kv), torch.zeros_like(on_device)
    host.decode(stream, PART, expected)
    device.decode(stream, PART, out)
    assert floats.bits_of(out).cpu().numpy().tobytes() == bits(expected)


def test_entropy_with_four_tables_for_each_is_the_hosts(monkeypatch):
    monkeypatch.setattr(entropy_layer, "lanes_for", lambda n: 128)
    monkeypatch.setattr(entropy_layer, "_CLASSES_FROM_ELEMENTS", 512)
    geometry = Geometry("bfloat16", 1, 40)
    kv = kv_like(geometry, 2, 17)
    stream = make("entropy", geometry).encode(kv, PART)
    on_device, codec = tensor(kv, "bfloat16"), gpu.make("entropy", geometry)
    assert bytes(codec.encode(on_device, PART)) == bytes(stream)
    out = torch.zeros_like(on_device)
    codec.decode(stream, PART, out)
    assert torch.equal(floats.bits_of(out), floats.bits_of(on_device))


@pytest.mark.parametrize("name", gpu.NAMES)
@pytest.mark.parametrize("section", [b"", b"\xff" * 64, bytes(64), bytes(40), b"\x01" * 200])
def test_nonsense_is_refused_as_on_the_host(name, section):
    geometry = Geometry("bfloat16", 2, 16)
    kv = kv_like(geometry, 1, 3)
    stream = sealed(header_for(name, geometry, kv), [section])
    with pytest.raises(CodecError):
        make(name, geometry).decode(stream, PART, kv)
    with pytest.raises(CodecError):
        gpu.make(name, geometry).decode(stream, PART, tensor(kv, "bfloat16"))


def test_too_few_escapes_are_noticed():
    geometry = Geometry("bfloat16", 1, 40)
    kv = kv_like(geometry, 1, 50)
    header = header_for("split", geometry, kv)
    plain = bytes(make("split", geometry).encode(kv, PART))
    section = bytearray(plain[44 : 44 + int.from_bytes(plain[32:36], "little")])
    section[8:40] = b"\xff" * 32
    with pytest.raises(CodecError, match="escapes"):
        gpu.make("split", geometry).decode(
            sealed(header, [bytes(section)]), PART, tensor(kv, "bfloat16")
        )


@pytest.mark.parametrize(
    ("n", "num_lanes"),
    [(1, 1), (9, 1), (31, 4), (33, 32), (300, 32), *([(200_000, 64)] if ON_GPU else [])],
)
def test_rans_streams_are_the_hosts(n, num_lanes):
    rng = np.random.default_rng(n)
    counts = 1e6 * np.exp(-np.abs(np.arange(12) - 6) * (0.1 + np.arange(5)[:, None]))
    tables = rans.RansTables(rans.normalise(np.ceil(counts)))
    index = rng.integers(0, 5, (3, 7)).astype(np.uint8)
    rows = np.stack([np.resize(row, n) for row in index])
    symbols = tables.symbol_of[rows, rng.integers(0, rans.PROB_SCALE, (3, n))]
    on_device = gpu_rans.DeviceTables(tables, DEVICE)
    up = [torch.from_numpy(a).to(DEVICE) for a in (symbols, index)]
    words, num_words, states = gpu_rans.encode(*up, on_device, num_lanes)
    kept = [words[run, : num_words[run]] for run in range(3)]
    for run in range(3):
        coded = rans_compiled.encode(symbols[run], index[run], tables, num_lanes)
        found = kept[run].cpu().numpy().tobytes() + states[run].cpu().numpy().tobytes()
        assert found == coded.tobytes()
    joined = torch.cat([*kept, torch.zeros(1, dtype=torch.int16, device=DEVICE)])
    offsets = (num_words.cumsum(0) - num_words).to(torch.int64)
    out = torch.zeros_like(up[0])
    arguments = (joined, offsets, num_words, states, up[1], on_device, out)
    assert gpu_rans.decode(*arguments).tolist() == [1, 1, 1]
    assert bool((out == up[0]).all())
    states[1, 0] ^= 5
    assert gpu_rans.decode(*arguments).tolist()[1] == 0


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_rans_stream_without_all_its_words_is_noticed(taken):
    tables = rans.RansTables(np.full((1, 16), 256))
    symbols = np.random.default_rng(1).integers(0, 16, 64).astype(np.uint8)
    coded = rans_compiled.encode(symbols, np.zeros(1, np.uint8), tables, 4)
    words = torch.from_numpy(coded[:-16].view("<i2").copy()).to(DEVICE)
    states = torch.from_numpy(coded[-16:].view("<i4").copy()).to(DEVICE).view(1, 4)
    out = torch.zeros((1, 64), dtype=torch.uint8, device=DEVICE)
    is_whole = gpu_rans.decode(
        words,
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.tensor([taken], dtype=torch.int32, device=DEVICE),
        states,
        torch.zeros((1, 1), dtype=torch.uint8, device=DEVICE),
        gpu_rans.DeviceTables(tables, DEVICE),
        out,
    )
    assert is_whole.tolist() == [0]

"""The compiled kernels against float64 and the plain-torch contracts, and against themselves:
a row's result is the same to the bit in any company and with any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from baton.engine.kernels.compiled.library import Gate, Library, load_library
from baton.engine.kernels.paged_prefill_attention import paged_prefill_attention_reference
from baton.engine.kernels.rms_norm import rms_norm_reference
from baton.engine.kernels.rotate import rotate_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_ROWS = [1, 2, 3, 4, 7, 13, 61, 250]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def library(request: pytest.FixtureRequest) -> Library:
    return load_library(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten shows as NaN."""
    monkeypatch.setattr(torch, "empty", lambda size: torch.full(size, float("nan")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (17, 5), (48, 64), (100, 401), (33, 900)])
def test_products(
    library: Library,
    dtype: torch.dtype,
    columns: int,
    depth: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = (torch.randn(columns, depth) / depth**0.5).to(dtype)
    matrix, bias = library.pack(weight), torch.randn(columns)
    poisoned_empty(monkeypatch)
    for num_rows in NUM_ROWS:
        rows, residual = torch.randn(num_rows, depth), torch.randn(num_rows, columns)
        exact = linear(rows.double(), weight.double())
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(library.linear(rows, matrix), exact.float(), **close)
        whole = library.linear(rows, matrix, bias, residual)
        torch.testing.assert_close(whole, (exact + bias + residual).float(), **close)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [1, 8, 21, 70])
def test_gated_products(library: Library, gate: Gate, inner: int) -> None:
    weight, bias = torch.randn(2 * inner, 40) / 6, torch.randn(2 * inner)
    matrix = library.pack(weight, gate)
    for num_rows in NUM_ROWS:
        rows = torch.randn(num_rows, 40)
        g, u = linear(rows.double(), weight.double(), bias.double()).chunk(2, dim=-1)
        activated = silu(g) if gate == "silu" else gelu(g, approximate="tanh")
        found = library.linear(rows, matrix, bias)
        torch.testing.assert_close(found, (activated * u).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_does_not_know_its_neighbours(library: Library, dtype: torch.dtype) -> None:
    matrix = library.pack(torch.randn(100, 901).to(dtype))
    rows = torch.randn(250, 901)
    together = load_library(1).linear(rows, matrix)
    for first, count in ((0, 1), (249, 1), (5, 2), (100, 3), (17, 6), (30, 64), (0, 250)):
        some = library.linear(rows[first : first + count], matrix)
        assert torch.equal(some, together[first : first + count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_table(library: Library, dtype: torch.dtype) -> None:
    table = torch.randn(83, 12).to(dtype)
    numbers = torch.tensor([0, 82, 7, 8, 15, 16, 31, 7])
    assert torch.equal(library.rows(library.pack(table), numbers), table[numbers].float())


@pytest.mark.parametrize("width", [1, 8, 13, 100])
def test_norms(library: Library, width: int) -> None:
    weight = torch.randn(width)
    for num_rows in (1, 9, 40):
        rows, residual = torch.randn(num_rows, width), torch.randn(num_rows, width)
        expected, _ = rms_norm_reference(rows, weight, 1e-5, None)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(library.rms_norm(rows, weight, 1e-5), expected, **close)
        added = library.rms_norm(rows, weight, 1e-5, residual)
        torch.testing.assert_close(added, expected + residual, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (96, 48), (20, 10)])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_turned_and_stored(
    library: Library, dtype: torch.dtype, dim: int, rotated: int, normed: bool
) -> None:
    num_heads, num_kv_heads, block_size = 6, 3, 4
    for num_rows in (1, 11):
        qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * dim)
        angles = torch.randn(num_rows, rotated // 2)
        cos, sin = angles.cos(), angles.sin()
        norms = (torch.randn(dim), torch.randn(dim)) if normed else None
        slots = torch.randperm(20)[:num_rows]
        slots[num_rows // 2] = -1
        blocks = [torch.full((5, block_size, num_kv_heads, dim), 7.0).to(dtype) for _ in "kv"]
        q, k, v = torch.split(
            qkv.clone().view(num_rows, -1, dim), [num_heads, num_kv_heads, num_kv_heads], dim=1
        )
        if norms is not None:
            q = rms_norm_reference(q, norms[0], 1e-6, None)[0]
            k = rms_norm_reference(k, norms[1], 1e-6, None)[0]
        q, k = rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)
        library.place_heads(qkv, num_heads, cos, sin, norms, 1e-6, blocks[0], blocks[1], slots)
        turned = qkv.view(num_rows, -1, dim)[:, :num_heads]
        torch.testing.assert_close(turned, q, rtol=1e-5, atol=1e-5)
        kept = slots >= 0
        for stored, rows in zip(blocks, (k, v), strict=True):
            flat = stored.flatten(0, 1)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            found = flat[slots[kept]].float()
            torch.testing.assert_close(found, rows[kept], rtol=tolerance, atol=tolerance)
            others = torch.ones(20, dtype=torch.bool).index_fill_(0, slots[kept], False)
            assert (flat[others] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_as_torch_does(library: Library, dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow, infinities: all bit patterns near what the type can hold."""
    steps = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    odd = torch.tensor([float("inf"), float("-inf"), 65519.9, 65520.0, 1e-8, 6e-8, 3.4e38, -0.0])
    halves = torch.nextafter(steps, steps + 1) if dtype == torch.float16 else steps * 1.00195
    values = torch.cat((steps, halves, odd))
    values = values[~values.isnan()]
    dim = 64
    values = torch.cat((values, torch.zeros(-len(values) % dim))).view(-1, 1, dim)
    num_rows = len(values)
    qkv = torch.cat((torch.zeros(num_rows, 2, dim), values), dim=1).flatten(1).contiguous()
    blocks = [torch.zeros(num_rows, 1, 1, dim, dtype=dtype) for _ in "kv"]
    cos, sin = torch.ones(num_rows, 1), torch.zeros(num_rows, 1)
    library.place_heads(qkv, 1, cos, sin, None, 1e-6, blocks[0], blocks[1], torch.arange(num_rows))
    assert torch.equal(blocks[1].flatten(), values.flatten().to(dtype))


class Paged:
    """Sequences scattered over blocks; what no context covers is NaN."""

    def __init__(
        self,
        contexts: list[int],
        num_kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        block_size: int = 16,
    ) -> None:
        num_blocks = [-(-c // block_size) for c in contexts]
        order = torch.randperm(sum(num_blocks) + 3).int()
        shape = (len(order), block_size, num_kv_heads, dim)
        self.keys, self.values = (torch.full(shape, float("nan")).to(dtype) for _ in "kv")
        self.tables = torch.full((len(contexts), max(num_blocks)), 1_000_000, dtype=torch.int32)
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        for row, (context, count) in enumerate(zip(contexts, num_blocks, strict=True)):
            blocks, order = order[:count], order[count:]
            self.tables[row, :count] = blocks
            slots = (blocks.long()[:, None] * block_size + torch.arange(block_size)).flatten()
            for stored in (self.keys, self.values):
                rows = torch.randn(context, num_kv_heads, dim).to(dtype)
                stored.flatten(0, 1)[slots[:context]] = rows

    def attend(
        self,
        library: Library,
        q: Tensor,
        num_rows: list[int],
        *,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        found = library.attention(
            q.flatten(1),
            q.shape[1],
            self.keys,
            self.values,
            self.tables,
            torch.tensor([0, *num_rows]).cumsum(0).int(),
            self.contexts,
            scale=0.1,
            window=window,
            soft_cap=soft_cap,
        )
        return found.view(q.shape)


CONTEXTS, ROWS = [1, 15, 16, 65, 130, 200, 64, 129], [1, 15, 3, 1, 100, 200, 64, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "num_kv_heads", "group"), [(64, 2, 3), (96, 1, 8), (128, 4, 1), (20, 2, 2)]
)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (17, None), (100, 5.0)])
def test_attention(
    dtype: torch.dtype,
    dim: int,
    num_kv_heads: int,
    group: int,
    window: int | None,
    soft_cap: float | None,
) -> None:
    library = load_library(1)
    paged = Paged(CONTEXTS, num_kv_heads, dim, dtype)
    q = torch.randn(sum(ROWS), num_kv_heads * group, dim)
    found = paged.attend(library, q, ROWS, window=window, soft_cap=soft_cap)
    expected = paged_prefill_attention_reference(
        q,
        paged.keys,
        paged.values,
        paged.tables,
        torch.tensor([0, *ROWS]).cumsum(0).int(),
        paged.contexts,
        scale=0.1,
        window=window,
        soft_cap=soft_cap,
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_attention_of_a_row_does_not_know_its_chunk(
    library: Library, window: int | None, dim: int, group: int
) -> None:
    context = 300
    paged = Paged([context], 2, dim, torch.bfloat16)
    q = torch.randn(context, 2 * group, dim)
    whole = paged.attend(load_library(1), q, [context], window=window)
    start = 0
    for count in (1, 70, 2, 100, 1, 126):
        paged.contexts = torch.tensor([start + count], dtype=torch.int32)
        part = paged.attend(library, q[start : start + count], [count], window=window)
        assert torch.equal(part, whole[start : start + count])
        start += count


def test_attention_of_a_row_does_not_know_the_batch(library: Library) -> None:
    paged = Paged(CONTEXTS, 2, 64, torch.float32)
    q = torch.randn(len(CONTEXTS), 4, 64)
    together = paged.attend(load_library(1), q, [1] * len(CONTEXTS))
    tables, contexts = paged.tables, paged.contexts
    for row in range(len(CONTEXTS)):
        paged.tables, paged.contexts = tables[row : row + 1], contexts[row : row + 1]
        assert torch.equal(paged.attend(library, q[row : row + 1], [1])[0], together[row])

"""What two workers must agree on, and how they tell whether they do."""

from __future__ import annotations

import msgspec
import pytest

from baton.protocol.errors import InternalError
from baton.protocol.layout import FITS, KvGroup, KvLayout, fit

LAYOUT = KvLayout.uniform(
    num_layers=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", model_digest="0123abcd"
)
WINDOWS = (8, None, 8, 8, None, 4)
SLIDING = KvLayout.uniform(
    num_layers=6, num_kv_heads=2, head_dim=4, dtype="float32", model_digest="m", windows=WINDOWS
)
MIXED = KvLayout(
    groups=(
        KvGroup(layers=(0, 2), num_kv_heads=2, head_dim=8),
        KvGroup(layers=(1,), num_kv_heads=1, head_dim=16, window=3),
    ),
    dtype="float16",
    model_digest="m",
)


def test_bytes_of_a_token() -> None:
    assert LAYOUT.bytes_per_token_layer == 2 * 2 * 64 * 2
    assert LAYOUT.bytes_per_token == 4 * 512
    assert LAYOUT.with_dtype("float32").bytes_per_token == 2 * LAYOUT.bytes_per_token
    assert MIXED.bytes_per_token == 2 * 2 * (2 * 2 * 8 + 1 * 16)
    assert [MIXED.row_bytes(group) for group in MIXED.groups] == [64, 64]


def test_layers_of_one_window_make_a_group() -> None:
    assert [(g.layers, g.window, g.kind) for g in SLIDING.groups] == [
        ((0, 2, 3), 8, "sliding"),
        ((1, 4), None, "full"),
        ((5,), 4, "sliding"),
    ]
    assert (SLIDING.num_layers, SLIDING.num_kv_heads, SLIDING.head_dim) == (6, 2, 4)
    assert [g.runs for g in SLIDING.groups] == [[(0, 1), (2, 2)], [(1, 1), (4, 1)], [(5, 1)]]
    assert [g.runs for g in LAYOUT.groups] == [[(0, 4)]]


@pytest.mark.parametrize("window", [1, 2, 5, 8, 100])
def test_a_window_needs_what_the_next_token_sees(window: int) -> None:
    """The next token and those behind it, by the rule that attention has."""
    group = KvGroup(layers=(0,), num_kv_heads=1, head_dim=2, window=window)
    for num_tokens in range(30):
        seen = [
            key
            for query in range(num_tokens, num_tokens + 40)
            for key in range(num_tokens)
            if query - key < window
        ]
        assert group.needed_from(num_tokens) == min(seen, default=num_tokens)


def test_all_layers_are_complete_where_the_shortest_window_begins() -> None:
    assert [g.needed_from(20) for g in SLIDING.groups] == [13, 0, 17]
    assert SLIDING.complete_from(20) == 17
    assert SLIDING.complete_from(3) == 0
    assert LAYOUT.complete_from(20) == 0


def test_layers_of_several_shapes_have_no_shape_in_common() -> None:
    for ask in (
        lambda: MIXED.num_kv_heads,
        lambda: MIXED.head_dim,
        lambda: MIXED.bytes_per_token_layer,
        lambda: MIXED.fingerprint(1),
        lambda: MIXED.spoken(1),
    ):
        with pytest.raises(InternalError, match="layers of 2 shapes"):
            ask()
    assert MIXED.num_layers == 3


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "layers from 0 once each"),
        ([(0, 1), (1, 2)], "layers from 0 once each"),
        ([(1, 2)], "layers from 0 once each"),
        ([(0, 3)], "layers from 0 once each"),
        ([(1,), (0,)], "order of their first layers"),
        ([(0, 2, 1)], "ascend"),
        ([()], "ascend"),
        ([(-1, 0)], "ascend"),
        ([tuple(range(1_025))], "layers from 0 once each"),
    ],
)
def test_groups_that_are_no_model_are_refused(groups: list[tuple[int, ...]], message: str) -> None:
    """By whoever builds one, and by a decoder of what a peer sent."""
    given = [{"layers": layers, "num_kv_heads": 1, "head_dim": 2} for layers in groups]
    with pytest.raises(ValueError, match=message):
        KvLayout(
            groups=tuple(KvGroup(**fields) for fields in given),  # type: ignore[arg-type]
            dtype="float32",
            model_digest="m",
        )
    body = msgspec.msgpack.encode({"groups": given, "dtype": "float32", "model_digest": "m"})
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.msgpack.decode(body, type=KvLayout)


@pytest.mark.parametrize(
    "change", [{"window": 0}, {"window": -3}, {"head_dim": 0}, {"num_kv_heads": 0}]
)
def test_sizes_below_one_are_refused(change: dict[str, int]) -> None:
    fields = {"num_kv_heads": 1, "head_dim": 2} | change
    with pytest.raises(ValueError, match="at least 1"):
        KvGroup(layers=(0,), **fields)


def test_a_dtype_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="'int8'; known: float32"):
        LAYOUT.with_dtype("int8")


@pytest.mark.parametrize("layout", [LAYOUT, SLIDING, MIXED])
def test_a_layout_survives_the_wire(layout: KvLayout) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KvLayout) == layout


def test_the_fingerprints_are_stable() -> None:
    """Peers of other builds compare them: a change of these digits is a change of the wire."""
    assert LAYOUT.fingerprint(1) == "f1d7be27927fbed1"
    assert LAYOUT.fingerprint(2) == "1930bf8a3c15ca23"
    assert LAYOUT.fingerprint() == LAYOUT.fingerprint(2)
    assert SLIDING.fingerprint() == "1d489cc9930fe046"


def test_version_1_knows_no_windows() -> None:
    whole = KvLayout.uniform(
        num_layers=6, num_kv_heads=2, head_dim=4, dtype="float32", model_digest="m"
    )
    assert SLIDING.spoken(1) == whole
    assert SLIDING.fingerprint(1) == whole.fingerprint(1)
    assert SLIDING.spoken(2) == SLIDING
    assert SLIDING.fingerprint(2) != whole.fingerprint(2)


def changed(layout: KvLayout, **fields: object) -> KvLayout:
    """Fields of the layout, or of its first group."""
    of_group = {name: fields.pop(name) for name in ("num_kv_heads", "head_dim") if name in fields}
    first = msgspec.structs.replace(layout.groups[0], **of_group)
    return msgspec.structs.replace(layout, groups=(first, *layout.groups[1:]), **fields)


OTHERS = {
    "layers": msgspec.structs.replace(
        LAYOUT, groups=(msgspec.structs.replace(LAYOUT.groups[0], layers=(0, 1, 2, 3, 4)),)
    ),
    "kv heads": changed(LAYOUT, num_kv_heads=1),
    "head_dim": changed(LAYOUT, head_dim=32),
    "dtype": LAYOUT.with_dtype("float16"),
    "model": changed(LAYOUT, model_digest="0123abce"),
    "arithmetic": changed(LAYOUT, arithmetic="kernels-1/torch-2.13/tp-1"),
    "window": msgspec.structs.replace(
        LAYOUT, groups=(msgspec.structs.replace(LAYOUT.groups[0], window=16),)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_each_field_changes_the_fingerprint(name: str) -> None:
    other = OTHERS[name]
    assert other.fingerprint() != LAYOUT.fingerprint()
    assert len(other.fingerprint()) == 16
    assert (other.fingerprint(1) == LAYOUT.fingerprint(1)) == (name == "window")


def test_which_layers_slide_changes_the_fingerprint() -> None:
    layouts = [
        KvLayout.uniform(
            num_layers=3, num_kv_heads=1, head_dim=2, dtype="float32", model_digest="m", windows=w
        )
        for w in ((4, None, 4), (4, 4, None), (None, 4, 4), (4, 4, 4), (5, None, 5), ())
    ]
    assert len({layout.fingerprint() for layout in layouts}) == len(layouts)
    reasons = [fit(layouts[0], other).reason for other in layouts[1:]]
    assert all(reasons)
    assert reasons[0] == (
        "KV of sliding layers 0,2 of window 4 with 1 heads of 2; full layers 1 with 1 heads of 2 "
        "at the prefill end, sliding layers 0-1 of window 4 with 1 heads of 2; full layers 2 with "
        "1 heads of 2 at the decode end"
    )


@pytest.mark.parametrize("name", OTHERS)
def test_only_another_dtype_still_fits(name: str) -> None:
    found = fit(LAYOUT, OTHERS[name])
    assert found.is_cast == (name == "dtype")
    assert bool(found.reason) == (name != "dtype")
    assert fit(LAYOUT, msgspec.structs.replace(LAYOUT)) == FITS


@pytest.mark.parametrize(("num_ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_ranks_share_the_heads(num_ranks: int, heads: int) -> None:
    whole = KvLayout.uniform(
        num_layers=3,
        num_kv_heads=4,
        head_dim=2,
        dtype="float32",
        model_digest="",
        windows=(2, 2, 5),
    )
    part = whole.of_rank(num_ranks)
    assert part.num_kv_heads == heads
    assert [g.layers for g in part.groups] == [g.layers for g in whole.groups]


def test_the_fingerprint_covers_every_field() -> None:
    """Whoever adds one must say above what it changes."""
    assert len(msgspec.structs.fields(KvLayout)) == 4
    assert len(msgspec.structs.fields(KvGroup)) == 4

"""What KV looks like, as data: both ends of a transfer must agree on it.

A layout is a list of groups: layers of one shape and one reach. The bytes of a rectangle of
KV are a C-contiguous array of shape ``[layers, 2 (K, V), tokens, kv_heads, head_dim]``, in the
order of the model's layers. Block size and tensor parallelism are private matters of each side:
rectangles are cut by tokens and hold the heads of the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import msgspec

from baton.protocol.errors import InternalError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LAYOUT_VERSION = 2
"""Wire version 1 knew only layouts of one group; see ``KvLayout.fingerprint``."""
MAX_LAYERS = 1_024


class KvGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers of equal shape and reach.

    layers: ascending numbers in the model; a few runs of neighbours, or every other one.
    window: how many newest tokens, itself included, a token sees; None for all.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        if not self.layers or any(low >= high for low, high in pairwise((-1, *self.layers))):
            raise ValueError(f"a KV group's layers must be numbers that ascend, not {self.layers}")
        if min(self.num_kv_heads, self.head_dim, 1 if self.window is None else self.window) < 1:
            raise ValueError(
                f"a KV group needs kv_heads {self.num_kv_heads}, head_dim {self.head_dim} and "
                f"window {self.window} of at least 1"
            )

    @property
    def kind(self) -> Literal["full", "sliding"]:
        return "full" if self.window is None else "sliding"

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first layer, number of layers) of neighbours in the model: what one rectangle, and so
        one frame, can hold."""
        found: list[tuple[int, int]] = []
        for layer in self.layers:
            first, count = found[-1] if found else (layer, 0)
            if layer == first + count:
                found[-1:] = [(first, count + 1)]
            else:
                found.append((layer, 1))
        return found

    def needed_from(self, num_tokens: int) -> int:
        """Position of the oldest row that the tokens behind the first ``num_tokens`` look at;
        ``num_tokens`` where they look at none."""
        return 0 if self.window is None else max(0, num_tokens - self.window + 1)


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """groups: in the order of their first layers; together every layer of the model once.

    model_digest: identifies weights and config, so that only equal models exchange KV.
    arithmetic: in deterministic mode the class of workers whose results agree to the bit
    (kernels, machine, libraries, tensor parallelism); otherwise empty.
    """

    groups: tuple[KvGroup, ...]
    dtype: str
    model_digest: str
    arithmetic: str = ""

    def __post_init__(self) -> None:
        layers = sorted(layer for group in self.groups for layer in group.layers)
        if not 0 < len(layers) <= MAX_LAYERS or layers != list(range(len(layers))):
            raise ValueError("a KV layout's groups must hold the layers from 0 once each")
        if [g.layers[0] for g in self.groups] != sorted(g.layers[0] for g in self.groups):
            raise ValueError("a KV layout's groups must be in the order of their first layers")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV of dtype {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}")

    @classmethod
    def uniform(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        model_digest: str,
        arithmetic: str = "",
        windows: Sequence[int | None] = (),
    ) -> KvLayout:
        """Layers of one shape. windows: of each layer; () where all of them see all tokens."""
        by_window: dict[int | None, list[int]] = {}
        for layer in range(num_layers):
            by_window.setdefault(windows[layer] if windows else None, []).append(layer)
        groups = tuple(
            KvGroup(
                layers=tuple(layers), num_kv_heads=num_kv_heads, head_dim=head_dim, window=window
            )
            for window, layers in by_window.items()
        )
        return cls(groups=groups, dtype=dtype, model_digest=model_digest, arithmetic=arithmetic)

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def is_uniform(self) -> bool:
        """Whether layers differ in nothing but their reach."""
        return len({(group.num_kv_heads, group.head_dim) for group in self.groups}) == 1

    @property
    def num_kv_heads(self) -> int:
        """Of every layer; raises InternalError where layers differ."""
        return self._shape[0]

    @property
    def head_dim(self) -> int:
        """Of every layer; raises InternalError where layers differ."""
        return self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        shapes = {(group.num_kv_heads, group.head_dim) for group in self.groups}
        if len(shapes) != 1:
            raise InternalError(f"the KV of {self} has layers of {len(shapes)} shapes, not of one")
        return shapes.pop()

    @property
    def bytes_per_token(self) -> int:
        """Over all layers, K and V."""
        return sum(len(group.layers) * self.row_bytes(group) for group in self.groups)

    @property
    def bytes_per_token_layer(self) -> int:
        """Raises InternalError where layers differ."""
        num_kv_heads, head_dim = self._shape
        return 2 * num_kv_heads * head_dim * DTYPE_BYTES[self.dtype]

    def row_bytes(self, group: KvGroup) -> int:
        """K and V of one token in one layer of ``group``."""
        return 2 * group.num_kv_heads * group.head_dim * DTYPE_BYTES[self.dtype]

    def complete_from(self, num_tokens: int) -> int:
        """Of rows that came from elsewhere as ``KvGroup.needed_from`` asks: from this position on
        they are there in all layers."""
        return max(group.needed_from(num_tokens) for group in self.groups)

    def with_dtype(self, dtype: str) -> KvLayout:
        return msgspec.structs.replace(self, dtype=dtype)

    def of_rank(self, num_ranks: int) -> KvLayout:
        """What each of ``num_ranks`` holds: its share of the heads, at least one."""
        groups = tuple(
            msgspec.structs.replace(group, num_kv_heads=max(1, group.num_kv_heads // num_ranks))
            for group in self.groups
        )
        return msgspec.structs.replace(self, groups=groups)

    def spoken(self, version: int) -> KvLayout:
        """This KV as a peer of that wire version knows it: version 1 has no windows, and moves
        all tokens of all layers."""
        if version > 1:
            return self
        num_kv_heads, head_dim = self._shape
        whole = KvGroup(
            layers=tuple(range(self.num_layers)), num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        return msgspec.structs.replace(self, groups=(whole,))

    def fingerprint(self, version: int = LAYOUT_VERSION) -> str:
        """16 hex digits; equal exactly when the bytes mean the same. Its form, and so the digits,
        are those of peers of that wire version. Raises InternalError in version 1 where layers
        differ in shape."""
        text = self._fields() if version > 1 else self._fields_of_version_1()
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _fields(self) -> str:
        groups = ";".join(
            f"{g.kind},{g.window or 0},{g.num_kv_heads},{g.head_dim},{g.layers}"
            for g in self.groups
        )
        names = f"{self.dtype}|{self.model_digest}|{self.arithmetic}"
        return f"kv layout {LAYOUT_VERSION}|{groups}|{names}"

    def _fields_of_version_1(self) -> str:
        num_kv_heads, head_dim = self._shape
        fields = {
            "arithmetic": self.arithmetic,
            "dtype": self.dtype,
            "head_dim": head_dim,
            "model_digest": self.model_digest,
            "num_kv_heads": num_kv_heads,
            "num_layers": self.num_layers,
            "version": 1,
        }
        return "|".join(f"{name}={value}" for name, value in fields.items())


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether KV of one layout, at the prefill end, can go to a worker of another.

    reason: why not, for people; "" when it can. is_cast: it can, but each element becomes one of
    another dtype on arrival: as after a lossy codec, this is not the KV that prefill computed.
    """

    reason: str = ""
    is_cast: bool = False


FITS = Fit()


def fit(source: KvLayout, target: KvLayout) -> Fit:
    """How KV of ``source`` goes to a worker whose KV is of ``target``."""
    if source == target:
        return FITS
    if source.model_digest != target.model_digest:
        return _differ("model", source.model_digest, target.model_digest)
    if source.groups != target.groups:
        return _differ("KV of", _told(source), _told(target))
    if source.arithmetic != target.arithmetic:
        return _differ("arithmetic", source.arithmetic or "any", target.arithmetic or "any")
    return Fit(is_cast=True)


def why_not_unchanged(source: KvLayout, target: KvLayout) -> str:
    """Why KV of ``source`` cannot go to a worker whose KV is of ``target`` as it is, and the way
    out; "" when it can."""
    found = fit(source, target)
    if not found.is_cast:
        return found.reason
    return (
        f"dtype {source.dtype} at the prefill end, {target.dtype} at the decode end; start both "
        "with one dtype"
    )


def _differ(what: str, source: str, target: str) -> Fit:
    return Fit(f"{what} {source} at the prefill end, {target} at the decode end")


def _told(layout: KvLayout) -> str:
    return "; ".join(
        f"{g.kind} layers {_spans(g)}{f' of window {g.window}' if g.window else ''} with "
        f"{g.num_kv_heads} heads of {g.head_dim}"
        for g in layout.groups
    )


def _spans(group: KvGroup) -> str:
    return ",".join(f"{a}-{a + count - 1}" if count > 1 else str(a) for a, count in group.runs)

"""Which part of a model one rank has. Pure: the config checks ask here too, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.checkpoint.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` elements of an axis: from ``source`` of the whole to ``target`` of the part."""

    axis: int
    source: int
    target: int
    length: int


def refusals(spec: ModelSpec, size: int) -> list[str]:
    """Why ``spec`` cannot be split over ``size`` ranks: one sentence per field; none if it can.

    A KV head is never split nor kept twice: more ranks than KV heads are refused.
    """
    counts = {
        "num_attention_heads": {spec.num_heads},
        "num_key_value_heads": {spec.num_kv_heads},
        "intermediate_size": {spec.intermediate_size} if None in spec.experts else set(),
        "the experts' intermediate size": {
            e.intermediate_size for e in spec.experts if e is not None
        },
    }
    return [
        f"the checkpoint's {name} {count} is not a multiple of {size}"
        for name, values in counts.items()
        for count in sorted(values)
        if count % size
    ]


def allowed_sizes(spec: ModelSpec) -> list[int]:
    return [size for size in range(1, spec.num_kv_heads + 1) if not refusals(spec, size)]


def part_of(spec: ModelSpec, shard: Shard) -> ModelSpec:
    """The spec of one rank: the same layers with fewer heads, a narrower MLP, fewer tokens.

    The vocabulary is rounded up to equal parts; the last ranks' rows beyond it are padding.
    """
    if shard.size == 1:
        return spec
    assert not refusals(spec, shard.size)
    return replace(
        spec,
        num_heads=spec.num_heads // shard.size,
        num_kv_heads=spec.num_kv_heads // shard.size,
        intermediate_size=spec.intermediate_size // shard.size,
        experts=tuple(
            e and replace(e, intermediate_size=e.intermediate_size // shard.size)
            for e in spec.experts
        ),
        vocab_size=-(-spec.vocab_size // shard.size),
    )


def pieces(
    whole: Sequence[int],
    part: Sequence[int],
    shard: Shard,
    segments: Sequence[tuple[int, int]] = (),
) -> list[Piece]:
    """What of a tensor of shape ``whole`` makes this rank's, of shape ``part``.

    segments: (of the whole, of the part) rows of tensors stored below each other; () for one.
    Empty when the shapes are equal: then every rank has all of it. What no piece covers of the
    part is padding.
    """
    axes = [axis for axis, sizes in enumerate(zip(whole, part, strict=True)) if len(set(sizes)) > 1]
    if not axes:
        return []
    (axis,) = axes
    found: list[Piece] = []
    source = target = 0
    for of_whole, of_part in segments or [(whole[axis], part[axis])]:
        begin = min(shard.rank * of_part, of_whole)
        length = min(of_part, of_whole - begin)
        found.append(Piece(axis, source + begin, target, length))
        source, target = source + of_whole, target + of_part
    return found

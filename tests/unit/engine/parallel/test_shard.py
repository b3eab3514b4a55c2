"""Which part of a checkpoint each rank gets: together they are the whole, and nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from baton.checkpoint.spec import load_spec
from baton.engine.models.parameters import allocate, destinations
from baton.engine.parallel.shard import Shard, allowed_sizes, part_of, pieces, refusals
from baton.engine.weights import load_parameters
from tests.support.tiny_checkpoint import TINY_LLAMA, tiny_weights, write_checkpoint

CPU = torch.device("cpu")
WIDE = TINY_LLAMA | {"num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), WIDE)


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_make_the_whole(folder: Path, size: int) -> None:
    spec = load_spec(folder)
    stored = load_file(folder / "model.safetensors")
    parts = []
    for rank in range(size):
        shard = Shard(rank, size)
        parameters = load_parameters(folder, spec, dtype=torch.float32, device=CPU, shard=shard)
        parts.append(destinations(part_of(spec, shard), parameters))
    columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    for name, tensor in stored.items():
        views = [part[name].view for part in parts]
        if any(f"{c}." in name for c in columns):
            joined = torch.cat(views)
            assert torch.equal(joined[: len(tensor)], tensor), name
            assert joined[len(tensor) :].count_nonzero() == 0, "padding of the vocabulary"
        elif "o_proj" in name or "down_proj" in name:
            assert torch.equal(torch.cat(views, dim=1), tensor), name
        else:
            assert all(torch.equal(view, tensor) for view in views), name


def test_a_part_has_a_share_of_every_segment() -> None:
    """Rows 0-7 are Q, 8-11 K, 12-15 V, stored as one tensor."""
    segments = [(8, 4), (4, 2), (4, 2)]
    cut = pieces((16, 3), (8, 3), Shard(1, 2), segments)
    assert [(p.axis, p.source, p.target, p.length) for p in cut] == [
        (0, 4, 0, 4),
        (0, 10, 4, 2),
        (0, 14, 6, 2),
    ]


def test_ranks_beyond_a_small_vocabulary_have_padding_alone() -> None:
    assert [pieces((5, 3), (2, 3), Shard(rank, 4))[0].length for rank in range(4)] == [2, 2, 1, 0]


def test_only_one_rank_has_the_bias_of_a_sum(tmp_path: Path) -> None:
    config = WIDE | {"attention_bias": True}
    folder = write_config_with_biases(tmp_path, config)
    spec = load_spec(folder)
    for rank in range(2):
        loaded = load_parameters(
            folder, spec, dtype=torch.float32, device=CPU, shard=Shard(rank, 2)
        )
        bias = loaded.layers[0].output_bias
        assert bias is not None
        assert bool(bias.count_nonzero()) == (rank == 0)


def write_config_with_biases(folder: Path, config: dict[str, Any]) -> Path:
    weights = tiny_weights(config)
    for number in range(config["num_hidden_layers"]):
        for part in "qkvo":
            name = f"model.layers.{number}.self_attn.{part}_proj"
            weights[f"{name}.bias"] = torch.randn(len(weights[f"{name}.weight"]))
    return write_checkpoint(folder, config, weights)


def test_splits_that_do_not_come_out_even_are_refused_by_name(folder: Path) -> None:
    spec = load_spec(folder)
    assert allowed_sizes(spec) == [1, 2, 4]
    assert refusals(spec, 2) == []
    assert refusals(spec, 3) == [
        "the checkpoint's num_attention_heads 4 is not a multiple of 3",
        "the checkpoint's num_key_value_heads 4 is not a multiple of 3",
        "the checkpoint's intermediate_size 40 is not a multiple of 3",
    ]


def test_one_rank_is_the_model_itself(folder: Path) -> None:
    spec = load_spec(folder)
    assert part_of(spec, Shard()) is spec
    meta = allocate(spec, torch.float32, torch.device("meta"))
    assert all(d.view.is_meta for d in destinations(spec, meta).values())

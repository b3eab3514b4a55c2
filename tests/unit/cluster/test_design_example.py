"""The design's example file: every key is known, and what is not built yet is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.load import parse_config
from cluster.problems import ConfigErrors

DESIGN = """\
version: 1
model: {path: baton-tiny, dtype: bfloat16, max_model_len: 4096}
pools:
  - name: p
    role: prefill
    replicas: {min: 1, max: 4}
    tensor_parallel: 1
    placement: {device: cpu}
    engine: {max_num_batched_tokens: 2048}
  - name: d
    role: decode
    replicas: 1
    placement: {device: cpu}
    engine: {max_num_seqs: 64}
links: []
kv_transfer: {transport: auto, codec: auto, quality_floor: lossless}
router: {slo: {ttft_ms: 400, tpot_ms: 60}, placement: PLACEMENT, migration: {enabled: MIGRATION}}
"""


def parse(placement: str, migration: str):
    text = DESIGN.replace("PLACEMENT", placement).replace("MIGRATION", migration)
    return parse_config(text, file="design.yaml", folder=Path())


def test_it_loads_with_what_is_built():
    config = parse("least_loaded", "false")
    assert [(p.role, p.num_replicas) for p in config.pools] == [("prefill", 1), ("decode", 1)]
    assert config.router.slo.ttft_ms == 400


def test_what_is_not_built_is_refused_by_name_and_line():
    with pytest.raises(ConfigErrors) as caught:
        parse("prefix_aware", "true")
    assert [(p.path, p.line) for p in caught.value.problems] == [
        ("router.placement", 17),
        ("router.migration.enabled", 17),
    ]

"""Whatever a config.json holds, it is read or refused, and what is read can be run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from baton.checkpoint.spec import ModelSpec, load_spec
from baton.engine.rope import Rotary
from baton.protocol.errors import BatonError, ConfigError, UnsupportedModel
from tests.support.tiny_checkpoint import TINY_LLAMA, TINY_MISTRAL
from tests.unit.checkpoint.test_families import (
    GEMMA2_2B,
    GEMMA3_1B,
    MIXTRAL_8X7B,
    PHI3_MINI_4K,
    PHI4_MINI,
    QWEN3_30B_A3B,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "truncate": True, "mscale": 1.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
BASES: list[dict[str, Any]] = [
    TINY_LLAMA | {"rope_scaling": YARN},
    TINY_LLAMA | {"rope_scaling": DYNAMIC},
    TINY_LLAMA | {"rope_parameters": LLAMA3},
    TINY_MISTRAL,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    PHI3_MINI_4K,
    PHI4_MINI,
    GEMMA2_2B,
    GEMMA3_1B,
]
NESTED = ("rope_scaling", "rope_parameters")
NAMES = sorted({name for base in BASES for name in base} | {"layer_types", "num_experts"})
NESTED_NAMES = sorted({*YARN, *LLAMA3, *PHI4_MINI["rope_scaling"], "rope_theta", "type"})

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 200),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["silu", "yarn", "dynamic", "longrope", "llama3", "linear", "", "full"]),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(st.sampled_from(["full_attention", "sliding_attention"]), max_size=4),
    st.dictionaries(st.sampled_from(NESTED_NAMES), SCALARS, max_size=3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    base=st.sampled_from(BASES),
    changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
    inner=st.dictionaries(st.sampled_from(NESTED_NAMES), SCALARS, max_size=2),
)
@example(base=BASES[0], changes={}, inner={"rope_theta": 1})
@example(base=BASES[0], changes={"head_dim": 2}, inner={"type": "dynamic", "rope_type": None})
@example(base=PHI4_MINI, changes={"original_max_position_embeddings": 1}, inner={})
def test_any_config_is_read_or_refused(
    folder: Path, base: dict[str, Any], changes: dict[str, Any], inner: dict[str, Any]
) -> None:
    config = base | changes
    for name in NESTED:
        if isinstance(config.get(name), dict):
            config = config | {name: config[name] | inner}
    (folder / "config.json").write_text(json.dumps(config))
    found = read(folder)
    if isinstance(found, BatonError):
        assert found.param is not None
        assert found.param in str(found)
    else:
        check_runnable(found)


def read(folder: Path) -> ModelSpec | BatonError:
    try:
        return load_spec(folder)
    except (ConfigError, UnsupportedModel) as exc:
        return exc


def check_runnable(spec: ModelSpec) -> None:
    for per_layer in (spec.ropes, spec.sliding_windows, spec.experts):
        assert len(per_layer) == spec.num_layers
    assert spec.num_heads % spec.num_kv_heads == 0
    assert spec.max_position_embeddings >= 1
    scales = (spec.scales.attention, spec.scales.embedding, spec.scales.attention_soft_cap or 1.0)
    assert all(math.isfinite(scale) and scale > 0 for scale in scales)
    last = torch.tensor([0, spec.max_position_embeddings - 1])
    for rope in set(spec.ropes):
        (turn,) = Rotary((rope,), spec.head_dim, torch.device("cpu")).rotations(last)
        assert turn.cos.isfinite().all()
        assert turn.sin.isfinite().all()
        assert 2 * turn.cos.shape[1] <= spec.head_dim

"""Configs as the families' own checkpoints write them, cut down to what is read."""

from pathlib import Path
from typing import Any

import pytest

from baton.checkpoint.families import ExpertSpec, Scales
from baton.checkpoint.rope_fields import RopeSpec
from baton.checkpoint.spec import ModelSpec, load_spec
from baton.protocol.errors import BatonError, ConfigError, UnsupportedModel
from tests.support.tiny_checkpoint import TINY_LLAMA, write_config

MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PHI3_MINI_4K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
PHI4_MINI: dict[str, Any] = PHI3_MINI_4K | {
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "long_factor": [float(n) for n in range(1, 49)],
        "short_factor": [1.0] * 47 + [1.5],
        "type": "longrope",
    },
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
GEMMA2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}


def load(folder: Path, config: dict[str, Any], **changes: Any) -> ModelSpec:
    return load_spec(write_config(folder, config | changes))


def test_mixtral(tmp_path: Path) -> None:
    spec = load(tmp_path, MIXTRAL_8X7B)
    assert spec.experts == (ExpertSpec(8, 2, 14336, normalized=True),) * 32
    assert spec.intermediate_size == 0
    assert set(spec.sliding_windows) == {None}
    assert set(spec.ropes) == {RopeSpec(theta=1e6)}
    assert spec.names.expert.format(3) + spec.names.expert_down == "block_sparse_moe.experts.3.w2"


def test_qwen3_moe(tmp_path: Path) -> None:
    spec = load(tmp_path, QWEN3_30B_A3B)
    assert spec.experts == (ExpertSpec(128, 8, 768, normalized=True),) * 48
    assert (spec.head_dim, spec.qk_norm, spec.qkv_bias) == (128, True, False)
    some = load(tmp_path, QWEN3_30B_A3B, decoder_sparse_step=2, mlp_only_layers=[3, 0])
    with_experts = [n for n, experts in enumerate(some.experts) if experts is not None]
    assert with_experts == [n for n in range(48) if n % 2 == 1 and n != 3]
    assert some.intermediate_size == 6144


def test_qwen3_moe_windows_are_in_all_layers(tmp_path: Path) -> None:
    off = load(tmp_path, QWEN3_30B_A3B, sliding_window=64)
    assert set(off.sliding_windows) == {None}
    on = load(tmp_path, QWEN3_30B_A3B, sliding_window=64, use_sliding_window=True)
    assert set(on.sliding_windows) == {64}


def test_phi3(tmp_path: Path) -> None:
    spec = load(tmp_path, PHI3_MINI_4K)
    assert (spec.head_dim, spec.max_position_embeddings) == (96, 4096)
    assert set(spec.sliding_windows) == {2047}
    assert spec.names.qkv == ("self_attn.qkv_proj",)


def test_phi4_turns_part_of_a_head_and_its_range_is_short_or_long(tmp_path: Path) -> None:
    spec = load(tmp_path, PHI4_MINI)
    rope = spec.ropes[0]
    assert (rope.kind, rope.rotary_dim, len(rope.divisors)) == ("longrope", 96, 48)
    assert rope.divisors[-1] == 1.5
    assert rope.attention_factor == pytest.approx(1.1902380714238083)
    assert spec.max_position_embeddings == 4096
    assert load(tmp_path, PHI4_MINI).variant == ""
    assert set(spec.sliding_windows) == {None}
    long = load_spec(tmp_path, max_model_len=32_768)
    assert long.ropes[0].divisors[-1] == 48.0
    assert long.max_position_embeddings == 131_072
    assert long.variant == "beyond_original"
    assert load_spec(tmp_path, max_model_len=4_096) == spec
    for name in ("su", "yarn"):
        scaling = PHI4_MINI["rope_scaling"] | {"type": name}
        assert load(tmp_path, PHI4_MINI, rope_scaling=scaling) == spec


def test_gemma2(tmp_path: Path) -> None:
    spec = load(tmp_path, GEMMA2_2B)
    assert spec.scales == Scales(1 / 16, 50.0, 48.0, 30.0)
    assert spec.sliding_windows[:4] == (4096, None, 4096, None)
    assert (spec.activation, spec.norm_offset) == ("gelu_tanh", 1.0)
    assert spec.tie_word_embeddings
    assert load(tmp_path, GEMMA2_2B, attn_logit_softcapping=None).scales.attention_soft_cap is None


def test_gemma3(tmp_path: Path) -> None:
    spec = load(tmp_path, GEMMA3_1B)
    assert spec.sliding_windows[:7] == (512, 512, 512, 512, 512, None, 512)
    assert {rope.theta for rope in spec.ropes[:5]} == {10_000.0}
    assert spec.ropes[5].theta == 1_000_000.0
    assert spec.scales == Scales(1 / 16, None, 1152**0.5, None)
    scaled = load(tmp_path, GEMMA3_1B, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert [rope.factor for rope in scaled.ropes[4:7]] == [1.0, 8.0, 1.0]


def test_scaling_that_reaches_further(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert load(tmp_path, TINY_LLAMA, rope_scaling=yarn).max_position_embeddings == 2048
    dynamic = {"type": "dynamic", "factor": 2.0}
    assert load(tmp_path, TINY_LLAMA, rope_scaling=dynamic).max_position_embeddings == 1024
    linear = {"type": "linear", "factor": 2.0}
    assert load(tmp_path, TINY_LLAMA, rope_scaling=linear).max_position_embeddings == 512


def test_yarn_attention_factors(tmp_path: Path) -> None:
    def factor(**fields: Any) -> float:
        scaling = {"rope_type": "yarn", "factor": 4.0} | fields
        return load(tmp_path, TINY_LLAMA, rope_scaling=scaling).ropes[0].attention_factor

    assert factor() == pytest.approx(1.1386294361119891)
    assert factor(attention_factor=0.5) == 0.5
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(mscale=0.7) == factor()
    assert factor(factor=1.0) == 1.0


@pytest.mark.parametrize(
    ("base", "field", "value", "error"),
    [
        (MIXTRAL_8X7B, "num_experts_per_tok", 9, ConfigError),
        (MIXTRAL_8X7B, "num_local_experts", 0, ConfigError),
        (MIXTRAL_8X7B, "attention_bias", True, UnsupportedModel),
        (QWEN3_30B_A3B, "moe_intermediate_size", None, ConfigError),
        (QWEN3_30B_A3B, "mlp_only_layers", [48], ConfigError),
        (QWEN3_30B_A3B, "mlp_only_layers", "0", ConfigError),
        (QWEN3_30B_A3B, "decoder_sparse_step", 0, ConfigError),
        (QWEN3_30B_A3B, "norm_topk_prob", 1, ConfigError),
        (PHI3_MINI_4K, "partial_rotary_factor", 0.01, UnsupportedModel),
        (PHI3_MINI_4K, "partial_rotary_factor", 1.5, ConfigError),
        (GEMMA2_2B, "hidden_activation", "gelu", UnsupportedModel),
        (GEMMA2_2B, "query_pre_attn_scalar", 0, ConfigError),
        (GEMMA2_2B, "attn_logit_softcapping", -1.0, ConfigError),
        (GEMMA2_2B, "layer_types", ["full_attention"], ConfigError),
        (GEMMA3_1B, "sliding_window_pattern", 0, ConfigError),
        (GEMMA3_1B, "use_bidirectional_attention", True, UnsupportedModel),
        (GEMMA3_1B, "architectures", ["Gemma3ForConditionalGeneration"], UnsupportedModel),
    ],
)
def test_a_field_of_a_family_is_named(
    base: dict[str, Any], field: str, value: Any, error: type[BatonError], tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        load(tmp_path, base, **{field: value})
    assert type(caught.value) is error
    assert caught.value.param == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("short_factor", {"short_factor": [1.0] * 47}),
        ("long_factor", {"long_factor": None}),
        ("short_factor", {"short_factor": [0.0] * 48}),
        ("attention_factor", {"attention_factor": -1.0}),
    ],
)
def test_a_field_of_longrope_is_named(field: str, change: dict[str, Any], tmp_path: Path) -> None:
    scaling = PHI4_MINI["rope_scaling"] | change
    with pytest.raises(ConfigError, match=f"rope_scaling: {field} is"):
        load(tmp_path, PHI4_MINI, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("factor", {"factor": 0.5}),
        ("beta_slow", {"beta_slow": 64}),
        ("truncate", {"truncate": "no"}),
        ("original_max_position_embeddings", {"original_max_position_embeddings": 0}),
    ],
)
def test_a_field_of_yarn_is_named(field: str, change: dict[str, Any], tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0} | change
    with pytest.raises(ConfigError, match=f"rope_scaling: {field} is"):
        load(tmp_path, TINY_LLAMA, rope_scaling=scaling)

import json
import math
from pathlib import Path
from typing import Any

import pytest

from baton.checkpoint.find import resolve
from baton.checkpoint.rope_fields import RopeSpec
from baton.checkpoint.spec import load_spec
from baton.protocol.errors import ConfigError, UnsupportedModel
from tests.support.tiny_checkpoint import TINY_LLAMA, write_config

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN2 = TINY_LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = TINY_LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = TINY_LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def load(folder: Path, config: dict[str, Any], **changes: Any) -> Any:
    return load_spec(write_config(folder, config | changes))


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def test_baton_tiny() -> None:
    spec = load_spec(resolve("baton-tiny"))
    assert (spec.family, spec.architecture) == ("llama", "LlamaForCausalLM")
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (6, 4, 2, 64)
    assert (spec.vocab_size, spec.max_position_embeddings) == (2048, 4096)
    assert (spec.bos_token_id, spec.eos_token_ids) == (0, (1,))
    assert spec.tie_word_embeddings
    assert spec.dtype == "bfloat16"
    assert set(spec.ropes) == {RopeSpec(theta=10_000.0)}


def test_old_and_new_spelling_are_one_spec(tmp_path: Path) -> None:
    old = load(
        tmp_path / "old",
        TINY_LLAMA,
        rope_theta=500_000.0,
        rope_scaling={"rope_type": "llama3", **LLAMA3},
        torch_dtype="bfloat16",
    )
    new = load(
        tmp_path / "new",
        without(TINY_LLAMA, "rope_theta", "torch_dtype"),
        rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3},
        dtype="bfloat16",
    )
    assert old == new
    assert new.ropes[1] == RopeSpec("llama3", 500_000.0, 32.0, 1.0, 4.0, 8192)
    assert new.dtype == "bfloat16"


def test_the_oldest_scaling_says_type(tmp_path: Path) -> None:
    spec = load(tmp_path, TINY_LLAMA, rope_scaling={"type": "linear", "factor": 2})
    assert spec.ropes[0] == RopeSpec("linear", 10_000.0, 2.0)


def test_absent_fields_mean_what_the_families_say(tmp_path: Path) -> None:
    llama = load(tmp_path, without(TINY_LLAMA, "num_key_value_heads", "rope_theta", "torch_dtype"))
    assert llama.num_kv_heads == llama.num_heads
    assert llama.head_dim == 8
    assert llama.ropes[0].theta == 10_000.0
    assert llama.dtype == "float32"
    assert not any((llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.qk_norm))
    qwen2 = load(tmp_path, QWEN2)
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    qwen3 = load(tmp_path, QWEN3)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    longer = {"max_position_embeddings": 32_768}
    assert load(tmp_path, MISTRAL, **longer).sliding_windows == (4096, 4096)
    assert load(tmp_path, MISTRAL).sliding_windows == (None, None)
    assert load(tmp_path, MISTRAL, sliding_window=None).sliding_windows == (None, None)
    assert load(tmp_path, TINY_LLAMA, sliding_window=64).sliding_windows == (None, None)


def test_qwen_windows(tmp_path: Path) -> None:
    off = {"sliding_window": 64, "max_window_layers": 1}
    on = off | {"use_sliding_window": True}
    kinds = ["sliding_attention", "full_attention"]
    assert load(tmp_path, QWEN2, **off).sliding_windows == (None, None)
    assert load(tmp_path, QWEN2, **on).sliding_windows == (None, 64)
    assert load(tmp_path, QWEN3, **on, layer_types=kinds).sliding_windows == (64, None)


def test_model_type_stands_in_for_architectures(tmp_path: Path) -> None:
    spec = load(tmp_path, without(QWEN2, "architectures"))
    assert spec.architecture == "Qwen2ForCausalLM"


def test_end_ids_of_both_files(tmp_path: Path) -> None:
    write_config(tmp_path, TINY_LLAMA | {"eos_token_id": 5, "bos_token_id": None})
    generation = {"eos_token_id": [7, 5], "bos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    spec = load_spec(tmp_path)
    assert spec.eos_token_ids == (7, 5)
    assert spec.bos_token_id == 3


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (TINY_LLAMA, "architectures", ["LlamaForSequenceClassification"]),
        (TINY_LLAMA, "architectures", ["MambaForCausalLM"]),
        (TINY_LLAMA, "model_type", "mixtral"),
        (TINY_LLAMA, "hidden_act", "gelu"),
        (TINY_LLAMA, "quantization_config", {"bits": 4}),
        (TINY_LLAMA, "compression_config", {"format": "int-quantized"}),
        (TINY_LLAMA, "is_encoder_decoder", True),
        (TINY_LLAMA, "use_bidirectional_attention", True),
        (TINY_LLAMA, "vision_config", {"hidden_size": 8}),
        (TINY_LLAMA, "block_configs", [{"attention": {"n_heads_in_group": 4}}]),
        (TINY_LLAMA, "torch_dtype", "float8_e4m3fn"),
        (TINY_LLAMA, "num_key_value_heads", 3),
        (TINY_LLAMA, "hidden_size", 34),
        (TINY_LLAMA, "head_dim", 7),
        (TINY_LLAMA, "partial_rotary_factor", 0.5),
        (TINY_LLAMA, "layer_types", ["sliding_attention", "full_attention"]),
        (MISTRAL, "attention_bias", True),
        (MISTRAL, "layer_types", ["full_attention", "full_attention"]),
        (QWEN2, "layer_types", ["sliding_attention", "full_attention"]),
        (QWEN2, "layer_types", ["chunked_attention", "full_attention"]),
    ],
)
def test_what_cannot_be_run_is_named(
    base: dict[str, Any], field: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load(tmp_path, base, **{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)
    assert json.dumps(value) in str(caught.value)
    assert "supported: " in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_quantised_checkpoints_are_named_by_method(method: str, tmp_path: Path) -> None:
    quantization = {"bits": 4, "modules_to_not_convert": ["lm_head"] * 50, "quant_method": method}
    with pytest.raises(UnsupportedModel) as caught:
        load(tmp_path, TINY_LLAMA, quantization_config=quantization)
    assert f'quantization_config: quant_method is "{method}"; supported: ' in str(caught.value)
    assert "take the checkpoint that this one was made from" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "scaling"),
    [
        ("mrope_section", {"rope_type": "default", "mrope_section": [8, 4, 4]}),
        ("rope_type", {"rope_type": "proportional", "factor": 4.0}),
        ("type", {"type": "mrope", "factor": 4.0}),
        ("full_attention", {"full_attention": {"rope_type": "default"}}),
        ("partial_rotary_factor", {"rope_type": "default", "partial_rotary_factor": 0.25}),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_other_rope_scaling_is_named(
    name: str, field: str, scaling: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load(tmp_path, TINY_LLAMA, **{name: scaling})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("base", "field"),
    [
        *(
            (TINY_LLAMA, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
            )
        ),
        (QWEN2, "num_key_value_heads"),
    ],
)
def test_a_missing_field_is_named(base: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{field} is missing"):
        load(tmp_path, without(base, field))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "61"),
        ("vocab_size", True),
        ("vocab_size", 2**40),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 8),
        ("hidden_size", 32.5),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", -1e-5),
        ("rope_theta", 0),
        ("rope_theta", math.inf),
        ("rope_scaling", "llama3"),
        ("tie_word_embeddings", 1),
        ("eos_token_id", 61),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", "</s>"),
        ("architectures", "LlamaForCausalLM"),
        ("layer_types", ["full_attention"]),
        ("torch_dtype", 16),
        ("head_dim", 4096),
        ("head_dim", [64, 128]),
    ],
)
def test_a_malformed_field_is_named(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, TINY_LLAMA, **{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor"])
def test_llama3_scaling_needs_its_fields(field: str, tmp_path: Path) -> None:
    scaling = without({"rope_type": "llama3", **LLAMA3}, field)
    with pytest.raises(ConfigError, match=f"rope_scaling: {field} is missing"):
        load(tmp_path, TINY_LLAMA, rope_scaling=scaling)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000])
def test_malformed_json_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_spec(tmp_path)


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load(tmp_path, TINY_LLAMA, quantization_config={"x": "y" * 10_000})
    assert len(str(caught.value)) < 1_000

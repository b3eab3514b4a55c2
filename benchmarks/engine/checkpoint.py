"""The benchmark checkpoint: a random-weight Llama that anyone can make again, bit for bit.

Speed does not depend on the values, but the gate does: they are scaled so that activations keep
their size through the layers and the best token stands clear of the next one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

SEED = 1234
VOCAB_SIZE = 8_192
MAX_MODEL_LEN = 8_192
LOGIT_SCALE = 4.0

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1_408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_checkpoint(folder: Path) -> Path:
    """``folder``, written unless it holds this very checkpoint already (about 145 MB)."""
    written = folder / "config.json"
    text = json.dumps(CONFIG, indent=2) + "\n"
    if written.exists() and written.read_text(encoding="utf-8") == text:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save(str(folder / "tokenizer.json"))
    # Last: a folder with a config.json is complete.
    written.write_text(text, encoding="utf-8")
    return folder


def num_parameters() -> int:
    return sum(rows * columns for rows, columns in _matrices().values()) + sum(
        size for size in _vectors().values()
    )


def kv_bytes_per_token(dtype_bytes: int) -> int:
    """K and V of all layers."""
    heads = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    return int(2 * CONFIG["num_hidden_layers"] * heads * dtype_bytes)


def _weights() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(SEED)
    made = {name: torch.ones(size) for name, size in _vectors().items()}
    for name, (rows, columns) in _matrices().items():
        scale = 1.0 if name.endswith("embed_tokens.weight") else columns**-0.5
        if name == "lm_head.weight":
            scale *= LOGIT_SCALE
        made[name] = scale * torch.randn(rows, columns, generator=draws)
    return made


def _matrices() -> dict[str, tuple[int, int]]:
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv_size = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    found = {
        "model.embed_tokens.weight": (VOCAB_SIZE, hidden),
        "lm_head.weight": (VOCAB_SIZE, hidden),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        found |= {f"model.layers.{layer}.{name}.weight": s for name, s in of_layer.items()}
    return found


def _vectors() -> dict[str, int]:
    hidden = CONFIG["hidden_size"]
    found = {"model.norm.weight": hidden}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = hidden
    return found


def _tokenizer() -> Tokenizer:
    """A word per id: prompts are ids, so the texts matter to nobody."""
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baton.checkpoint.spec import load_spec
from baton.engine import weights
from baton.engine.models.parameters import Mlp, Parameters
from baton.engine.weights import load_parameters
from baton.protocol.errors import ConfigError, UnsupportedModel
from tests.support.tiny_checkpoint import TINY_LLAMA, tiny_weights, write_checkpoint, write_config

CPU = torch.device("cpu")
MIB = 2**20
V_PROJ = "model.layers.1.self_attn.v_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Parameters:
    return load_parameters(folder, load_spec(folder), dtype=dtype, device=CPU)


def test_every_tensor_finds_its_place(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    parameters = load(write_checkpoint(tmp_path))
    layer = parameters.layers[1]
    assert isinstance(layer.mlp, Mlp)
    prefix = "model.layers.1."
    qkv = [weights[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv"]
    gate_up = [weights[f"{prefix}mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(layer.qkv, torch.cat(qkv))
    assert torch.equal(layer.mlp.gate_up, torch.cat(gate_up))
    assert torch.equal(layer.output, weights[f"{prefix}self_attn.o_proj.weight"])
    assert torch.equal(layer.mlp.down, weights[f"{prefix}mlp.down_proj.weight"])
    assert torch.equal(layer.mlp_norm, weights[f"{prefix}post_attention_layernorm.weight"])
    assert torch.equal(parameters.embedding, weights["model.embed_tokens.weight"])
    assert torch.equal(parameters.lm_head, weights["lm_head.weight"])


def test_shards_and_progress(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    write_config(tmp_path, TINY_LLAMA)
    names = sorted(weights)
    files = {name: f"part-{n % 3}.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n] for n in names if files[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    seen: list[tuple[int, int]] = []
    parameters = load_parameters(
        tmp_path,
        load_spec(tmp_path),
        dtype=torch.float32,
        device=CPU,
        progress=lambda done, total: seen.append((done, total)),
    )
    total_bytes = sum(tensor.nbytes for tensor in weights.values())
    done_bytes = [done for done, _ in seen]
    assert len(seen) == len(names)
    assert done_bytes == sorted(done_bytes)
    assert seen[-1] == (total_bytes, total_bytes)
    assert torch.equal(parameters.final_norm, weights["model.norm.weight"])


def test_a_tied_head_is_the_embedding_and_a_stored_copy_is_ignored(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    config = TINY_LLAMA | {"tie_word_embeddings": True}
    parameters = load(write_checkpoint(tmp_path, config, weights), torch.bfloat16)
    assert parameters.lm_head is parameters.embedding
    stored = weights["model.embed_tokens.weight"].to(torch.bfloat16)
    assert torch.equal(parameters.embedding, stored)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    del weights[V_PROJ]
    with pytest.raises(ConfigError, match=f"the weights lack {V_PROJ} of the 2-layer") as caught:
        load(write_checkpoint(tmp_path, weights=weights))
    assert caught.value.param == V_PROJ


def test_a_missing_head_says_how_to_share(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    del weights["lm_head.weight"]
    with pytest.raises(ConfigError, match="set tie_word_embeddings to true"):
        load(write_checkpoint(tmp_path, weights=weights))


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    config = TINY_LLAMA | {"num_hidden_layers": 4}
    with pytest.raises(ConfigError, match=r"model\.layers\.2\..* and 13 more"):
        load(write_checkpoint(tmp_path, config, weights))


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias has no place in a Llama"):
        load(write_checkpoint(tmp_path, weights=weights))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "take the checkpoint that this one was made"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "merge adapters into the weights first"),
        ("model.layers.7.mlp.up_proj.weight", "come from the same folder"),
    ],
)
def test_a_foreign_tensor_tells_where_it_comes_from(name: str, hint: str, tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA) | {name: torch.zeros(8)}
    with pytest.raises(UnsupportedModel, match=hint) as caught:
        load(write_checkpoint(tmp_path, weights=weights))
    assert caught.value.param == name


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    write_config(tmp_path, TINY_LLAMA)
    save_file(weights, tmp_path / "a.safetensors")
    save_file({V_PROJ: weights[V_PROJ]}, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"b\.safetensors: .*v_proj.* is also in another file"):
        load(tmp_path)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    weights[V_PROJ] = weights[V_PROJ].T.contiguous()
    with pytest.raises(ConfigError, match=r"v_proj.* has shape \[32, 16\].* says \[16, 32\]"):
        load(write_checkpoint(tmp_path, weights=weights))


def test_quantised_numbers_are_refused(tmp_path: Path) -> None:
    weights = tiny_weights(TINY_LLAMA)
    weights[V_PROJ] = weights[V_PROJ].to(torch.int8)
    with pytest.raises(UnsupportedModel, match=r"v_proj.* holds int8; supported: float32"):
        load(write_checkpoint(tmp_path, weights=weights))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read as safetensors"):
        load(folder)


def test_pages_of_the_file_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY_LLAMA | {"vocab_size": 30_000, "hidden_size": 64, "num_hidden_layers": 20}
    config |= {"intermediate_size": 1_500}
    folder = write_checkpoint(tmp_path, config)
    file_bytes = (folder / "model.safetensors").stat().st_size
    assert file_bytes > 30 * MIB
    seen: list[int] = []
    monkeypatch.setattr(weights, "MAX_MAPPED_BYTES", MIB)
    before = mapped_file_bytes()
    spec = load_spec(folder)
    load_parameters(
        folder,
        spec,
        dtype=torch.bfloat16,
        device=CPU,
        progress=lambda done, total: seen.append(mapped_file_bytes()),
    )
    # The largest tensor alone has 8 MiB, and what the loader itself maps on its way comes on top.
    assert max(seen) - before < file_bytes / 2


def mapped_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    kilobytes = status.split("RssFile:")[1].split()[0]
    return int(kilobytes) * 1024

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deploy
from baton.checkpoint.find import bundled_model_names, resolve, weight_files
from baton.protocol.errors import ConfigError, UnsupportedModel
from tests.support.tiny_checkpoint import TINY_LLAMA, write_checkpoint, write_config


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "my-model")
    assert resolve(str(folder)) == folder.resolve()


def test_a_bundled_name_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = resolve("baton-tiny")
    assert folder == (Path(deploy.__file__).parent / "models" / "baton-tiny").resolve()
    assert "baton-tiny" in bundled_model_names()


def test_a_local_folder_wins_over_a_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "baton-tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve("baton-tiny") == folder.resolve()


@pytest.mark.parametrize("name", ["", "no-such-model", "../models/baton-tiny", "a\0b"])
def test_an_unknown_name_says_where_it_was_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert repr(name) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "baton-tiny" in str(caught.value)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="a file, not a folder"):
        resolve(str(path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        resolve(str(folder))


def test_a_folder_without_weights_names_what_would_do(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TINY_LLAMA)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"model\.safetensors nor model\.safetensors\.index"):
        resolve(str(folder))


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UnsupportedModel, match=r'adapter of "meta-llama/Llama-3.2-1B".* merge'):
        resolve(str(folder))


def test_a_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UnsupportedModel, match=r'model_index.json .*"FluxPipeline".* one text'):
        resolve(str(tmp_path))


def test_other_formats_are_listed(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TINY_LLAMA)
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"convert .* there is model-Q4_K_M\.gguf"):
        resolve(str(folder))


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "consolidated.safetensors"):
        (tmp_path / name).touch()
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [f.name for f in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"b\.safetensors is missing .*lists 2"):
        weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"x": 3}, {"x": "../x.safetensors"}])
def test_a_bad_index_is_refused(weight_map: object, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match="weight_map"):
        weight_files(tmp_path)


def test_the_package_imports_no_torch() -> None:
    code = (
        "import sys, baton.checkpoint.spec, baton.checkpoint.find, baton.checkpoint.digest;"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(deploy.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=dict(os.environ))

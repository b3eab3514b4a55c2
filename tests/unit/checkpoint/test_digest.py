import shutil
from pathlib import Path

import pytest

from baton.checkpoint import digest
from baton.checkpoint.digest import model_digest
from baton.protocol.errors import ConfigError
from tests.support.tiny_checkpoint import TINY_LLAMA, tiny_weights, write_checkpoint


@pytest.fixture(params=["whole", "sampled"])
def _limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "sampled":
        monkeypatch.setattr(digest, "WHOLE_FILE_BYTES", 0)


@pytest.mark.usefixtures("_limit")
def test_copies_agree_and_every_change_shows(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first")
    same = model_digest(first)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(first, copy)
    assert model_digest(copy) == same
    assert len(same) == 32

    other_weights = tiny_weights(TINY_LLAMA)
    other_weights["model.layers.1.self_attn.v_proj.weight"] += 1
    renamed = tiny_weights(TINY_LLAMA)
    renamed["model.norm.bias"] = renamed.pop("model.norm.weight")
    folders = [
        write_checkpoint(tmp_path / "seed", weights=tiny_weights(TINY_LLAMA, seed=1)),
        write_checkpoint(tmp_path / "layer", weights=other_weights),
        write_checkpoint(tmp_path / "name", weights=renamed),
        write_checkpoint(tmp_path / "config", TINY_LLAMA | {"rope_theta": 10_001.0}),
    ]
    assert len({same, *map(model_digest, folders)}) == 5


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, (9).to_bytes(8, "little") + b'{"a": [1]'.ljust(20)]
)
def test_a_broken_large_file_is_a_config_error(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "WHOLE_FILE_BYTES", -1)
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="safetensors"):
        model_digest(folder)

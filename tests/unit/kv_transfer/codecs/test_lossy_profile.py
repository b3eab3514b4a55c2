"""Profiles as files: what comes back, and what is refused by name."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from baton.checkpoint.digest import model_digest
from baton.checkpoint.find import bundled_models_folder
from baton.protocol.errors import ConfigError
from kv_transfer.codecs.contract import Quality
from kv_transfer.codecs.lossy_profile import (
    PROFILE_FILE,
    Level,
    Profile,
    find_profile,
    load_profile,
    save_profile,
)
from tests.support.kv_profiles import Geometry, Source


@cache
def profile() -> Profile:
    return Source(Geometry(), 1, 1, 4).profile()


def test_a_profile_comes_back_with_its_digest(tmp_path: Path) -> None:
    save_profile(profile(), tmp_path / "p")
    found = load_profile(tmp_path / "p")
    assert found.digest() == profile().digest()
    assert found.levels == profile().levels
    assert (found.analysis == profile().analysis).all()


def test_what_coding_depends_on_is_in_the_digest() -> None:
    coarser = tuple(dataclasses.replace(level, step=9.0) for level in profile().levels)
    mean = profile().mean + np.float32(0.5)
    digests = {
        profile().digest(),
        dataclasses.replace(profile(), levels=coarser).digest(),
        dataclasses.replace(profile(), mean=mean).digest(),
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("field", "spoil", "told"),
    [
        ("analysis", lambda a: np.full_like(a, 32767), "column of analysis"),
        ("synthesis", lambda a: np.full_like(a, 32767), "synthesis of a channel"),
        ("mean", lambda a: a * np.float32(np.nan), "mean is not finite"),
        ("mean", lambda a: a[..., :3], "axis C"),
        ("grid", lambda a: a * 0, "not positive"),
        ("rank", lambda a: a + 1000, "a rank"),
        ("table", lambda a: a + np.uint8(200), "tables, number"),
        ("frequencies", lambda a: a // 2, "add up to 4096"),
        ("limit", lambda a: np.full_like(a, 127), "lacks a quotient"),
        ("ages", lambda a: a[::-1].copy(), "ages"),
        ("ages", lambda a: a.astype(np.int64), "ages is int64"),
    ],
)
def test_unsound_numbers_are_refused_by_name(field: str, spoil: object, told: str) -> None:
    assert callable(spoil)
    spoiled = spoil(getattr(profile(), field))
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(profile(), **{field: spoiled})


def test_a_step_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="not positive"):
        dataclasses.replace(profile(), levels=(Level("kv1", Quality.HIGH, 0.0),) * 4)


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "text")
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="no KV codec profile"):
        load_profile(tmp_path / "other")
    save_file({"x": np.zeros(3)}, tmp_path / "newer", metadata={"baton": '{"version": 99}'})
    with pytest.raises(ConfigError, match="version 99"):
        load_profile(tmp_path / "newer")


def test_a_folder_without_one_has_none_and_one_of_other_weights_is_refused(tmp_path: Path) -> None:
    assert find_profile(tmp_path, "made-up") is None
    save_profile(profile(), tmp_path / PROFILE_FILE)
    assert find_profile(tmp_path, "made-up") is not None
    with pytest.raises(ConfigError, match="baton calibrate"):
        find_profile(tmp_path, "others")


def test_the_bundled_model_has_a_profile_of_its_own_weights() -> None:
    models = bundled_models_folder()
    assert models is not None
    folder = models / "baton-tiny"
    found = find_profile(folder, model_digest(folder))
    assert found is not None
    assert [level.quality for level in found.levels] == [
        Quality.HIGH,
        Quality.HIGH,
        Quality.MEDIUM,
        Quality.LOW,
    ]

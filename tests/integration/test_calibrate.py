"""``baton calibrate`` on the bundled model and a few texts: a profile that serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner

from baton.checkpoint.digest import model_digest
from baton.checkpoint.find import resolve
from baton.cli.root import main
from cluster.calibrate.reader import Reader
from kv_transfer.codecs.lossy_profile import load_profile

FOLDER = resolve("baton-tiny")


def test_the_command_writes_a_profile_of_the_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "profile"
    done = CliRunner().invoke(main, ["calibrate", "baton-tiny", "--texts", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out) in done.output
    profile = load_profile(out)
    assert profile.model_digest == model_digest(FOLDER)
    steps = [level.step for level in profile.levels]
    assert steps == sorted(steps)
    assert len(set(steps)) == 4


def test_text_that_is_not_there_is_told_by_name() -> None:
    done = CliRunner().invoke(main, ["calibrate", "baton-tiny", "--text", "no-such-folder"])
    assert done.exit_code == 3
    assert "no-such-folder" in done.output


def test_gradients_are_those_of_the_loss() -> None:
    """Against a difference along one random direction, targets drawn alike."""
    reader = Reader(FOLDER, "float32", torch.device("cpu"))
    tokens = np.random.default_rng(1).integers(3, reader.spec.vocab_size, 41)
    context = reader.read(tokens, 8)
    assert context.kv.shape[2] == 32
    gradient = reader.gradient(context, torch.Generator().manual_seed(2))
    probabilities = context.log_probs.exp()
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(2))
    direction = torch.randn(context.kv.shape, generator=torch.Generator().manual_seed(3))

    def loss(kv: torch.Tensor) -> float:
        return -reader.log_probs(context, kv).double().gather(1, drawn).sum().item()

    size = 1e-3
    ahead, behind = context.kv + size * direction, context.kv - size * direction
    difference = (loss(ahead) - loss(behind)) / (2 * size)
    expected = (gradient * direction).sum().item()
    assert abs(difference - expected) < 0.02 * abs(expected) + 0.01

"""What ``baton calibrate`` does, from names to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from baton.checkpoint.find import resolve
from baton.protocol.errors import ConfigError
from cluster.calibrate.calibrate import FOLLOWING, LENGTHS, Texts, calibrate
from cluster.calibrate.corpus import standard_library, token_sequences
from cluster.calibrate.reader import Reader
from kv_transfer.codecs.lossy_profile import PROFILE_FILE, save_profile


def run(
    model: str,
    sources: Sequence[Path],
    out: Path | None,
    num_texts: int,
    dtype: str,
    device: str,
    seed: int,
    say: Callable[[str], None],
) -> str:
    """Writes the profile and says where. Raises ConfigError."""
    folder = resolve(model)
    path = out or folder / PROFILE_FILE
    try:
        reader = Reader(folder, dtype, torch.device(device))
    except RuntimeError as exc:
        raise ConfigError(f"--device {device}: {exc}", param="device") from exc
    sequences = token_sequences(
        folder,
        sources or [standard_library()],
        reader.spec.bos_token_id,
        min_tokens=LENGTHS[0] + FOLLOWING + 1,
        max_tokens=min(LENGTHS[-1] + FOLLOWING + 1, reader.max_tokens),
        wanted=num_texts,
        seed=seed,
    )
    # Interleaved, since the longest come first.
    texts = Texts([t for i, t in enumerate(sequences) if i % 4], sequences[::4])
    profile = calibrate(reader, texts, say, seed)
    try:
        save_profile(profile, path)
    except OSError as exc:
        raise ConfigError(f"--out {path}: cannot be written ({exc})", param="out") from exc
    steps = ", ".join(f"{level.name} {level.step:.3g}" for level in profile.levels)
    return f"wrote {path} (digest {profile.digest().hex()}; steps {steps})"

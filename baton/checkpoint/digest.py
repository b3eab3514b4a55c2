"""Which model a folder holds, as a short stable string; cheap for any size.

The folder's path takes no part, so that two hosts with equal copies agree.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from baton.checkpoint.find import CONFIG_FILE, weight_files
from baton.protocol.errors import ConfigError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""
WHOLE_FILE_BYTES = 64 * 2**20
"""Files up to this size are hashed in full."""
SAMPLE_BYTES = 256


def model_digest(folder: Path, variant: str = "") -> str:
    """32 hex digits over config.json, safetensors headers, sizes and a sample of every tensor.

    Small files count in full. In larger ones each tensor gives its first, middle and last
    256 bytes: a fine-tune changes all of them, one edited element may pass unseen. variant: of
    ``ModelSpec``.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        if variant:
            _add(digest, variant.encode())
        _add(digest, (folder / CONFIG_FILE).read_bytes())
        for path in weight_files(folder):
            size = path.stat().st_size
            _add(digest, f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                if size <= WHOLE_FILE_BYTES:
                    _add(digest, file.read())
                else:
                    _add_samples(digest, file, path, size)
    except OSError as exc:
        raise ConfigError(f"model folder {folder}: cannot be read ({exc})") from exc
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, part: bytes) -> None:
    """Length first, so that two parts never read as one."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _add_samples(digest: hashlib.blake2b, file: BinaryIO, path: Path, size: int) -> None:
    header_bytes = int.from_bytes(file.read(8), "little")
    if not 0 < header_bytes <= min(MAX_HEADER_BYTES, size - 8):
        raise ConfigError(f"{path}: is not a safetensors file (header of {header_bytes} bytes)")
    raw = file.read(header_bytes)
    _add(digest, raw)
    for begin, end in sorted(_tensor_spans(raw, path)):
        middle = (begin + end - SAMPLE_BYTES) // 2
        for offset in (begin, max(begin, middle), max(begin, end - SAMPLE_BYTES)):
            file.seek(8 + header_bytes + offset)
            _add(digest, file.read(min(SAMPLE_BYTES, end - offset)))


def _tensor_spans(raw_header: bytes, path: Path) -> list[tuple[int, int]]:
    """Byte ranges of the tensors, counted from the end of the header."""
    try:
        header = json.loads(raw_header)
        spans = [
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as exc:
        raise ConfigError(f"{path}: the safetensors header is malformed ({exc!r})") from exc
    if any(not 0 <= begin <= end for begin, end in spans):
        raise ConfigError(f"{path}: the safetensors header has tensors that end before they begin")
    return spans

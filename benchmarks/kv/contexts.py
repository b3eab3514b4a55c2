"""The texts that quality is measured on: source files of pinned packages, by their hashes.

Calibration never sees them (it reads the standard library), nor did baton-tiny's training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from baton.protocol.errors import ConfigError

MANIFEST = Path(__file__).with_name("manifest.json")
NUM_FILES = 204
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 12_000
PACKAGES = [
    "anyio",
    "click",
    "fsspec",
    "grpcio",
    "h11",
    "httpcore",
    "httpx",
    "huggingface-hub",
    "hypothesis",
    "jinja2",
    "jsonschema",
    "markdown-it-py",
    "msgspec",
    "mypy",
    "networkx",
    "numpy",
    "openai",
    "packaging",
    "prometheus-client",
    "psutil",
    "pydantic",
    "pygments",
    "pytest",
    "pyyaml",
    "pyzmq",
    "ray",
    "referencing",
    "requests",
    "rich",
    "safetensors",
    "setuptools",
    "starlette",
    "sympy",
    "tokenizers",
    "transformers",
    "typer",
    "urllib3",
    "uvicorn",
]
"""Pinned in requirements-dev.lock."""


class SourceFile(msgspec.Struct, frozen=True):
    package: str
    version: str
    path: str
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    files: list[SourceFile]


def read_manifest() -> Manifest:
    return msgspec.json.decode(MANIFEST.read_bytes(), type=Manifest)


def token_rows(tokenizer: Tokenizer, first: int, num_tokens: int) -> Iterator[NDArray[np.int64]]:
    """The beginning of each file of the manifest, ``num_tokens`` long, after the token ``first``.
    Raises ConfigError for a file that is absent or another than the one that was measured."""
    for file in read_manifest().files:
        yield _tokens(tokenizer, first, _read(file).decode())[:num_tokens]


def make_manifest(tokenizer: Tokenizer, num_tokens: int) -> Manifest:
    """Files of at least ``num_tokens``, from all packages in turn, at random within each."""
    by_package = [_candidates(name) for name in PACKAGES]
    found: list[SourceFile] = []
    while len(found) < NUM_FILES and any(by_package):
        for files in by_package:
            while files and len(found) < NUM_FILES:
                file = files.pop()
                text = _read(file).decode(errors="replace")
                if len(_tokens(tokenizer, 0, text)) >= num_tokens:
                    found.append(file)
                    break
    return Manifest(found)


def _candidates(package: str) -> list[SourceFile]:
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        return []
    files = []
    for path in sorted(installed.files or (), key=str):
        on_disk = Path(str(installed.locate_file(path)))
        if path.suffix != ".py" or not on_disk.is_file():
            continue
        if MIN_FILE_BYTES <= on_disk.stat().st_size <= MAX_FILE_BYTES:
            digest = hashlib.sha256(on_disk.read_bytes()).hexdigest()
            files.append(SourceFile(package, installed.version, str(path), digest))
    random.Random(package).shuffle(files)
    return files


def _read(file: SourceFile) -> bytes:
    where = f"{file.path} of {file.package} {file.version}"
    try:
        path = Path(str(distribution(file.package).locate_file(file.path)))
        data = path.read_bytes()
    except (PackageNotFoundError, OSError) as exc:
        raise ConfigError(f"{where}: not installed ({exc}); take the locked versions") from exc
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ConfigError(f"{where}: another file than the one measured; take the locked versions")
    return data


def _tokens(tokenizer: Tokenizer, first: int, text: str) -> NDArray[np.int64]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.array([first, *ids], np.int64)

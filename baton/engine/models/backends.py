"""Which backend a device gets.

Deterministic mode: a request's logits are bitwise the same whatever shares its batch, however it
is chunked, and on whichever worker of the same arithmetic class it runs. The compiled CPU
kernels always compute so; on a GPU products run in row tiles of one fixed shape (see
``torch_backend``) and one attention kernel takes all rows.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from baton.engine.kernels.compiled.build import CannotCompile
from baton.engine.kernels.compiled.library import load_library
from baton.engine.models.backend import Backend
from baton.engine.models.compiled_backend import CompiledBackend
from baton.engine.models.torch_backend import TorchBackend
from baton.protocol.errors import ConfigError

log = logging.getLogger(__name__)


def backend_for(device: torch.device, *, num_threads: int, deterministic: bool) -> Backend:
    """Sets torch's compute threads. Raises ConfigError when ``deterministic`` asks for what this
    machine lacks."""
    torch.set_num_threads(num_threads)
    if device.type != "cpu":
        return TorchBackend(device, deterministic=deterministic)
    try:
        backend = CompiledBackend(load_library(num_threads))
    except CannotCompile as exc:
        if deterministic:
            raise ConfigError(
                f"deterministic is true, which on a CPU needs the compiled kernels: {exc}",
                param="deterministic",
            ) from exc
        _warn_once(str(exc))
        return TorchBackend(device, deterministic=False)
    # What is left to torch is small; its threads would spin beside those of the kernels.
    torch.set_num_threads(1)
    return backend


@cache
def _warn_once(reason: str) -> None:
    log.warning("running on plain torch, several times slower than compiled kernels: %s", reason)

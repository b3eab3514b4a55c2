"""A torch.distributed group of two: the sender is rank 0, the receiver rank 1.

Everything here blocks and runs on a ``Mover``'s thread. Each wait has a deadline. A group that
has failed, or was aborted, is of no more use: the next link is another group with another
store and name, so that nothing of the old one can reach the new.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from kv_transfer.transports.contract import CONNECT_DEADLINE_S

Backend = Literal["gloo", "nccl"]

MOVE_DEADLINE_S = 10.0
"""Of one payload, once both sides are ready for it."""
_POLL_S = 0.000_2

_DISTRIBUTED: Any = torch.distributed
"""Its stubs leave out the stores and the options of process groups."""


def is_available(backend: Backend) -> bool:
    if not _DISTRIBUTED.is_available():
        return False
    if backend == "gloo":
        return bool(_DISTRIBUTED.is_gloo_available())
    return bool(_DISTRIBUTED.is_nccl_available()) and torch.cuda.is_available()


def host_store(host: str) -> tuple[Any, int]:
    """The receiver's, and its port: on that address only, unlike torch's own listener."""
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    store = _DISTRIBUTED.TCPStore(
        host,
        port,
        2,
        is_master=True,
        timeout=timedelta(seconds=CONNECT_DEADLINE_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def find_store(host: str, port: int) -> Any:
    timeout = timedelta(seconds=CONNECT_DEADLINE_S)
    return _DISTRIBUTED.TCPStore(host, port, 2, is_master=False, timeout=timeout)


class PairGroup:
    """Raises RuntimeError (torch's) where the other side does not come, or is gone."""

    def __init__(self, backend: Backend, store: Any, name: str, rank: int, own_host: str) -> None:
        self._other = 1 - rank
        self._num_moved = 0
        self._device = torch.device("cpu")
        timeout = timedelta(seconds=CONNECT_DEADLINE_S)
        prefixed = _DISTRIBUTED.PrefixStore(name, store)
        if backend == "gloo":
            gloo = _DISTRIBUTED.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timeout
            options._devices = [gloo.create_device(hostname=own_host)]
            self._group = gloo(prefixed, rank, 2, options)
        else:
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._group = nccl_group(prefixed, rank, 2, self._device)

    def send(self, payload: Tensor) -> None:
        """payload: uint8 in host memory; not written to before this returns."""
        staged = payload.to(self._device)
        self._wait(self._group.send, staged)

    def receive(self, payload: Tensor) -> None:
        staged = payload if self._device.type == "cpu" else payload.to(self._device)
        self._wait(self._group.recv, staged)
        if staged is not payload:
            payload.copy_(staged)

    def _wait(self, move: Callable[[list[Tensor], int, int], Any], tensor: Tensor) -> None:
        self._num_moved += 1
        work = move([tensor], self._other, self._num_moved)
        if self._device.type == "cpu":
            work.wait(timedelta(seconds=MOVE_DEADLINE_S))
        else:
            wait_for_nccl(work)

    def abort(self) -> None:
        """From any thread; ends what another one waits for. May block (NCCL), so not on the
        event loop."""
        self._group.abort()


def nccl_group(store: Any, rank: int, size: int, device: torch.device) -> Any:
    """A communicator of its own, joined without blocking calls into NCCL."""
    nccl = _DISTRIBUTED.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=CONNECT_DEADLINE_S)
    options.config.blocking = 0
    group = nccl(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def wait_for_nccl(work: Any) -> None:
    """Its own wait makes a stream wait, not the thread. Raises RuntimeError at the deadline."""
    end, pause = time.monotonic() + MOVE_DEADLINE_S, threading.Event()
    while not work.is_completed():
        if time.monotonic() > end:
            raise RuntimeError(f"no word of the other side for {MOVE_DEADLINE_S:g} s")
        pause.wait(_POLL_S)
    if (exc := work.exception()) is not None:
        raise RuntimeError(f"NCCL failed: {exc}")

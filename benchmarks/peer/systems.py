"""What is measured: a serving system that is up, however it was started."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.peer.processes import signal_all, tree

HOST = "127.0.0.1"
SERVED_NAME = "bench"
OURS = "baton"
PEER = "vllm"
MAX_MODEL_LEN = 4_096
MAX_NUM_SEQS = 64
NUM_WORKERS = 2

Shape = Literal["1P+1D", "2 colocated"]
SHAPES: tuple[Shape, ...] = ("1P+1D", "2 colocated")
STARTS = ("eager", "compiled")
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class System:
    """start: in which way the peer was started, "" for ours. port: of OpenAI-compatible HTTP.

    roots: the processes that were started; they and their children are the system.
    grpc_address: ours only. decode_port: of the HTTP of the peer's decode worker, 1P+1D only.
    """

    engine: str
    start: str
    shape: Shape
    port: int
    roots: tuple[int, ...]
    grpc_address: str = ""
    decode_port: int = 0

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.engine, self.start, self.shape) if part)

    @property
    def pids(self) -> tuple[int, ...]:
        return tree(self.roots)

    def pause(self) -> None:
        """No processor time until it is resumed: the others have the machine."""
        signal_all(self.pids, signal.SIGSTOP)

    def resume(self) -> None:
        signal_all(self.pids, signal.SIGCONT)

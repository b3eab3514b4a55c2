"""What a person sees while a cluster starts: a spinner with the time on a terminal, plain
lines elsewhere. Standard output stays free for results."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.status import Status


class Progress:
    """``tell`` for things under way, ``done`` for what stays on the screen."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, line: str) -> None:
        elapsed_s = time.monotonic() - self._began
        self._console.print(f"[dim]{elapsed_s:6.1f}s[/dim]  {line}")
        if self._status is not None:
            self._status.update(line)

    def done(self, line: str) -> None:
        if self._status is not None:
            self._status.stop()
        self._console.print(f"[bold]{line}[/bold]")

"""Telling of layers while a step runs: their K and V can be read before the step is over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch


class CopyStream:
    """Where KV is read on a GPU: behind the steps that were given to it, beside the next one.
    Nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._given: torch.cuda.Event | None = None

    def step_given(self) -> None:
        """The device has been given a whole step: what is read from now on comes behind it."""
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._given = event

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if self._given is not None:
                self._stream.wait_event(self._given)
            yield


class LayerMarks:
    """One step's. On a GPU the host is far ahead of the layers: an event behind each marked one
    tells when it is done, and a mark is passed on by the next that finds it so."""

    def __init__(
        self,
        marks: Collection[int],
        tell: Callable[[int], None] | None,
        device: torch.device,
    ) -> None:
        self._marks = frozenset(marks) if tell is not None else frozenset[int]()
        self._tell = tell
        self._is_cuda = device.type == "cuda"
        self._pending: list[tuple[int, torch.cuda.Event]] = []

    @property
    def on_layer(self) -> Callable[[int], None] | None:
        """Of ``Decoder.forward``; None where nothing is to be told."""
        return self._layer if self._marks else None

    def _layer(self, number: int) -> None:
        count = number + 1
        if count not in self._marks:
            return
        assert self._tell is not None
        if not self._is_cuda:
            self._tell(count)
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((count, event))

    def flush(self) -> None:
        """Behind the launch of the whole step: wait for each mark in turn, and tell."""
        for count, event in self._pending:
            assert self._tell is not None
            event.synchronize()
            self._tell(count)
        self._pending.clear()

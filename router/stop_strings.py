"""Finds stop strings in text that arrives in pieces.

The first stop string to be complete wins; of several that end at the same character the
longest. So the outcome does not depend on how the text was cut into pieces. Text that may
be the beginning of a stop string is held back, and never more than that.

An Aho-Corasick automaton: time is linear in the text, whatever the number of strings. Its
state is exactly the longest end of the text that begins a stop string, so the length of
that state is what has to be held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Scanned:
    """``text`` may be shown. ``stop`` is the string that was found; text before it only."""

    text: str
    stop: str | None = None


@dataclass(slots=True)
class _Node:
    depth: int
    edges: dict[str, _Node] = field(default_factory=dict)
    fail: _Node | None = None
    """The node of the longest proper suffix; None at the root alone."""
    stop: str | None = None
    """The longest stop string that ends here."""


class StopScanner:
    """For one choice. After a find, or ``flush``, it is finished."""

    def __init__(self, stop: Sequence[str]) -> None:
        """``stop``: no empty strings."""
        assert all(stop)
        self._root = self._state = _automaton(stop)
        self._held = ""

    def push(self, text: str) -> Scanned:
        if not self._root.edges:
            return Scanned(text)
        buffer = self._held + text
        state = self._state
        for offset, char in enumerate(text):
            state = _next(state, char)
            if state.stop is not None:
                end = len(self._held) + offset + 1
                return Scanned(buffer[: end - len(state.stop)], state.stop)
        self._state = state
        shown = len(buffer) - state.depth
        self._held = buffer[shown:]
        return Scanned(buffer[:shown])

    def flush(self) -> str:
        """What is held back: the text has ended, so it begins no stop string."""
        held, self._held, self._state = self._held, "", self._root
        return held


def _next(state: _Node, char: str) -> _Node:
    while True:
        child = state.edges.get(char)
        if child is not None:
            return child
        if state.fail is None:
            return state
        state = state.fail


def _automaton(stop: Sequence[str]) -> _Node:
    root = _Node(0)
    for string in stop:
        node = root
        for char in string:
            node = node.edges.setdefault(char, _Node(node.depth + 1))
        node.stop = string
    # Breadth first: a node's suffix is shorter, so its own links are already set.
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for char, child in node.edges.items():
            child.fail = root if node.fail is None else _next(node.fail, char)
            child.stop = child.stop or child.fail.stop
            queue.append(child)
    return root

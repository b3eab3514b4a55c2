"""Writes docs/lifecycles.md from the tables in ``baton.protocol.lifecycle``.

``python tools/lifecycle_diagrams.py`` writes it, ``--check`` fails when it is out of date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from baton.protocol import lifecycle

TARGET = Path(__file__).resolve().parent.parent / "docs" / "lifecycles.md"
HEADER = """# Lifecycles

Written from the tables in `baton/protocol/lifecycle.py` by `python tools/lifecycle_diagrams.py`;
a test holds them equal. A move that no arrow shows raises `IllegalTransition` with the story of
the id, and changes nothing.
"""
TABLES: tuple[tuple[str, type[StrEnum], Mapping[StrEnum, Mapping[StrEnum, StrEnum]]], ...] = (
    ("A request, as its router sees it", lifecycle.RequestState, lifecycle.REQUEST_TRANSITIONS),
    ("A hand-over, prefill end", lifecycle.SendState, lifecycle.SEND_TRANSITIONS),
    ("A hand-over, decode end", lifecycle.ReceiveState, lifecycle.RECEIVE_TRANSITIONS),
    ("A worker incarnation, as a router sees it", lifecycle.MemberState,
     lifecycle.MEMBER_TRANSITIONS),
)  # fmt: skip


def diagram(table: Mapping[StrEnum, Mapping[StrEnum, StrEnum]]) -> str:
    """Mermaid; events between the same two states share an arrow."""
    lines = ["stateDiagram-v2", f"    [*] --> {next(iter(table)).value}"]
    for state, moves in table.items():
        arrows: dict[StrEnum, list[str]] = {}
        for event, target in moves.items():
            arrows.setdefault(target, []).append(event.value)
        lines += [
            f"    {state.value} --> {target.value}: {', '.join(events)}"
            for target, events in arrows.items()
        ]
        if not moves:
            lines.append(f"    {state.value} --> [*]")
    return "\n".join(lines)


def document() -> str:
    parts = [HEADER]
    for title, states, table in TABLES:
        parts.append(f"## {title}\n")
        doc = inspect.getdoc(states) if states.__doc__ and "enum" not in states.__doc__ else None
        if doc:
            parts.append(f"{doc}\n")
        parts.append(f"```mermaid\n{diagram(table)}\n```\n")
    return "\n".join(parts)


def main() -> int:
    if "--check" in sys.argv[1:]:
        if TARGET.read_text() == document():
            return 0
        print(f"{TARGET.name} is out of date; run python tools/lifecycle_diagrams.py")
        return 1
    TARGET.write_text(document())
    print(f"wrote {TARGET.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What is wrong with a configuration file: all of it at once, each with its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from baton.protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake.

    line: 1-based; 0 where the file as a whole is meant.
    path: such as ``pools[1].engine.block_size``; empty where no key is meant.
    message: the value, and what is allowed or the way out.
    """

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigErrors(ConfigError):
    """Every problem of one file, in the order of its lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        assert self.problems, "an error without a problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def to_json(self) -> list[dict[str, str | int]]:
        """One ``{file, line, path, message}`` per problem, for ``baton validate --json``."""
        return [asdict(problem) for problem in self.problems]

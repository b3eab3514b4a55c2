"""One YAML file to one ``ClusterConfig``, or every mistake in it at once.

Reads the file and looks for the checkpoint folder; opens no socket and starts nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import msgspec.inspect

from baton.protocol.config import ClusterConfig
from cluster import yaml_tree
from cluster.cross_check import check_sections
from cluster.problems import ConfigErrors, Problem
from cluster.schema_walk import Walk

_SCHEMA = msgspec.inspect.type_info(ClusterConfig)


def load_config(path: Path) -> ClusterConfig:
    """The configuration in ``path``; raises ConfigErrors that names every problem.

    A relative ``model.path`` with a slash in it counts from the file's folder and comes
    back absolute, since workers run elsewhere. A bare name is looked up by the checkpoint
    finder.
    """
    file = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(yaml_tree.MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise _unreadable(file, f"cannot be read: {exc.strerror}") from exc
    try:
        # A cut file is refused for its size, not for the character that the cut halved.
        text = raw.decode("utf-8", "replace" if len(raw) > yaml_tree.MAX_FILE_BYTES else "strict")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise _unreadable(file, "is not UTF-8 text; save it as UTF-8", line) from exc
    return parse_config(text, file=file, folder=path.resolve().parent)


def parse_config(text: str, *, file: str, folder: Path) -> ClusterConfig:
    """As ``load_config``; ``file`` is named in problems, ``folder`` anchors relative paths."""
    root = yaml_tree.parse(text, file)
    walk = Walk(file)
    data = walk.value(root, _SCHEMA, "")
    if isinstance(data.get("model"), dict) and "path" in data["model"]:
        data["model"]["path"] = anchored(data["model"]["path"], folder)
    for path, message in check_sections(data):
        walk.problems.append(Problem(file, walk.nearest_line(path), path, message))
    if walk.problems:
        raise ConfigErrors(walk.problems)
    try:
        return msgspec.convert(data, ClusterConfig)
    except msgspec.ValidationError as exc:
        # The walk knows every type of the schema: this is a rule it has no words for.
        raise _unreadable(file, str(exc)) from exc


def anchored(model_path: str, folder: Path) -> str:
    path = Path(model_path).expanduser()
    if "/" not in model_path or path.is_absolute():
        return str(path) if path.is_absolute() else model_path
    return str((folder / path).resolve())


def _unreadable(file: str, message: str, line: int = 0) -> ConfigErrors:
    return ConfigErrors([Problem(file, line, "", message)])

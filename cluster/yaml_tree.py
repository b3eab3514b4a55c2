"""YAML text to a tree of nodes that know their lines; refuses what a config never needs.

Refused before any value is built: anchors and aliases (so nothing can multiply), tags,
several documents, deep nesting, and more text or values than a hand ever wrote.
"""

from __future__ import annotations

import yaml

from cluster.problems import ConfigErrors, Problem

MAX_FILE_BYTES = 2**20
MAX_EVENTS = 50_000
MAX_DEPTH = 32


def parse(text: str, file: str) -> yaml.MappingNode:
    """The root mapping of ``text``; raises ConfigErrors with the line of the first fault."""
    size_bytes = len(text.encode("utf-8", errors="surrogatepass"))
    if size_bytes > MAX_FILE_BYTES:
        raise _errors(file, 0, f"is {size_bytes} bytes; a config has at most {MAX_FILE_BYTES}")
    try:
        _check_events(text, file)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        raise _syntax_error(exc, text, file) from exc
    except yaml.YAMLError as exc:
        raise _errors(file, 0, f"is not YAML: {exc}") from exc
    if root is None:
        raise _errors(file, 0, "is empty; start from deploy/examples/local.yaml")
    if not isinstance(root, yaml.MappingNode):
        raise _errors(
            file,
            line_of(root),
            f"the file is a {kind_of(root)}; it must be a mapping with version, model and pools",
        )
    return root


def line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def kind_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "mapping"
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"


def _check_events(text: str, file: str) -> None:
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if count > MAX_EVENTS:
            raise _errors(file, line, f"more than {MAX_EVENTS} values; a config needs far fewer")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _errors(file, line, "a second document begins here; a config is one")
        elif isinstance(event, yaml.AliasEvent):
            raise _errors(file, line, f"alias *{event.anchor}: write the value out instead")
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise _errors(file, line, f"anchor &{event.anchor}: write the value out instead")
        tag = getattr(event, "tag", None)
        if tag is not None and not isinstance(event, yaml.CollectionEndEvent):
            raise _errors(file, line, f"tag {tag}: tags are not taken, write the plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _errors(file, line, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _syntax_error(exc: yaml.MarkedYAMLError, text: str, file: str) -> ConfigErrors:
    mark = exc.problem_mark or exc.context_mark
    line = int(mark.line) + 1 if mark is not None else 0
    lines = text.splitlines()
    faulty = lines[line - 1] if 0 < line <= len(lines) else ""
    if "\t" in faulty[: len(faulty) - len(faulty.lstrip())]:
        return _errors(file, line, "a tab indents this line; YAML indents with spaces")
    said = ", ".join(part for part in (exc.context, exc.problem) if part)
    return _errors(file, line, f"is not YAML: {said}")


def _errors(file: str, line: int, message: str) -> ConfigErrors:
    return ConfigErrors([Problem(file, line, "", message)])

"""Messages to one prompt text, by the Jinja template of the model folder.

Templates come from the checkpoint only, never from a client. They run sandboxed: no
attribute tricks, no mutation, a budget for loops and for output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.protocol.errors import ConfigError, InvalidRequest
from router.limits import MAX_PROMPT_CHARS
from router.tokenizer import SpecialTokens, read_tokenizer_config, special_tokens

MAX_TEMPLATE_BYTES = 256 * 2**10
MAX_LOOP_STEPS = 1_000_000
"""Sum of all ``range`` lengths in one rendering."""

_SOURCE_FILE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


class ChatTemplate:
    """Safe to use from several threads: each rendering has its own budget."""

    def __init__(self, source: str | None, special: SpecialTokens | None = None) -> None:
        """``source`` None: the model has no template. Raises ConfigError on bad syntax."""
        self._special = special or SpecialTokens()
        self._template = None if source is None else _compile(source)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """From chat_template.jinja, else from tokenizer_config.json, else none."""
        return cls(_read_source(folder), special_tokens(folder))

    @property
    def exists(self) -> bool:
        return self._template is not None

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = True) -> str:
        """Raises InvalidRequest: no template, or it refuses these messages."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: send a plain prompt instead, or put a "
                f"{_SOURCE_FILE} into the model folder",
                param="messages",
            )
        pieces = self._template.generate(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=self._special.bos,
            eos_token=self._special.eos,
            tools=None,
            documents=None,
            range=_budgeted_range(),
        )
        try:
            return _join(pieces)
        except InvalidRequest:
            raise
        except Exception as exc:  # a template is a program: it may raise anything
            raise InvalidRequest(
                f"the chat template cannot render these messages: {str(exc)[:300]}",
                param="messages",
            ) from exc


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses products that would build a giant string or number."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        plain = all(
            isinstance(value, int | float) and abs(value) <= MAX_LOOP_STEPS
            for value in (left, right)
        )
        if operator == "**" or not plain:
            raise jinja2.TemplateError(f"operator {operator} is not allowed here")
        return left * right


def _compile(source: str) -> jinja2.Template:
    size_bytes = len(source.encode("utf-8", "replace"))
    if size_bytes > MAX_TEMPLATE_BYTES:
        raise ConfigError(
            f"the chat template has {size_bytes} bytes; allowed: {MAX_TEMPLATE_BYTES}",
            param="model.path",
        )
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as exc:
        raise ConfigError(
            f"the chat template is broken at line {exc.lineno}: {exc.message}", param="model.path"
        ) from exc


def _read_source(folder: Path) -> str | None:
    path = folder / _SOURCE_FILE
    if path.is_file():
        with path.open("rb") as file:
            raw = file.read(MAX_TEMPLATE_BYTES + 1)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{path} is not UTF-8 text", param="model.path") from exc
    found = read_tokenizer_config(folder).get("chat_template")
    if found is None or isinstance(found, str):
        return found
    named = {
        entry.get("name"): entry.get("template")
        for entry in (found if isinstance(found, list) else ())
        if isinstance(entry, dict)
    }
    source = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    if not isinstance(source, str):
        raise ConfigError(
            "chat_template in tokenizer_config.json is neither a string nor a list of named "
            f"templates with one called default (found names: {sorted(map(str, named))})",
            param="model.path",
        )
    return source


def _join(pieces: Iterable[str]) -> str:
    kept: list[str] = []
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise InvalidRequest(
                f"the rendered messages have over {MAX_PROMPT_CHARS} characters",
                param="messages",
            )
        kept.append(piece)
    return "".join(kept)


def _budgeted_range() -> Callable[..., range]:
    left = MAX_LOOP_STEPS

    def limited(*bounds: int) -> range:
        nonlocal left
        steps = range(*bounds)
        left -= len(steps)
        if left < 0:
            raise jinja2.TemplateError(f"loops over more than {MAX_LOOP_STEPS} steps")
        return steps

    return limited


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_ignored: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

"""From what a client sent to a ``GenerateSpec``, or to an error that says what to change.

Every message names the field, the value (shortened) and what is allowed. Nothing here
waits or keeps state; the costly part is tokenising, so ``generate_spec_off_loop`` moves
long prompts to a thread.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import msgspec

from baton.protocol.block_hash import KV_FLOORS
from baton.protocol.config import RouterConfig
from baton.protocol.errors import InvalidRequest, PromptTooLong, UnknownModel
from baton.protocol.ids import (
    MAX_REQUEST_ID_CHARS,
    RequestId,
    is_valid_request_id,
    new_request_id,
)
from baton.protocol.sampling import (
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOKENS_CAP,
)
from router import limits
from router.chat_template import ChatMessage, ChatTemplate
from router.field_checks import check_text, flag, integer, number, shown
from router.frontend import GenerateSpec, ModelInfo
from router.logprob_cap import check_together, tokens_that_fit
from router.raw_request import RawRequest
from router.sampling_fields import check_against_prompt, sampling_params, token_ids
from router.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""For plain prompts. A chat answer may by default take all the room that is left."""


class Validator:
    """Safe to use from several threads."""

    def __init__(
        self,
        model: ModelInfo,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        config: RouterConfig,
        kv_quality: str = "",
    ) -> None:
        """kv_quality: of requests that name none."""
        self._kv_quality = kv_quality
        self._model = model
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._config = config

    def generate_spec(self, raw: RawRequest) -> GenerateSpec:
        """Raises InvalidRequest, PromptTooLong or UnknownModel; the costly step comes last."""
        self.check_model(raw.model)
        n = integer("n", raw.n, 1, 1, MAX_N)
        asked = None if raw.max_tokens is None else _max_tokens(raw.max_tokens)
        sampling = sampling_params(raw, n, self._model, self._tokenizer)
        request_id = _request_id(raw.request_id)
        stop = _stop_strings(raw.stop)
        priority = integer("priority", raw.priority, 0, -limits.MAX_PRIORITY, limits.MAX_PRIORITY)
        timeout_s = self._timeout_s(raw.timeout_s)
        cache_salt = _cache_salt(raw.cache_salt)
        kv_quality = _kv_quality(raw.kv_quality, self._kv_quality)
        skip_special_tokens = flag("skip_special_tokens", raw.skip_special_tokens, True)
        prompt_ids = self._prompt_ids(raw)
        default = DEFAULT_MAX_TOKENS if raw.messages is None else self._model.max_model_len
        default = min(default, tokens_that_fit(sampling, n, len(prompt_ids)))
        max_tokens = self._fit(len(prompt_ids), asked, default)
        sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens)
        check_against_prompt(sampling, len(prompt_ids))
        spec = GenerateSpec(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            n=n,
            stop=stop,
            priority=priority,
            timeout_s=timeout_s,
            skip_special_tokens=skip_special_tokens,
            cache_salt=cache_salt,
            kv_quality=kv_quality,
        )
        check_together([spec])
        return spec

    async def generate_spec_off_loop(self, raw: RawRequest) -> GenerateSpec:
        """The same; a long text is tokenised in a thread, so that streams go on."""
        if raw.num_text_chars <= limits.INLINE_TOKENISE_CHARS:
            return self.generate_spec(raw)
        return await asyncio.to_thread(self.generate_spec, raw)

    def check_model(self, name: str | None) -> None:
        """None is the model that is served."""
        if name is not None and name != self._model.name:
            raise UnknownModel(
                f"model {shown(name)} is not served here; allowed: {self._model.name!r}",
                param="model",
            )

    def _prompt_ids(self, raw: RawRequest) -> tuple[int, ...]:
        forms = {"prompt": raw.prompt, "prompt_ids": raw.prompt_ids, "messages": raw.messages}
        given = [name for name, value in forms.items() if value is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"{' and '.join(given) or 'no prompt'} given; "
                "allowed: exactly one of prompt, prompt_ids, messages",
                param=given[0] if given else "prompt",
            )
        param = "prompt" if raw.messages is None else "messages"
        if raw.messages is not None:
            ids = self._encode(param, self._render(raw.messages), add_special_tokens=False)
        elif raw.prompt is not None:
            ids = self._encode(param, raw.prompt, add_special_tokens=True)
        else:
            ids = raw.prompt_ids or ()
        most = self._model.max_model_len - 1
        if not ids:
            raise InvalidRequest(f"{param} is empty; allowed: 1 to {most} tokens", param=param)
        if len(ids) > most:
            raise PromptTooLong(
                f"{param} has {len(ids)} tokens; allowed: at most {most}, so that one output token "
                f"fits into max_model_len {most + 1}",
                param=param,
            )
        return token_ids(param, ids, self._model.vocab_size)

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        if not 1 <= len(messages) <= limits.MAX_MESSAGES:
            raise InvalidRequest(
                f"messages has {len(messages)} entries; allowed: 1 to {limits.MAX_MESSAGES}",
                param="messages",
            )
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            if not 1 <= len(message.role) <= limits.MAX_ROLE_CHARS:
                raise InvalidRequest(
                    f"{where}.role is {shown(message.role)}; allowed: 1 to "
                    f"{limits.MAX_ROLE_CHARS} characters",
                    param=f"{where}.role",
                )
            check_text(f"{where}.role", message.role)
            check_text(f"{where}.content", message.content)
        self._check_num_chars("messages", sum(len(m.content) for m in messages))
        return self._chat_template.render(messages)

    def _encode(self, param: str, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """No ids for an empty text, even where the tokeniser would add some."""
        self._check_num_chars(param, len(text))
        check_text(param, text)
        if not text:
            return ()
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_num_chars(self, param: str, num_chars: int) -> None:
        """Refuse before tokenising what cannot fit whatever its tokens are."""
        most = self._model.max_model_len * self._tokenizer.max_token_chars
        if num_chars > min(most, limits.MAX_PROMPT_CHARS):
            raise PromptTooLong(
                f"{param} has {num_chars} characters; max_model_len "
                f"{self._model.max_model_len} tokens cannot hold more than "
                f"{min(most, limits.MAX_PROMPT_CHARS)}",
                param=param,
            )

    def _fit(self, num_prompt_tokens: int, asked: int | None, default: int) -> int:
        room = self._model.max_model_len - num_prompt_tokens
        if asked is None:
            return min(default, room, MAX_TOKENS_CAP)
        if asked > room:
            raise PromptTooLong(
                f"max_tokens is {asked} and the prompt has {num_prompt_tokens} tokens: "
                f"{asked + num_prompt_tokens} together, over max_model_len "
                f"{self._model.max_model_len}; allowed with this prompt: at most {room}",
                param="max_tokens",
            )
        return asked

    def _timeout_s(self, value: float | None) -> float:
        most = self._config.max_timeout_s
        timeout_s = number("timeout_s", value, min(self._config.default_timeout_s, most))
        if not (math.isfinite(timeout_s) and 0 < timeout_s <= most):
            raise InvalidRequest(
                f"timeout_s is {timeout_s}; allowed: above 0, at most {most} seconds",
                param="timeout_s",
            )
        return timeout_s


def _max_tokens(value: int) -> int:
    return integer("max_tokens", value, 0, 1, MAX_TOKENS_CAP)


def _request_id(value: str | None) -> RequestId:
    if value is None:
        return new_request_id()
    if not isinstance(value, str) or not is_valid_request_id(value):
        raise InvalidRequest(
            f"request_id is {shown(value)}; allowed: 1 to {MAX_REQUEST_ID_CHARS} characters of "
            "A-Z a-z 0-9 . _ : -",
            param="request_id",
        )
    return RequestId(value)


def _cache_salt(value: str | None) -> str:
    """An empty one is refused: it would share with everybody, which no salt is meant to do.
    A salt is kept like a password, so no message shows it."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(
            f"cache_salt is {shown(value)}; allowed: a non-empty string", param="cache_salt"
        )
    if not 1 <= len(value) <= limits.MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt has {len(value)} characters; allowed: 1 to {limits.MAX_CACHE_SALT_CHARS}",
            param="cache_salt",
        )
    check_text("cache_salt", value)
    return value


def _kv_quality(value: str | None, default: str) -> str:
    if value is None:
        return default
    if value not in KV_FLOORS:
        allowed = ", ".join(KV_FLOORS)
        raise InvalidRequest(
            f"kv_quality is {shown(value)}; allowed: {allowed}", param="kv_quality"
        )
    return value


def _stop_strings(values: Sequence[str] | None) -> tuple[str, ...]:
    values = values or ()
    if len(values) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"stop has {len(values)} strings; allowed: at most {MAX_STOP_STRINGS}", param="stop"
        )
    for index, value in enumerate(values):
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequest(
                f"stop[{index}] is {shown(value)}; allowed: text of 1 to "
                f"{MAX_STOP_STRING_CHARS} characters",
                param="stop",
            )
        check_text(f"stop[{index}]", value, param="stop")
    return tuple(values)

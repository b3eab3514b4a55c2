"""OpenAI bodies to ``RawRequest``s: one per prompt. What would be ignored silently but
changes the answer is refused by name; neutral values of the same fields are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from baton.protocol.errors import InvalidRequest
from router import limits
from router.chat_template import ChatMessage
from router.field_checks import shown
from router.json_guard import decode_json
from router.openai_structured import constraint_of
from router.openai_types import ChatRequest, CommonRequest, CompletionRequest, RequestMessage
from router.raw_request import RawRequest

NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "modalities": (["text"], []),
    "prediction": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields that are not done yet, with the values that ask for nothing. Null always does."""

NEUTRAL_IN_CHAT: dict[str, tuple[object, ...]] = NEUTRAL_VALUES | {"echo": (False,)}


def read_completion_request(body: bytes) -> CompletionRequest:
    """Raises InvalidRequest."""
    request = decode_json(body, CompletionRequest)
    _refuse_what_is_not_done(body, request, NEUTRAL_VALUES)
    _check_prompt_logprobs(request)
    return request


def read_chat_request(body: bytes) -> ChatRequest:
    """Raises InvalidRequest."""
    request = decode_json(body, ChatRequest)
    _refuse_what_is_not_done(body, request, NEUTRAL_IN_CHAT)
    _check_prompt_logprobs(request)
    return request


def completion_raw_requests(request: CompletionRequest, request_id: str) -> list[RawRequest]:
    """One per prompt; of several, prompt i gets ``request_id`` with ``-i`` behind it."""
    prompts = _prompts(request.prompt)
    num_choices = len(prompts) * (request.n or 1)
    if len(prompts) > 1 and num_choices > limits.MAX_CHOICES_PER_REQUEST:
        raise InvalidRequest(
            f"{len(prompts)} prompts x n {request.n or 1} are {num_choices} choices; allowed: at "
            f"most {limits.MAX_CHOICES_PER_REQUEST} in one request",
            param="prompt",
        )
    common = replace(_common(request), logprobs=request.logprobs)
    if request.echo:
        common = _echoing(common)
    return [
        replace(
            common,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=None if isinstance(prompt, str) else prompt,
        )
        for index, prompt in enumerate(prompts)
    ]


def chat_raw_request(request: ChatRequest, request_id: str) -> RawRequest:
    if request.messages is None:
        raise InvalidRequest("messages is missing; allowed: a list of messages", param="messages")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            f"top_logprobs is {request.top_logprobs} but logprobs is not true; allowed: "
            "top_logprobs together with logprobs: true",
            param="top_logprobs",
        )
    return replace(
        _common(request),
        request_id=request_id,
        messages=[_message(index, message) for index, message in enumerate(request.messages)],
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _common(request: CommonRequest) -> RawRequest:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return RawRequest(
        model=request.model,
        max_tokens=request.num_tokens_asked,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        n=request.n,
        stop=stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        priority=request.priority,
        timeout_s=request.timeout_s,
        skip_special_tokens=request.skip_special_tokens,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        allowed_token_ids=request.allowed_token_ids,
        bad_token_ids=request.bad_token_ids,
        bad_words=request.bad_words,
        min_tokens=request.min_tokens,
        prompt_logprobs=request.prompt_logprobs,
        constraint=constraint_of(request),
        cache_salt=request.cache_salt,
        kv_quality=request.kv_quality,
    )


def _check_prompt_logprobs(request: CommonRequest) -> None:
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest(
            f"prompt_logprobs is {request.prompt_logprobs} and stream is true; allowed: one of "
            "them (or echo and logprobs in a stream of completions)",
            param="prompt_logprobs",
        )


def _echoing(raw: RawRequest) -> RawRequest:
    """``logprobs`` are of the echoed prompt too. Without tokens to generate (``max_tokens``
    is 0) one is drawn all the same, and not shown: see ``Answer``."""
    prompt_logprobs = raw.prompt_logprobs
    if raw.logprobs is not None:
        prompt_logprobs = max(raw.logprobs, prompt_logprobs or 0)
    max_tokens = 1 if raw.max_tokens == 0 else raw.max_tokens
    return replace(raw, prompt_logprobs=prompt_logprobs, max_tokens=max_tokens)


def _prompts(prompt: str | list[str | int | list[int]] | None) -> list[str | list[int]]:
    """A list of ids is one prompt; a list of texts or of lists of ids is several."""
    if prompt is None:
        raise InvalidRequest(
            "prompt is missing; allowed: text, token ids, or a list of either", param="prompt"
        )
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    if len(prompt) > limits.MAX_PROMPT_BATCH:
        raise InvalidRequest(
            f"prompt has {len(prompt)} entries; allowed: at most {limits.MAX_PROMPT_BATCH} prompts "
            "in one request",
            param="prompt",
        )
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(texts) == len(prompt):
        return [*texts]
    if len(lists) == len(prompt):
        return [*lists]
    raise InvalidRequest(
        "prompt mixes texts, token ids and lists; allowed: one kind", param="prompt"
    )


def _message(index: int, message: RequestMessage) -> ChatMessage:
    if isinstance(message.content, str):
        return ChatMessage(message.role, message.content)
    where = f"messages[{index}].content"
    if not message.content:
        raise InvalidRequest(f"{where} is missing; allowed: text", param=where)
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"{where} has a part of type {shown(part.type)}; allowed: parts of type 'text' "
                "with a text",
                param=where,
            )
    return ChatMessage(message.role, "".join(part.text or "" for part in message.content))


def _refuse_what_is_not_done(
    body: bytes, request: CommonRequest, neutral: Mapping[str, tuple[object, ...]]
) -> None:
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    for name in neutral.keys() & fields.keys():
        value = msgspec.json.decode(fields[name])
        if value is not None and value not in neutral[name]:
            raise _not_done(name, value, neutral[name])
    if "best_of" in fields:
        value = msgspec.json.decode(fields["best_of"])
        if value is not None and value != (request.n or 1):
            raise _not_done("best_of", value, ("the same as n",))


def _not_done(name: str, value: object, neutral: tuple[object, ...]) -> InvalidRequest:
    allowed = ", ".join(["null", *map(shown, neutral)])
    return InvalidRequest(
        f"{name} is {shown(value)}, and {name} is not supported yet; allowed: {allowed}",
        param=name,
    )

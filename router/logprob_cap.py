"""How many log-probabilities one request may ask for, those of all its answers together.

They are what makes an answer large: a token with alternatives is some sixty bytes for each of
them on the wire, and several times that while the answer is being made.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.protocol.errors import InvalidRequest
from baton.protocol.sampling import MAX_TOKENS_CAP, SamplingParams
from router import limits
from router.frontend import GenerateSpec


def tokens_that_fit(params: SamplingParams, n: int, num_prompt_tokens: int) -> int:
    """The longest answer that ``check_together`` allows for one prompt; 1 at least."""
    if params.num_logprobs < 0:
        return MAX_TOKENS_CAP
    left = limits.MAX_LOGPROBS_PER_REQUEST // n - _of_prompt(params, num_prompt_tokens)
    return max(1, left // (params.num_logprobs + 1))


def check_together(specs: Sequence[GenerateSpec]) -> None:
    """``specs``: one per prompt, alike but for the prompt. Raises InvalidRequest."""
    params, n, most = specs[0].sampling, specs[0].n, limits.MAX_LOGPROBS_PER_REQUEST
    of_prompts = n * sum(_of_prompt(spec.sampling, len(spec.prompt_ids)) for spec in specs)
    max_tokens = [spec.sampling.max_tokens for spec in specs]
    of_answers = n * sum(max_tokens) * (params.num_logprobs + 1)
    if of_prompts + of_answers <= most:
        return
    parts = [f"n is {n}"]
    if of_prompts:
        num_tokens = sum(len(spec.prompt_ids) for spec in specs)
        parts.append(f"prompt_logprobs {params.num_prompt_logprobs} of {num_tokens} prompt tokens")
    if of_answers:
        parts.append(f"logprobs {params.num_logprobs} of max_tokens {max(max_tokens)} each")
    raise InvalidRequest(
        f"{', '.join(parts)}, of {len(specs)} prompt(s): {of_prompts + of_answers} "
        f"log-probabilities; allowed: at most {most} in one request, alternatives counted",
        param="logprobs" if of_answers >= of_prompts else "prompt_logprobs",
    )


def _of_prompt(params: SamplingParams, num_prompt_tokens: int) -> int:
    """Of one choice; the first token has none."""
    return (num_prompt_tokens - 1) * (params.num_prompt_logprobs + 1)

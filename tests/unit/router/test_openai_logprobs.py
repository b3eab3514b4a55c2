from __future__ import annotations

from baton.protocol.sampling import TokenLogprobs, TopLogprob
from router.frontend import Token
from router.openai_logprobs import completion_logprobs
from tests.support.tiny_text import tiny_tokenizer


def test_a_token_that_is_none_of_the_best_has_its_own_entry() -> None:
    """As in OpenAI's answers: clients look up the token's text in its ``top_logprobs``."""
    best = (TopLogprob(2, -0.25), TopLogprob(3, -1.5))
    drawn = [Token(4, "x", TokenLogprobs(-7.0, best)), Token(3, "y", TokenLogprobs(-1.5, best))]
    found = completion_logprobs(drawn, tiny_tokenizer(), 0, with_top=True)
    assert found.top_logprobs is not None
    unlikely, likely = found.top_logprobs
    assert unlikely is not None
    assert likely is not None
    assert (len(unlikely), len(likely)) == (3, 2)
    assert [unlikely[found.tokens[0]], likely[found.tokens[1]]] == [-7.0, -1.5]

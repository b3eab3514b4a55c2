"""A worker refuses what would cost the other requests of a step, whoever validated it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from baton.engine.block_pool import BlockPool
from baton.protocol.sampling import SamplingParams
from baton.worker.admission import refusal
from tests.support.core import VOCAB_SIZE, body


def refused(**sampling: Any) -> str:
    request = replace(body(), sampling=SamplingParams(max_tokens=4, **sampling))
    return refusal(request, 8, BlockPool(16, 8), VOCAB_SIZE)


@pytest.mark.parametrize(
    "ids",
    [
        {"stop_token_ids": (1, VOCAB_SIZE)},
        {"allowed_token_ids": (VOCAB_SIZE,)},
        {"bad_token_ids": (VOCAB_SIZE + 5,)},
        {"bad_token_sequences": ((1, 2), (VOCAB_SIZE, 2))},
        {"logit_bias": ((2, 1.0), (VOCAB_SIZE, 1.0))},
    ],
)
def test_ids_outside_the_vocabulary(ids: dict[str, Any]) -> None:
    assert "below the vocabulary's 1000" in refused(**ids)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"bad_token_ids": tuple(range(VOCAB_SIZE))}, "no token to draw"),
        ({"min_tokens": 5}, "min_tokens is 5"),
        ({"bad_token_sequences": ((3,),)}, "sequence of 1 tokens"),
        ({"bad_token_sequences": ((),)}, "sequence of 0 tokens"),
        ({"bad_token_ids": (-1,)}, "none negative"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias[1] is nan"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "twice"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"allowed_token_ids": (1,), "bad_token_ids": (1,)}, "at least one"),
        ({"allowed_token_ids": (1,), "stop_token_ids": (1,), "min_tokens": 1}, "at least one"),
    ],
)
def test_rules_that_cannot_be_applied(sampling: dict[str, Any], words: str) -> None:
    assert words in refused(**sampling)


def test_what_can_run_is_taken() -> None:
    assert not refused(
        bad_token_ids=tuple(range(1, VOCAB_SIZE)),
        bad_token_sequences=((0, 0),),
        logit_bias=((VOCAB_SIZE - 1, -100.0),),
        min_tokens=4,
    )

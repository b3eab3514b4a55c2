"""A request's own floor decides what its KV goes through, over HTTP and in the SDK."""

from __future__ import annotations

from pathlib import Path

import httpx

from baton.client import Completion
from baton.client.types import Options
from baton.protocol.config import KvTransferConfig
from tests.support.clusters import assert_no_residue, running_cluster, tiny_config
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties, generate

PROMPT = prompt_of(300, 3)
NUM_TOKENS = 12


def codec_of(completion: Completion) -> object:
    timeline = completion.choices[0].timeline
    assert timeline is not None
    [span] = [s for s in timeline.spans if s.name == "transfer"]
    return span.attributes["codec"]


async def test_who_asks_for_exact_kv_gets_it_where_others_do_not(tmp_path: Path) -> None:
    transfer = KvTransferConfig(transport="zeromq", codec="int4", quality_floor="low")
    async with running_cluster(tiny_config(kv_transfer=transfer), tmp_path) as cluster:

        async def ask(floor: str | None) -> Completion:
            options: Options = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
            if floor is not None:
                options["kv_quality"] = floor
            return await cluster.client.generate(PROMPT, **options)

        assert codec_of(await ask(None)) == "int4"
        assert codec_of(await ask("medium")) == "int4"
        assert codec_of(await ask("high")) == "raw", "int4 is of medium quality"
        exact = await ask("exact")
        assert codec_of(exact) == "raw"
        async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60.0) as http:
            asked = {"prompt": PROMPT, "max_tokens": 1, "kv_quality": "perfect"}
            answer = await http.post("/v1/completions", json=asked)
        await assert_no_residue(cluster)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_quality"
    tokens = [t.token_id for t in exact.choices[0].tokens]
    assert len(tokens) == NUM_TOKENS
    if not count_near_ties(PROMPT, tokens):
        assert tokens == generate(PROMPT, NUM_TOKENS)

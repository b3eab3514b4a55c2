"""Structured output through real processes: everything parses, split equals colocated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import Any

import psutil
import pytest

from baton import AsyncClient
from baton.client.types import Options
from baton.protocol.errors import InvalidRequest
from tests.support.clusters import (
    Cluster,
    assert_no_residue,
    colocated_config,
    running_cluster,
    settled,
    tiny_config,
    until,
)
from tests.support.prompts import prompt_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CONSTRAINTS: list[Options] = [
    {"json_schema": PERSON},
    {"regex": r"[A-Z][a-z]{2,6} \d{1,3}"},
    {"choice": ["yes", "no", "per\u00adhaps \U0001f642"]},
    {"grammar": 'root ::= "(" root ")" | [0-9]\n'},
]
NUM_ABANDONED = 40
ENDLESS = "start: R\nR: ~/(.*a.{12}.*)/ & ~/(.*b.{13}.*)/ & /(.*c.{14}.*)/\n"


def check(constraint: Options, text: str) -> None:
    match constraint:
        case {"json_schema": _}:
            value = json.loads(text)
            assert set(value) == {"name", "age", "tags"}
            assert len(value["name"]) <= 8
            assert 0 <= value["age"] <= 150
            assert set(value["tags"]) <= {"a", "b"}
        case {"regex": regex}:
            assert re.fullmatch(str(regex), text)
        case {"choice": texts}:
            assert text in texts
        case {"grammar": _}:
            assert re.fullmatch(r"\(*\d\)*", text)
            assert text.count("(") == text.count(")")


async def outputs(client: AsyncClient) -> list[list[tuple[str, list[int]]]]:
    """Texts and tokens per constraint, drawn hot, so that nothing but the mask keeps them in."""

    async def draw(constraint: Options, seed: int) -> tuple[str, list[int]]:
        options: Any = {"max_tokens": 200, "temperature": 1.5, "seed": seed, **constraint}
        completion = await client.generate(prompt_of(24 + seed, seed), **options)
        choice = completion.choices[0]
        assert choice.finish_reason == "stop", choice.text
        return choice.text, [token.token_id for token in choice.tokens]

    return [
        list(await asyncio.gather(*(draw(constraint, seed) for seed in range(3))))
        for constraint in CONSTRAINTS
    ]


async def hostile_grammar(cluster: Cluster) -> None:
    """It is refused by name; a request beside it is served."""
    hostile = cluster.client.generate("x", grammar=ENDLESS, timeout=120)
    bare = cluster.client.generate("x", regex="[0-9]{3}", temperature=0.0)
    found = await asyncio.gather(hostile, bare, return_exceptions=True)
    assert isinstance(found[0], InvalidRequest)
    assert "takes longer than" in found[0].message
    assert not isinstance(found[1], BaseException)
    assert re.fullmatch("[0-9]{3}", found[1].text)


async def abandoned_grammars(cluster: Cluster) -> None:
    """Their trials, minutes of CPU time in all, end with their requests."""
    hostile = [
        asyncio.ensure_future(cluster.client.generate("x", grammar=f"{ENDLESS}// {n}\n"))
        for n in range(NUM_ABANDONED)
    ]
    worker = psutil.Process(cluster.pid_of("p-0"))
    await until(lambda: sum(map(is_at_work, trials_of(worker))) == 2, "two trials work")
    doomed = trials_of(worker)
    for task in hostile:
        task.cancel()
    ended = await asyncio.gather(*hostile, return_exceptions=True)
    assert all(isinstance(end, BaseException) for end in ended)
    served = await cluster.client.generate("x", regex="[a-z]{3}", timeout=60)
    assert re.fullmatch("[a-z]{3}", served.text)
    await until(lambda: not any(t.is_running() for t in doomed), "they end")


def is_at_work(trial: psutil.Process) -> bool:
    """More than a start and small grammars take."""
    with contextlib.suppress(psutil.Error):
        return trial.cpu_times().user > 1.0
    return False


def trials_of(worker: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in worker.children():
        # One that ends at this moment has no command line.
        with contextlib.suppress(psutil.Error):
            if "baton.engine.structured.trial" in child.cmdline():
                found.append(child)
    return found


async def test_split_equals_colocated_and_all_of_it_conforms(tmp_path: Any) -> None:
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        split = await outputs(cluster.client)
        with pytest.raises(InvalidRequest, match="regex cannot be followed"):
            await cluster.client.generate("x", regex="((")
        await hostile_grammar(cluster)
        await abandoned_grammars(cluster)
        await settled(cluster)
        await assert_no_residue(cluster)
    async with running_cluster(colocated_config(), tmp_path) as cluster:
        colocated = await outputs(cluster.client)
        await assert_no_residue(cluster)
    assert split == colocated
    for constraint, drawn in zip(CONSTRAINTS, split, strict=True):
        for text, _ in drawn:
            check(constraint, text)
    assert len({text for text, _ in split[0]}) > 1, "draws differ"

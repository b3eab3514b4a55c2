"""Masks from grammars: what is drawn conforms, wherever the matcher's state comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from baton.engine.sampler import Sampler
from baton.engine.sampling.rows import SampleRow
from baton.engine.sequence import Sequence
from baton.engine.structured.grammar import Vocabulary
from baton.engine.structured.masks import GrammarMasks
from baton.engine.structured.store import MAX_KEPT_GRAMMARS, GrammarStore
from baton.protocol.constraint import Constraint
from baton.protocol.errors import ConfigError, InternalError, InvalidRequest
from baton.protocol.sampling import SamplingParams
from tests.support.byte_tokenizer import EOS_ID, VOCAB_SIZE, text_of, write_byte_tokenizer

DIGITS = Constraint("regex", "[0-9]{4}")
AGE = Constraint(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [7, 42]}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarStore]:
    """Somebody holds the two grammars that most tests are about."""
    path = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    store = GrammarStore(Vocabulary(path, VOCAB_SIZE, (EOS_ID,)))
    held = [store.add(constraint) for constraint in (DIGITS, AGE)]
    yield store
    assert len(held) == 2


def params(constraint: Constraint | None, seed: int = 0, **changes: object) -> SamplingParams:
    made = SamplingParams(max_tokens=200, seed=seed, constraint=constraint)
    return SamplingParams(
        **{f: getattr(made, f) for f in made.__struct_fields__} | changes  # type: ignore[arg-type]
    )


def generate(
    store: GrammarStore, sampling: SamplingParams, *, forget_every: int = 0, most: int = 200
) -> list[int]:
    """Random logits, drawn from until EOS; the state may be lost on the way."""
    assert sampling.constraint is not None
    pinned = store.add(sampling.constraint)
    masks, sampler = GrammarMasks(store), Sampler((EOS_ID,))
    generator = torch.Generator().manual_seed(sampling.seed)
    output: list[int] = []
    while len(output) < most and EOS_ID not in output:
        logits = torch.randn(1, VOCAB_SIZE, generator=generator) * 3
        rows = [SampleRow("s", sampling, 3 + len(output), (1, 2, 3), output)]
        filled = masks.fill(rows)
        token = sampler.sample(logits, rows, filled)[0].token_id
        assert filled.errors == {}
        output.append(token)
        if forget_every and len(output) % forget_every == 0:
            masks.forget(["s"])
    assert store.get(sampling.constraint) is pinned
    return output


def test_a_regular_expression_is_matched_whole_and_then_ends(store: GrammarStore) -> None:
    output = generate(store, params(DIGITS))
    assert output[-1] == EOS_ID
    assert re.fullmatch("[0-9]{4}", text_of(output))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_obeyed(store: GrammarStore, temperature: float) -> None:
    for seed in range(5):
        value = json.loads(text_of(generate(store, params(AGE, seed, temperature=temperature))))
        assert set(value) == {"name", "age"}
        assert value["age"] in (7, 42)


def test_choices_may_hold_any_text(store: GrammarStore) -> None:
    texts = ['say "no"', "ä\n\t\\d", "\U0001f642", "<|end|>"]
    choice = Constraint("choice", json.dumps(texts))
    found = {text_of(generate(store, params(choice, seed))) for seed in range(12)}
    assert found <= set(texts)
    assert len(found) > 1


def test_lark_and_gbnf_grammars(store: GrammarStore) -> None:
    lark = Constraint("grammar", 'start: "(" start ")" | /[ab]/\n')
    gbnf = Constraint("grammar", 'root ::= "(" root ")" | [ab]\n')
    for grammar in (lark, gbnf):
        text = text_of(generate(store, params(grammar, 3)))
        assert re.fullmatch(r"(\(*)[ab](\)*)", text)
        assert text.count("(") == text.count(")")


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    """Of the keywords that ``conforms`` knows, and such that a text ends before long."""
    leaves = ["integer", "string", "enum"]
    kind = draw(st.sampled_from(leaves if depth == 0 else [*leaves, "array", "object", "anyOf"]))
    inner = schemas(depth - 1)
    match kind:
        case "integer":
            low = draw(st.integers(-50, 50))
            return {"type": kind, "minimum": low, "maximum": low + draw(st.integers(0, 99))}
        case "string":
            return {"type": kind, "maxLength": draw(st.integers(0, 5))}
        case "enum":
            values = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
            return {"enum": draw(st.lists(values, min_size=1, max_size=3))}
        case "array":
            least = draw(st.integers(0, 2))
            return {"type": kind, "items": draw(inner), "minItems": least, "maxItems": least + 1}
        case "anyOf":
            return {"anyOf": draw(st.lists(inner, min_size=1, max_size=2))}
    names = draw(st.lists(st.text(min_size=1, max_size=3), max_size=3, unique=True))
    return {
        "type": "object",
        "properties": {name: draw(inner) for name in names},
        "required": names[: draw(st.integers(0, len(names)))],
        "additionalProperties": False,
    }


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return any(type(value) is type(v) and value == v for v in schema["enum"])
    if "anyOf" in schema:
        return any(conforms(value, option) for option in schema["anyOf"])
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(conforms(item, schema["items"]) for item in value)
            )
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= set(value) <= set(schema["properties"])
        and all(conforms(item, schema["properties"][name]) for name, item in value.items())
    )


@settings(max_examples=60, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 2**32), forget_every=st.integers(0, 9))
def test_whatever_the_schema_what_is_drawn_conforms(
    store: GrammarStore, schema: dict[str, Any], seed: int, forget_every: int
) -> None:
    constraint = Constraint("json_schema", json.dumps(schema))
    output = generate(store, params(constraint, seed), forget_every=forget_every, most=2_000)
    assert output[-1] == EOS_ID
    assert conforms(json.loads(text_of(output)), schema)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), forget_every=st.integers(1, 5))
def test_state_is_built_again_from_the_output(
    store: GrammarStore, seed: int, forget_every: int
) -> None:
    """A hand-over, a preemption and a recovery are all this: the matcher is missing."""
    sampling = params(AGE, seed)
    assert generate(store, sampling) == generate(store, sampling, forget_every=forget_every)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_taking_back_and_running_ahead_change_nothing(
    store: GrammarStore, data: st.DataObject
) -> None:
    """A row whose output is shorter, or differs, than what the matcher has seen."""
    output = generate(store, params(AGE, 1))
    seen, fresh = GrammarMasks(store), GrammarMasks(store)
    for _ in range(6):
        cut = data.draw(st.integers(0, len(output) - 1))
        row = SampleRow("s", params(AGE), 0, (), output[:cut])
        ahead, alone = torch.zeros(1, VOCAB_SIZE), torch.zeros(1, VOCAB_SIZE)
        seen.fill([row]).apply(ahead)
        fresh.fill([row]).apply(alone)
        fresh.forget(["s"])
        assert torch.equal(ahead, alone)


def test_rows_without_a_constraint_are_left_alone(store: GrammarStore) -> None:
    rows = [
        SampleRow("free", params(None), 0, (), []),
        SampleRow("bound", params(DIGITS), 0, (), []),
        SampleRow("other", params(DIGITS), 0, (), [ord("1"), ord("2"), ord("3"), ord("4")]),
    ]
    logits = torch.zeros(3, VOCAB_SIZE)
    GrammarMasks(store).fill(rows).apply(logits)
    assert (logits[0] == 0).all()
    assert (logits[1] == 0).nonzero()[:, 0].tolist() == list(range(ord("0"), ord("9") + 1))
    assert (logits[2] == 0).nonzero()[:, 0].tolist() == [EOS_ID], "a complete text ends"


def test_limits_that_leave_no_token_cost_their_own_sequence(store: GrammarStore) -> None:
    letters = params(DIGITS, allowed_token_ids=(65, 66))
    rows = [SampleRow("stuck", letters, 0, (), []), SampleRow("fine", params(DIGITS), 0, (), [])]
    masks = GrammarMasks(store).fill(rows)
    sampled = Sampler((EOS_ID,)).sample(torch.randn(2, VOCAB_SIZE), rows, masks)
    assert list(masks.errors) == [0]
    assert masks.errors[0].code == "invalid_request"
    assert "allowed_token_ids" in masks.errors[0].message
    assert chr(sampled[1].token_id).isdigit()


def test_an_output_that_breaks_the_grammar_costs_its_own_sequence(store: GrammarStore) -> None:
    rows = [
        SampleRow("odd", params(DIGITS), 0, (), [ord("x")]),
        SampleRow("fine", params(DIGITS), 0, (), [ord("1")]),
    ]
    masks = GrammarMasks(store).fill(rows)
    assert list(masks.errors) == [0]
    sampled = Sampler((EOS_ID,)).sample(torch.randn(2, VOCAB_SIZE), rows, masks)
    assert chr(sampled[1].token_id).isdigit()


def test_each_row_behind_a_draft_has_the_mask_of_its_own_place(store: GrammarStore) -> None:
    """Behind a draft that the grammar forbids nothing is masked, and nothing fails."""
    known, drafts = [ord("1")], [ord("2"), ord("x"), ord("3")]
    rows = [
        SampleRow("s", params(DIGITS), 1 + n, (), [*known, *drafts[:n]], num_drafts=n)
        for n in range(4)
    ]
    logits = torch.zeros(4, VOCAB_SIZE)
    masks, digits = GrammarMasks(store), list(range(ord("0"), ord("9") + 1))
    filled = masks.fill(rows)
    filled.apply(logits)
    assert filled.errors == {}
    assert [(row == 0).nonzero()[:, 0].tolist() for row in logits[:2]] == [digits, digits]
    assert (logits[2:] == 0).all()
    after = torch.zeros(1, VOCAB_SIZE)
    full = [ord(c) for c in "1287"]
    masks.fill([SampleRow("s", params(DIGITS), 4, (), full)]).apply(after)
    assert (after[0] == 0).nonzero()[:, 0].tolist() == [EOS_ID]


@pytest.mark.parametrize(
    ("constraint", "word"),
    [
        (Constraint("regex", "(("), "unclosed"),
        (Constraint("json_schema", '{"not": {}}'), "not"),
        (Constraint("json_schema", "no json"), "json_schema"),
        (Constraint("grammar", "start: nobody\n"), "nobody"),
        (Constraint("choice", "[]"), "strings"),
        (Constraint("choice", "[1]"), "strings"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    store: GrammarStore, constraint: Constraint, word: str
) -> None:
    with pytest.raises(InvalidRequest, match=word) as caught:
        store.add(constraint)
    assert caught.value.param == constraint.kind


def crowd_out(store: GrammarStore) -> None:
    """As many others as the store keeps."""
    for number in range(MAX_KEPT_GRAMMARS):
        store.add(Constraint("regex", f"[a-z]{{{number + 1}}}"))
    assert store.num_kept == MAX_KEPT_GRAMMARS


def test_the_store_forgets_the_oldest_that_nobody_holds(store: GrammarStore) -> None:
    held, free = Constraint("regex", "h"), Constraint("regex", "f")
    pinned = store.add(held)
    store.add(free)
    crowd_out(store)
    assert store.get(free) is None
    with pytest.raises(InternalError, match="does not hold the regex"):
        store.matcher(free)
    assert store.get(held) is pinned
    crowd_out(store)
    del pinned
    assert store.get(held) is None


def test_a_step_finds_what_its_sequence_holds_and_never_compiles(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its matcher is lost and its grammar was crowded out since it began."""
    sequence = Sequence("s", (1,), [], params(Constraint("regex", "held[0-9]")))
    assert sequence.sampling.constraint is not None
    sequence.grammar = store.add(sequence.sampling.constraint)
    crowd_out(store)

    def compile_it(*_: object) -> None:
        raise AssertionError("compiled within a step")

    monkeypatch.setattr("baton.engine.structured.store.compile_constraint", compile_it)
    masks, logits = GrammarMasks(store), torch.zeros(1, VOCAB_SIZE)
    row = SampleRow("s", sequence.sampling, 1, (1,), [])
    filled = masks.fill([row])
    filled.apply(logits)
    assert filled.errors == {}
    assert (logits[0] == 0).nonzero()[:, 0].tolist() == [ord("h")]
    masks.forget(["s"])
    assert masks.fill([row]).errors == {}
    sequence.grammar = None
    masks.forget(["s"])
    assert masks.fill([row]).errors[0].code == "internal", "nobody holds it any more"


def test_a_spent_grammar_is_for_no_new_sequence(store: GrammarStore) -> None:
    spent = store.add(DIGITS)
    store.forget(DIGITS)
    assert store.get(DIGITS) is None
    store.matcher(DIGITS).compute_bitmask()
    failed = spent.start
    assert store.add(DIGITS) is spent, "those that hold it find it"
    assert spent.start is not failed
    assert store.get(DIGITS) is spent


def test_a_folder_without_a_usable_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    store = GrammarStore(Vocabulary(tmp_path / "tokenizer.json", 61, (1,)))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        store.add(DIGITS)
    with pytest.raises(ConfigError, match="eos_token_id"):
        GrammarStore(Vocabulary(tmp_path / "tokenizer.json", 61, ())).add(DIGITS)

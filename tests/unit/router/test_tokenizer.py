from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from baton.protocol.errors import ConfigError
from router.detokenizer import Detokenizer, StopHit
from router.tokenizer import Tokenizer
from tests.support.tiny_text import tiny_tokenizer

BATON_TINY = Path(__file__).parents[3] / "deploy/models/baton-tiny"
TEXT = "def f(x):\n    return x + 1  # ü 😀\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled tokenizer's files, to break."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BATON_TINY / name, tmp_path)
    return tmp_path


def change_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_ids_are_those_of_transformers_behind_the_begin_token():
    """baton-tiny was trained with <|begin|> before each file; see router.tokenizer."""
    ids = Tokenizer.load(BATON_TINY).encode(TEXT)
    assert ids == [0, *AutoTokenizer.from_pretrained(BATON_TINY)(TEXT).input_ids]


def test_the_begin_token_follows_the_config(folder):
    change_config(folder, add_bos_token=False)
    without = Tokenizer.load(folder).encode("x")
    change_config(folder, add_bos_token=True, bos_token={"content": "<|begin|>"})
    assert Tokenizer.load(folder).encode("x") == [0, *without]
    assert Tokenizer.load(folder).encode("x", add_special_tokens=False) == without


def test_a_begin_token_of_the_post_processor_is_not_doubled(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(folder).encode("x").count(0) == 1


def test_truncation_written_into_the_file_is_ignored(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert len(Tokenizer.load(folder).encode(TEXT)) > 4


def test_decode():
    tokenizer = Tokenizer.load(BATON_TINY)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<|begin|>{TEXT}"
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.vocab_size == 2048
    assert tokenizer.token_text(0) == "<|begin|>"
    assert (
        "".join(map(tokenizer.token_text, tokenizer.encode("a bc", add_special_tokens=False)))
        == "a bc"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        (
            "tokenizer_config.json",
            '{"add_bos_token": true, "bos_token": "<nope>"}',
            "bos_token '<nope>' is not in tokenizer.json",
        ),
    ],
)
def test_broken_folders(folder, name, content, words):
    path = folder / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        Tokenizer.load(folder)


def test_a_stop_hit_names_its_token_and_drops_the_overshoot():
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, ["cd", "zz"])
    ids = tokenizer.encode("abcdef")
    first = detokenizer.push(ids[:3])
    assert (first.texts, first.text, first.stop) == (("a", "b", "c"), "ab", None)
    second = detokenizer.push(ids[3:])
    assert (second.texts, second.text, second.stop) == (("d",), "", StopHit(0, "cd"))


def test_flush_gives_what_was_held_back():
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, ["cd"])
    assert detokenizer.push(tokenizer.encode("abc")).text == "ab"
    assert detokenizer.flush() == "c"


def test_a_character_in_parts_appears_with_its_last_part():
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("😀")
    assert [detokenizer.push([i]).text for i in ids] == ["", "", "", "😀"]
    half = Detokenizer(tokenizer)
    assert half.push(ids[:2]).text == ""
    assert half.flush() == "\ufffd"

"""Streamed text equals the text decoded at once, and stop strings equal the naive search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from router.detokenizer import Detokenizer
from router.stop_strings import StopScanner
from router.tokenizer import Tokenizer
from tests.support.tiny_text import tiny_tokenizer

BYTE_LEVEL = Tokenizer.load(Path(__file__).parents[2] / "deploy/models/baton-tiny")


def _byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama 2's: words with a leading mark, single bytes for what it does not know."""
    words = ["<s>", "▁", "▁a", "▁bc", "d", "e", "é"]
    pieces = words + [f"<0x{byte:02X}>" for byte in range(256)]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    inner.add_special_tokens(["<s>"])
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(inner)


BYTE_FALLBACK = _byte_fallback_tokenizer()

chunk_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
any_ids = st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=60)
single_bytes = st.lists(st.integers(3, 258), max_size=60)
some_text = st.text(alphabet=st.sampled_from("a bcdé€😀👩‍🚀\n\ufffd"), max_size=30)


def _chunks(ids: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    chunks = []
    while ids:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(ids[:size])
        ids = ids[size:]
    return chunks


def _streamed(tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int], *, skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, (), skip)
    parts = []
    for chunk in _chunks(ids, sizes):
        pushed = detokenizer.push(chunk)
        assert len(pushed.texts) == len(chunk)
        assert pushed.text == "".join(pushed.texts)
        parts.append(pushed.text)
    return "".join(parts) + detokenizer.flush()


@given(ids=any_ids | single_bytes, sizes=chunk_sizes, skip=st.booleans())
@settings(max_examples=300)
def test_any_ids_stream_to_what_they_decode_to(
    ids: list[int], sizes: list[int], skip: bool
) -> None:
    assert _streamed(BYTE_LEVEL, ids, sizes, skip=skip) == BYTE_LEVEL.decode(ids, skip)


@given(text=some_text, sizes=chunk_sizes)
def test_byte_fallback_text_streams_to_what_it_decodes_to(text: str, sizes: list[int]) -> None:
    ids = BYTE_FALLBACK.encode(text)
    assert _streamed(BYTE_FALLBACK, ids, sizes, skip=True) == BYTE_FALLBACK.decode(ids) == text


@given(ids=st.lists(st.integers(0, BYTE_FALLBACK.vocab_size - 1), max_size=60))
def test_byte_fallback_survives_any_ids(ids: list[int]) -> None:
    _streamed(BYTE_FALLBACK, ids, [1], skip=True)


def _naive(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The find that ends first, of those the longest."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, found = min(ends)
    return text[: end - len(found)], found


short = st.text(alphabet="ab", max_size=24)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


@given(text=short, stop=stops, sizes=chunk_sizes)
@settings(max_examples=500)
def test_scanner_finds_what_a_search_of_the_whole_text_finds(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    scanner = StopScanner(stop)
    shown, found = "", None
    for chunk in _chunks(text, sizes):
        scanned = scanner.push(chunk)
        shown, found = shown + scanned.text, scanned.stop
        if found is not None:
            break
    else:
        shown += scanner.flush()
    assert (shown, found) == _naive(text, stop)


@given(text=short, stop=stops, sizes=chunk_sizes, min_tokens=st.integers(0, 30))
def test_min_tokens_bring_no_stop_string(
    text: str, stop: list[str], sizes: list[int], min_tokens: int
) -> None:
    """One token per character: what the first ones say is text, the rest is searched."""
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop, min_tokens=min_tokens)
    shown, found = "", None
    for chunk in _chunks(tokenizer.encode(text), sizes):
        pushed = detokenizer.push(chunk)
        shown += pushed.text
        if pushed.stop is not None:
            found = pushed.stop.stop
            break
    else:
        shown += detokenizer.flush()
    rest, expected = _naive(text[min_tokens:], stop)
    assert (shown, found) == (text[:min_tokens] + rest, expected)


@given(text=short, stop=stops)
def test_scanner_holds_back_no_more_than_a_beginning_of_a_stop_string(
    text: str, stop: list[str]
) -> None:
    scanner = StopScanner(stop)
    shown = ""
    for end, char in enumerate(text, 1):
        scanned = scanner.push(char)
        if scanned.stop is not None:
            return
        shown += scanned.text
        held = text[len(shown) : end]
        assert held == "" or any(s.startswith(held) for s in stop)


@given(
    words=st.lists(st.sampled_from(["def", " x", "é", "😀", "\n", "ab"]), max_size=12),
    stop=st.lists(st.sampled_from(["ab", "f x", "\n\n", "😀é", "d"]), max_size=3),
    sizes=chunk_sizes,
)
def test_stop_strings_are_found_across_tokens(
    words: list[str], stop: list[str], sizes: list[int]
) -> None:
    text = "".join(words)
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL, stop)
    shown, found, num_tokens = "", None, 0
    for chunk in _chunks(ids, sizes):
        pushed = detokenizer.push(chunk)
        shown += pushed.text
        if pushed.stop is not None:
            found = pushed.stop.stop
            num_tokens += pushed.stop.token_index + 1
            assert len(pushed.texts) == pushed.stop.token_index + 1
            break
        num_tokens += len(chunk)
    else:
        shown += detokenizer.flush()
    assert (shown, found) == _naive(text, stop)
    if found is not None:
        assert found in BYTE_LEVEL.decode(ids[:num_tokens])
        assert found not in BYTE_LEVEL.decode(ids[: num_tokens - 1])


@given(prompt=some_text, text=some_text, sizes=chunk_sizes)
def test_a_text_goes_on_where_its_prompt_ended(prompt: str, text: str, sizes: list[int]) -> None:
    """With the prompt's end as context the first word keeps its space."""
    prompt_ids, ids = BYTE_FALLBACK.encode(prompt), BYTE_FALLBACK.encode(text)
    detokenizer = Detokenizer(BYTE_FALLBACK, context_ids=prompt_ids)
    shown = "".join(detokenizer.push(chunk).text for chunk in _chunks(ids, sizes))
    whole = BYTE_FALLBACK.decode([*prompt_ids, *ids])
    if "\ufffd" not in prompt:
        assert prompt + shown + detokenizer.flush() == whole

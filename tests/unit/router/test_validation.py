"""What a valid request becomes. Refusals are tested over HTTP, in test_bad_input_http."""

from __future__ import annotations

import math
import threading

import pytest

from baton.protocol.config import RouterConfig
from baton.protocol.errors import InvalidRequest, PromptTooLong, UnknownModel
from baton.protocol.sampling import MAX_SEED, SamplingParams
from router import limits
from router.chat_template import ChatMessage, ChatTemplate
from router.raw_request import RawRequest
from router.sampling_fields import check_against_prompt
from router.validation import Validator
from tests.support.scripted_frontend import MODEL
from tests.support.tiny_text import tiny_template, tiny_tokenizer


@pytest.fixture
def validator():
    return Validator(MODEL, tiny_tokenizer(), tiny_template(), RouterConfig())


def test_defaults(validator):
    spec = validator.generate_spec(RawRequest(prompt="abc"))
    assert len(spec.prompt_ids) == 3
    assert (spec.n, spec.stop, spec.priority, spec.skip_special_tokens) == (1, (), 0, True)
    assert spec.cache_salt == ""
    assert spec.timeout_s == RouterConfig().default_timeout_s
    sampling = spec.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
    assert (sampling.top_k, sampling.num_logprobs, sampling.ignore_eos) == (0, -1, False)
    assert 0 <= sampling.seed <= MAX_SEED
    assert spec.request_id.startswith("req-")


def test_what_was_said_is_kept(validator):
    raw = RawRequest(
        model=MODEL.name,
        request_id="mine",
        prompt_ids=[1, 511],
        max_tokens=254,
        temperature=0,
        top_p=0.25,
        top_k=-1,
        seed=MAX_SEED - 2,
        n=3,
        stop=["a"],
        stop_token_ids=[7],
        logprobs=0,
        ignore_eos=True,
        priority=-5,
        timeout_s=1.5,
        skip_special_tokens=False,
        cache_salt="s" * limits.MAX_CACHE_SALT_CHARS,
        kv_quality="medium",
    )
    spec = validator.generate_spec(raw)
    assert (spec.request_id, spec.prompt_ids, spec.n) == ("mine", (1, 511), 3)
    assert (spec.stop, spec.priority, spec.timeout_s) == (("a",), -5, 1.5)
    assert (spec.skip_special_tokens, spec.cache_salt) == (False, "s" * 256)
    assert spec.kv_quality == "medium"
    sampling = spec.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (254, 0.0, 0.25)
    assert (sampling.top_k, sampling.seed, sampling.num_logprobs) == (0, MAX_SEED - 2, 0)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (7,))


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(250, 6), (255, 1), (3, 16)])
def test_absent_max_tokens_are_cut_to_what_fits(validator, num_prompt, max_tokens):
    spec = validator.generate_spec(RawRequest(prompt_ids=[1] * num_prompt))
    assert spec.sampling.max_tokens == max_tokens


@pytest.mark.parametrize(
    "raw",
    [
        RawRequest(),
        RawRequest(prompt="a", prompt_ids=[1]),
        RawRequest(prompt_ids=[1], messages=[ChatMessage("user", "x")]),
    ],
)
def test_exactly_one_form_of_prompt(validator, raw):
    with pytest.raises(InvalidRequest, match="exactly one of prompt, prompt_ids, messages"):
        validator.generate_spec(raw)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (RawRequest(prompt="a", temperature=math.nan), "temperature"),
        (RawRequest(prompt="a", temperature=math.inf), "temperature"),
        (RawRequest(prompt="a", top_p=math.nan), "top_p"),
        (RawRequest(prompt="a", timeout_s=math.nan), "timeout_s"),
        (RawRequest(prompt="a", max_tokens=True), "max_tokens"),
        (RawRequest(prompt="a", temperature=True), "temperature"),
        (RawRequest(prompt="a", seed=1.0), "seed"),
        (RawRequest(prompt="a", ignore_eos=1), "ignore_eos"),
        (RawRequest(prompt_ids=[True]), "prompt"),
        (RawRequest(prompt="\ud800"), "prompt"),
        (RawRequest(prompt="a", stop=["\udc00"]), "stop"),
        (RawRequest(messages=[ChatMessage("user", "\ud800")]), "messages[0].content"),
        (RawRequest(prompt="a", request_id="new\nline"), "request_id"),
        (RawRequest(prompt="a", request_id=""), "request_id"),
        (RawRequest(prompt="a", cache_salt="\ud800"), "cache_salt"),
        (RawRequest(prompt="a", cache_salt=b"x"), "cache_salt"),
        (RawRequest(prompt="a", kv_quality=["low"]), "kv_quality"),
    ],
)
def test_values_that_json_cannot_carry_are_refused_as_well(validator, raw, param):
    """The gRPC interface carries NaN and half characters, and so may other callers."""
    with pytest.raises(InvalidRequest) as caught:
        validator.generate_spec(raw)
    assert caught.value.param == param


def test_who_names_no_floor_gets_the_clusters():
    model, tokenizer, template = MODEL, tiny_tokenizer(), tiny_template()
    validator = Validator(model, tokenizer, template, RouterConfig(), "high")
    assert validator.generate_spec(RawRequest(prompt="a")).kv_quality == "high"
    assert validator.generate_spec(RawRequest(prompt="a", kv_quality="exact")).kv_quality == "exact"


def test_a_refused_salt_is_not_repeated(validator):
    with pytest.raises(InvalidRequest, match="cache_salt has 300 characters; allowed: 1 to 256"):
        validator.generate_spec(RawRequest(prompt="a", cache_salt="secret" * 50))


def test_errors_show_values_shortened(validator):
    with pytest.raises(UnknownModel) as caught:
        validator.generate_spec(RawRequest(model="m" * 100_000, prompt="a"))
    assert len(caught.value.message) < 300


class CountingTokenizer:
    def __init__(self):
        self.inner = tiny_tokenizer()
        self.threads = []
        self.max_token_chars = self.inner.max_token_chars

    def encode(self, text, *, add_special_tokens=True):
        self.threads.append(threading.current_thread())
        return self.inner.encode(text, add_special_tokens=add_special_tokens)


def test_a_prompt_that_cannot_fit_is_never_tokenised():
    tokenizer = CountingTokenizer()
    validator = Validator(
        MODEL, tokenizer, ChatTemplate("{{ messages[0].content }}"), RouterConfig()
    )
    too_long = "x" * (MODEL.max_model_len * tokenizer.max_token_chars + 1)
    for raw in (RawRequest(prompt=too_long), RawRequest(messages=[ChatMessage("user", too_long)])):
        with pytest.raises(PromptTooLong, match=f"{len(too_long)} characters"):
            validator.generate_spec(raw)
    assert tokenizer.threads == []


def test_bad_fields_are_found_before_tokenising():
    tokenizer = CountingTokenizer()
    validator = Validator(MODEL, tokenizer, tiny_template(), RouterConfig())
    for raw in (RawRequest(prompt="a", n=0), RawRequest(prompt="a", top_p=0)):
        with pytest.raises(InvalidRequest):
            validator.generate_spec(raw)
    assert tokenizer.threads == []


async def test_long_texts_leave_the_event_loop(monkeypatch):
    monkeypatch.setattr(limits, "INLINE_TOKENISE_CHARS", 100)
    tokenizer = CountingTokenizer()
    validator = Validator(MODEL, tokenizer, tiny_template(), RouterConfig())
    await validator.generate_spec_off_loop(RawRequest(prompt="x" * 100))
    await validator.generate_spec_off_loop(RawRequest(prompt="x" * 101))
    inline, off_loop = tokenizer.threads
    assert inline is threading.current_thread()
    assert off_loop is not inline
    with pytest.raises(PromptTooLong):
        await validator.generate_spec_off_loop(RawRequest(prompt="x" * 256))


@pytest.mark.parametrize(("alternatives", "most"), [(0, 32_769), (20, 1_561)])
def test_prompt_logprobs_are_capped_together(alternatives, most):
    params = SamplingParams(num_prompt_logprobs=alternatives)
    check_against_prompt(params, most)
    with pytest.raises(InvalidRequest, match="allowed: at most 32768"):
        check_against_prompt(params, most + 1)


def test_bad_words_are_banned_at_the_start_and_behind_a_space(validator):
    spec = validator.generate_spec(RawRequest(prompt="x", bad_words=["A", " A", "BC"]))
    letter, space = (tiny_tokenizer().encode(c)[0] for c in ("A", " "))
    assert spec.sampling.bad_token_ids == (letter,)
    assert spec.sampling.bad_token_sequences[0] == (space, letter)
    assert [len(s) for s in spec.sampling.bad_token_sequences] == [2, 2, 3]

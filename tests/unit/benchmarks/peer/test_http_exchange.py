"""A streamed answer is timed event by event, and an incomplete one is an error."""

import msgspec
import pytest

from benchmarks.peer.http_exchange import read_answer, request_bytes

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(text: str, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return b"data: " + msgspec.json.encode({"choices": [choice]}) + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"


def test_tokens_have_the_time_at_which_their_event_was_complete() -> None:
    first, second = event("t1"), event(" t2 t3", "length")
    whole = chunk(first) + chunk(second)
    cut = len(chunk(first)) + 9
    news = [
        (10.0, HEAD),
        (11.0, whole[:cut]),
        (12.0, whole[cut:] + chunk(USAGE + DONE) + LAST),
    ]
    answer = read_answer(news, sent_at=9.5, zero=9.0, num_tokens=3)
    assert answer.error == ""
    assert answer.text == "t1 t2 t3"
    assert answer.sent_s == 0.5
    assert answer.token_times_s == (2.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("parts", "num_tokens", "said"),
    [
        ([event("t1 t2 t3", "length"), USAGE], 3, "broke off after 3 tokens"),
        ([event("t1 t2 t3"), USAGE, DONE], 3, "broke off after 3 tokens"),
        ([event("t1 t2", "length"), USAGE, DONE], 3, "2 tokens came and 3 were told"),
        ([event("t1 t2 t3", "length"), USAGE, DONE], 4, "4 were asked"),
        ([b'data: {"error":{"message":"no room"}}\n\n'], 3, "no room"),
        ([b"data: {\n\n"], 3, "truncated"),
    ],
)
def test_what_is_not_whole_is_an_error(parts: list[bytes], num_tokens: int, said: str) -> None:
    news = [(1.0, HEAD + b"".join(map(chunk, parts)) + LAST)]
    assert said in read_answer(news, 0.0, 0.0, num_tokens).error


def test_a_refusal_is_an_error_with_its_text() -> None:
    news = [(1.0, b"HTTP/1.1 429 Too Many\r\ncontent-length: 4\r\n\r\nbusy")]
    assert read_answer(news, 0.0, 0.0, 3).error == "HTTP 429: busy"


def test_a_request_is_one_post_with_its_length() -> None:
    head, _, sent = request_bytes("127.0.0.1", 80, b"{}").partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"content-length: 2" in head.lower()
    assert sent == b"{}"

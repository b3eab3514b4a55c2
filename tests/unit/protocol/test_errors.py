from __future__ import annotations

import pytest

from baton.protocol import errors
from baton.protocol.errors import ERRORS_BY_CODE, BatonError, InternalError, from_code


def every_error() -> list[type[BatonError]]:
    found = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, BatonError) and cls is not BatonError
    ]
    assert len(found) == 17
    return found


@pytest.mark.parametrize("cls", every_error())
def test_an_error_survives_the_wire_as_its_own_class(cls: type[BatonError]) -> None:
    sent = cls("no", hop="prefill", param="n", request_id="r1")
    got = from_code(
        sent.code,
        sent.message,
        hop=sent.hop,
        retryable=sent.retryable,
        param=sent.param,
        request_id=sent.request_id,
    )
    assert type(got) is cls
    assert vars(got) == vars(sent)
    assert str(got) == "no [hop: prefill]"


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in every_error()]
    assert len(set(codes)) == len(codes)
    assert set(ERRORS_BY_CODE) == set(codes)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    for cls in every_error():
        assert f"-- {cls.__name__}" in drawn


def test_retryable_follows_the_class_and_can_be_told() -> None:
    assert errors.Overloaded("x").retryable
    assert not errors.Overloaded("x", retryable=False).retryable
    assert not InternalError("x").retryable
    assert InternalError("x", retryable=True).retryable
    assert not errors.IncompatiblePeer("x").retryable
    assert errors.TransferFailed("x").retryable


def test_an_unknown_code_is_a_plain_error_and_a_long_message_is_cut() -> None:
    got = from_code("from_the_future", "x" * 5_000)
    assert type(got) is BatonError
    assert len(got.message) == errors.MAX_MESSAGE_CHARS
    assert str(BatonError("no hop")) == "no hop"

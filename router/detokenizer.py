"""Token ids of one choice to text, as they arrive, with stop strings cut out.

The texts together, with ``flush``, equal the tokeniser's own decoding of all ids at once.
A token may hold a part of a UTF-8 character only: its text is then empty and a later
token brings the character.

The tokeniser decodes a window: the tokens of the last text that was given out (decoders
may treat the first token of a sequence differently, so some context has to stand before
the new one) and those since then. An end of U+FFFD means that bytes may be missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.stop_strings import StopScanner
from router.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_UNSETTLED_TOKENS = 8
"""A character has at most 4 bytes: among so many tokens some U+FFFD is there to stay."""
_MAX_WINDOW_TOKENS = 64
"""Whatever they are, they are given out then: decoding must not grow without end."""


@dataclass(frozen=True, slots=True)
class StopHit:
    """``token_index``: of the token, in the ids just pushed, that completed the string."""

    token_index: int
    stop: str


@dataclass(frozen=True, slots=True)
class Pushed:
    """texts: what each pushed token adds, up to and with the one that hit a stop string.

    text: what may be shown now; ends before the stop string where one was hit.
    """

    texts: tuple[str, ...]
    text: str
    stop: StopHit | None = None


class Detokenizer:
    """State of one choice. Nothing may be pushed after a stop hit or ``flush``."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        context_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """``context_ids``: the last few prompt ids, where the text continues a prompt.

        min_tokens: what so many tokens bring holds no stop string, and no beginning of one.
        Decoders of the SentencePiece kind drop the space before the first word of a
        sequence; with the prompt's end before it the space stays.
        """
        self._text = _IncrementalText(tokenizer, skip_special_tokens, context_ids)
        self._scanner = StopScanner(stop)
        self._num_unscanned = min_tokens

    def push(self, token_ids: Sequence[int]) -> Pushed:
        texts: list[str] = []
        shown: list[str] = []
        for index, token_id in enumerate(token_ids):
            text = self._text.push(token_id)
            texts.append(text)
            if self._num_unscanned > 0:
                self._num_unscanned -= 1
                shown.append(text)
                continue
            scanned = self._scanner.push(text)
            shown.append(scanned.text)
            if scanned.stop is not None:
                return Pushed(tuple(texts), "".join(shown), StopHit(index, scanned.stop))
        return Pushed(tuple(texts), "".join(shown))

    def flush(self) -> str:
        """The text held back, when the choice has finished without a stop string.

        An incomplete character comes out as U+FFFD; should that complete a stop string,
        the text is cut before it.
        """
        scanned = self._scanner.push(self._text.flush())
        return scanned.text if scanned.stop is not None else scanned.text + self._scanner.flush()


class _IncrementalText:
    """``_window`` ids decode to ``_given`` (given out before) and what is still unsettled."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, context_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = [i for i in context_ids if not self._is_skipped(i)]
        self._given = self._decode(self._window)
        if _REPLACEMENT in self._given:
            self._window, self._given = [], ""
        self._num_unsettled = 0

    def push(self, token_id: int) -> str:
        if self._is_skipped(token_id):
            return ""
        self._window.append(token_id)
        self._num_unsettled += 1
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            if self._num_unsettled < _MAX_UNSETTLED_TOKENS:
                return ""
            return self._settle_a_part(text)
        if text == self._given and self._num_unsettled < _MAX_UNSETTLED_TOKENS:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """U+FFFD for the bytes that no character could be made of."""
        return self._settle(self._decode(self._window)) if self._num_unsettled else ""

    def _settle(self, text: str) -> str:
        """Give all out; the tokens that brought it become the context of the next."""
        new_ids = self._window[-self._num_unsettled :]
        given_ids = self._decode(new_ids)
        # Byte-fallback decoders may take back characters when an invalid byte follows
        # them. What was given out stays; the new tokens then speak for themselves.
        new = text[len(self._given) :] if text.startswith(self._given) else given_ids
        self._window, self._given, self._num_unsettled = new_ids, given_ids, 0
        return new

    def _settle_a_part(self, text: str) -> str:
        """Bytes that are no UTF-8: give out all up to a border between two characters.

        Cut where the halves decode to the whole: no character spans such a border. Runs
        of byte-fallback tokens stay together: one bad byte spoils the others.
        """
        is_byte = self._tokenizer.is_byte
        num_context = len(self._window) - self._num_unsettled
        for border in range(len(self._window) - 1, num_context, -1):
            head, tail = self._window[:border], self._window[border:]
            if is_byte(head[-1]) and is_byte(tail[0]):
                continue
            settled = self._decode(head)
            if settled + self._decode(tail) == text and settled.startswith(self._given):
                new = settled[len(self._given) :]
                self._window, self._given, self._num_unsettled = tail, "", len(tail)
                return new
        return "" if self._num_unsettled < _MAX_WINDOW_TOKENS else self._settle(text)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens) if ids else ""

    def _is_skipped(self, token_id: int) -> bool:
        return self._skip_special_tokens and self._tokenizer.is_special(token_id)

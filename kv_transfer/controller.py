"""Which codec the next frame goes through: the one by which the rest of the hand-over, sent
like it, would be over soonest. Pure.

Encoding here, the link and decoding there overlap, so a hand-over takes as long as its slowest
stage, and the first and last frame's way through the others. Leaving the rest to be computed
from tokens at the other end is one more choice, taken once nothing is left to wait for here.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kv_transfer.codecs.contract import Quality
from kv_transfer.estimates import (
    CodecCost,
    CodecEstimates,
    ComputeEstimate,
    DecodeEstimates,
)
from kv_transfer.link_estimate import Delivery, LinkEstimate

RECOMPUTE = "recompute"
"""A choice, not a codec: what is not sent yet is computed at the other end."""
SAME_PART, SAME_S = 0.01, 2e-4
"""Predictions as near as this are equal: the better quality wins."""
KEEP_PART = 0.03
"""Of the best prediction: what the codec of the last frame may be worse by and stay."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What one hand-over still has to send, the frame to choose for included.

    computed_in_s: until the last of it is there to be sent. num_kept: leading tokens that the
    other end has if nothing more were sent.
    """

    num_bytes: int
    frame_bytes: int
    num_tokens: int
    num_kept: int = 0
    may_recompute: bool = False
    computed_in_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Queue:
    """What is on the way already: seconds until the link, and until the decoder, has done it."""

    link_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """finish_s: predicted for the rest; ``others``: what else was possible."""

    codec: str
    finish_s: float
    others: Mapping[str, float]


@dataclass(slots=True)
class _Sent:
    transfer_id: str
    epoch: int
    codec: str
    num_bytes: int
    num_coded: int
    sent_at: float


@dataclass(slots=True)
class _Progress:
    epoch: int
    num_frames: int = 0
    decode_s: float = 0.0


@dataclass(slots=True)
class Forecasts:
    """What was predicted when hand-overs began to be sent, and what came."""

    count: int = 0
    predicted_s: float = 0.0
    actual_s: float = 0.0
    error_s: float = 0.0
    """Sum of absolute differences."""


def finish_s(
    rest: Rest, cost: CodecCost, bytes_per_s: float, latency_s: float, queue: Queue
) -> float:
    """From now until all is written there, if all of the rest goes through one codec."""
    frame_bytes = rest.frame_bytes
    frames = rest.num_bytes / frame_bytes
    last = frames - math.ceil(frames) + 1.0
    encode = frame_bytes * cost.encode_s
    link = frame_bytes * cost.ratio / bytes_per_s
    decode = frame_bytes * cost.decode_s
    began = queue.link_s if queue.link_s > encode else encode
    linked = max(began + frames * link, frames * encode + last * link)
    decoded = max(
        linked + last * decode,
        began + link + frames * decode,
        queue.decode_s + frames * decode,
        rest.computed_in_s + last * (encode + link + decode),
    )
    return decoded + latency_s / 2


class CodecController:
    """Of one link. codecs: estimates of this worker, shared by its links; compute: of computing
    KV again at this link's other end."""

    def __init__(
        self,
        qualities: Mapping[str, Quality],
        codecs: CodecEstimates | None = None,
        compute: ComputeEstimate | None = None,
    ) -> None:
        self._qualities = qualities
        self.codecs = codecs or CodecEstimates()
        self.compute = compute or ComputeEstimate()
        self.link = LinkEstimate()
        self.decode = DecodeEstimates()
        self.forecasts = Forecasts()
        self.num_chosen: Counter[str] = Counter()
        self._sent: deque[_Sent] = deque()
        self._progress: dict[str, _Progress] = {}
        self._forecast: dict[str, tuple[float, float]] = {}
        self._last = ""

    def choose(self, transfer_id: str, codecs: Sequence[str], rest: Rest, now: float) -> Choice:
        """codecs: that the request's floor and both ends allow; at least one."""
        choice = self._best(codecs, rest, now)
        self._last = choice.codec
        self.num_chosen[choice.codec] += 1
        self._forecast.setdefault(transfer_id, (now, choice.finish_s))
        return choice

    def _best(self, codecs: Sequence[str], rest: Rest, now: float) -> Choice:
        predicted = self.predict(codecs, rest, now)
        best = min(predicted.values())
        limit = best * (1.0 + SAME_PART) + SAME_S
        chosen = max((c for c, seconds in predicted.items() if seconds <= limit), key=self._rank)
        last = self._last
        if (
            last in predicted
            and predicted[last] <= best * (1.0 + KEEP_PART)
            and self._rank(last) >= self._rank(chosen)
        ):
            chosen = last
        return Choice(chosen, predicted[chosen], predicted)

    def _rank(self, codec: str) -> int:
        """``max`` takes the first of equals. Recomputing takes time of others' steps: last."""
        return -1 if codec == RECOMPUTE else self._qualities.get(codec, Quality.LOW)

    def predict(self, codecs: Sequence[str], rest: Rest, now: float) -> dict[str, float]:
        """Seconds from now, by choice."""
        bytes_per_s = self.bytes_per_s(now)
        queue = self._queue(bytes_per_s, now)
        latency_s = self.link.latency_s
        predicted = {
            codec: finish_s(
                rest, self.codecs.cost(codec, self.decode), bytes_per_s, latency_s, queue
            )
            for codec in codecs
        }
        if rest.may_recompute:
            drained = queue.decode_s + latency_s / 2
            compute_s = self.compute.seconds(rest.num_kept, rest.num_tokens)
            predicted[RECOMPUTE] = max(drained, rest.computed_in_s) + compute_s
        return predicted

    def bytes_per_s(self, now: float) -> float:
        return self.link.bytes_per_s(now, self._oldest())

    # --- what happened ------------------------------------------------------------------

    def sent(
        self,
        transfer_id: str,
        epoch: int,
        codec: str,
        num_bytes: int,
        num_coded: int,
        encode_s: float,
        now: float,
    ) -> None:
        """A frame went to the link. encode_s: from wanting it to having it."""
        self.codecs.encoded(codec, num_bytes, num_coded, encode_s)
        self._sent.append(_Sent(transfer_id, epoch, codec, num_bytes, num_coded, now))

    def progressed(
        self, transfer_id: str, epoch: int, num_frames: int, decode_s: float, now: float
    ) -> None:
        """The peer has written so many frames of that epoch, in all; repeated ones are idle."""
        known = self._progress.get(transfer_id)
        if known is None or known.epoch != epoch:
            known = self._progress[transfer_id] = _Progress(epoch)
        news = num_frames - known.num_frames
        seconds = max(0.0, decode_s - known.decode_s)
        if news <= 0:
            return
        known.num_frames, known.decode_s = num_frames, max(decode_s, known.decode_s)
        mine = [s for s in self._sent if s.transfer_id == transfer_id and s.epoch == epoch][:news]
        if not mine:
            return
        for frame in mine:
            self._sent.remove(frame)
        bytes_by_codec: Counter[str] = Counter()
        for frame in mine:
            bytes_by_codec[frame.codec] += frame.num_bytes
        self.decode.decoded(bytes_by_codec, seconds, self.codecs)
        num_coded = sum(s.num_coded for s in mine)
        self.link.delivered(Delivery(num_coded, mine[0].sent_at, seconds), now)

    def closed(self, transfer_id: str, now: float, *, is_committed: bool = False) -> None:
        """Acknowledged as a whole, void or given up."""
        self._sent = deque(s for s in self._sent if s.transfer_id != transfer_id)
        self._progress.pop(transfer_id, None)
        began, predicted = self._forecast.pop(transfer_id, (0.0, 0.0))
        if is_committed and predicted:
            actual = now - began
            self.forecasts.count += 1
            self.forecasts.predicted_s += predicted
            self.forecasts.actual_s += actual
            self.forecasts.error_s += abs(actual - predicted)

    def _queue(self, bytes_per_s: float, now: float) -> Queue:
        linked_at, decoded_at = self.link.last_done_at
        for frame in self._sent:
            linked_at = max(linked_at, frame.sent_at) + frame.num_coded / bytes_per_s
            decoded_at = max(linked_at, decoded_at) + self._decode_s(frame)
        return Queue(max(0.0, linked_at - now), max(0.0, decoded_at - now))

    def _oldest(self) -> Delivery | None:
        if not self._sent:
            return None
        first = self._sent[0]
        return Delivery(first.num_coded, first.sent_at, self._decode_s(first))

    def _decode_s(self, frame: _Sent) -> float:
        prior = self.codecs.prior(frame.codec).decode_s
        return frame.num_bytes * self.decode.seconds(frame.codec, prior)

"""A hand-over on a virtual clock: the pusher's loop, a link of any rate over time, a decoder.

The window, the controller and its estimates are the product's own. What frames cost is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from baton.protocol.messages import KvProgress
from kv_transfer.controller import RECOMPUTE, CodecController, Rest
from kv_transfer.estimates import CodecCost
from kv_transfer.window import STALL_S, Window

MEASURED_BYTES = 1 << 24
Choose = Callable[[str, Rest, float], str]
"""Transfer id, what is left, now."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A link's rate: ``(from second, coded bytes per second)``, ascending, the first from 0."""

    steps: tuple[tuple[float, float], ...]

    def arrival(self, start: float, num_bytes: float) -> float:
        """When the last of ``num_bytes`` is over that begin at ``start``."""
        ends = [at for at, _ in self.steps[1:]] + [float("inf")]
        for (_, rate), end in zip(self.steps, ends, strict=True):
            if start >= end:
                continue
            if num_bytes <= (end - start) * rate:
                return start + num_bytes / rate
            num_bytes -= (end - start) * rate
            start = end
        raise AssertionError("the last step never ends")


@dataclass(frozen=True, slots=True)
class World:
    """costs: by codec, as they are, not as estimated. compute_s: of tokens there, from..to.
    jitter_s: an answer is late by up to so much; cost_noise: a frame costs up to so much of its
    cost more."""

    trace: Trace
    latency_s: float
    costs: Mapping[str, CodecCost]
    compute_s: Callable[[int, int], float]
    bytes_per_token: int
    frame_bytes: int = 1 << 20
    jitter_s: float = 0.0
    cost_noise: float = 0.0


@dataclass(slots=True)
class _Link:
    """free_at: of the link and the decoder."""

    linked_at: float = 0.0
    decoded_at: float = 0.0
    answers: list[tuple[float, KvProgress]] = field(default_factory=list)


class Simulation:
    """One sender and one peer. ``hand_over`` one after the other; the clock only moves on."""

    def __init__(self, world: World, controller: CodecController, seed: int = 0) -> None:
        self._world = world
        self._random = Random(seed)
        self._controller = controller
        self._window = Window(world.frame_bytes)
        self._link = _Link()
        self.now = 0.0
        self.choices: list[str] = []

    def hand_over(self, transfer_id: str, num_tokens: int, choose: Choose) -> float:
        """Seconds until decode could begin, from now on."""
        world, began = self._world, self.now
        per_frame = max(1, world.frame_bytes // world.bytes_per_token)
        sent_tokens, frames, decode_s, coded = 0, 0, 0.0, 0
        while sent_tokens < num_tokens:
            count = min(per_frame, num_tokens - sent_tokens)
            self._wait_for_room(count * world.bytes_per_token)
            rest = Rest(
                num_bytes=(num_tokens - sent_tokens) * world.bytes_per_token,
                frame_bytes=count * world.bytes_per_token,
                num_tokens=num_tokens,
                num_kept=sent_tokens,
                may_recompute=True,
            )
            codec = choose(transfer_id, rest, self.now)
            self.choices.append(codec)
            if codec == RECOMPUTE:
                break
            took = self._send(transfer_id, codec, rest.frame_bytes, frames, decode_s, coded)
            frames, decode_s, coded = frames + 1, decode_s + took[0], coded + took[1]
            sent_tokens += count
        while self._link.answers:
            self._hear(self._link.answers.pop(0))
        self._controller.closed(transfer_id, self.now, is_committed=True)
        self._window.closed(transfer_id)
        self.now = ready_at = max(self.now - world.latency_s / 2, began + world.latency_s / 2)
        if sent_tokens < num_tokens:
            seconds = world.compute_s(sent_tokens, num_tokens)
            ready_at += seconds
            self._controller.compute.computed(sent_tokens, num_tokens, seconds)
        self.now = ready_at
        return ready_at - began

    def _send(
        self, transfer_id: str, codec: str, num_bytes: int, sent: int, decode_s: float, coded: int
    ) -> tuple[float, int]:
        """(Seconds of decoding, coded bytes) of the frame."""
        world, link = self._world, self._link
        cost = world.costs[codec]
        encode_s = num_bytes * cost.encode_s * self._noise()
        num_coded = max(1, int(num_bytes * cost.ratio))
        self.now += encode_s
        self._hear_all()
        self._controller.sent(transfer_id, 1, codec, num_bytes, num_coded, encode_s, self.now)
        self._window.sent(transfer_id, 1, num_coded, self.now)
        link.linked_at = world.trace.arrival(max(self.now, link.linked_at), num_coded)
        took = num_bytes * cost.decode_s * self._noise()
        link.decoded_at = max(link.linked_at + world.latency_s / 2, link.decoded_at) + took
        heard_at = link.decoded_at + world.latency_s / 2 + self._random.random() * world.jitter_s
        if link.answers:
            heard_at = max(heard_at, link.answers[-1][0])
        progress = KvProgress(transfer_id, 1, sent + 1, coded + num_coded, decode_s + took)
        link.answers.append((heard_at, progress))
        return took, num_coded

    def _noise(self) -> float:
        return 1.0 + self._random.random() * self._world.cost_noise

    def _wait_for_room(self, num_bytes: int) -> None:
        answers = self._link.answers
        self._hear_all()
        while not self._window.has_room(num_bytes, self.now):
            if answers and answers[0][0] <= self.now + STALL_S:
                self._hear(answers.pop(0))
            else:
                self.now += STALL_S

    def _hear_all(self) -> None:
        """What came meanwhile, when it came: nothing here keeps the event loop busy."""
        while self._link.answers and self._link.answers[0][0] <= self.now:
            self._hear(self._link.answers.pop(0))

    def _hear(self, answer: tuple[float, KvProgress]) -> None:
        at, progress = answer
        self.now = max(self.now, at)
        self._window.progressed(progress, at)
        self._controller.progressed(
            progress.transfer_id, progress.epoch, progress.num_frames, progress.decode_s, at
        )


def fixed(codec: str) -> Choose:
    return lambda transfer_id, rest, now: codec


def controlled(controller: CodecController, codecs: Sequence[str]) -> Choose:
    return lambda transfer_id, rest, now: controller.choose(transfer_id, codecs, rest, now).codec


def measured(controller: CodecController, costs: Mapping[str, CodecCost]) -> CodecController:
    """Told what each codec costs, as a worker is that has tried them all."""
    for codec, cost in costs.items():
        encode_s, coded = MEASURED_BYTES * cost.encode_s, int(MEASURED_BYTES * cost.ratio)
        controller.codecs.encoded(codec, MEASURED_BYTES, coded, encode_s)
        decode_s = MEASURED_BYTES * cost.decode_s
        controller.decode.decoded({codec: MEASURED_BYTES}, decode_s, controller.codecs)
    return controller


def outages(fast: float, slow: tuple[float, float], num_drops: int, seed: int) -> Trace:
    """A link that drops from ``fast`` to somewhere within ``slow`` bytes a second, for 1 to 3
    seconds, ``num_drops`` times, with 1 to 3 seconds between."""
    random, steps, at = Random(seed), [(0.0, fast)], 0.0
    for _ in range(num_drops):
        at += random.uniform(1.0, 3.0)
        steps.append((at, random.uniform(*slow)))
        at += random.uniform(1.0, 3.0)
        steps.append((at, fast))
    return Trace(tuple(steps))

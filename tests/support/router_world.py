"""A router decider among simulated workers: messages may be late, doubled or lost.

Workers compute a known token per (seed, position), so that whatever a client gets can be
checked. Nothing here is asynchronous; ``Random`` decides what happens next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from baton.protocol.config import RouterConfig
from baton.protocol.errors import BatonError
from baton.protocol.messages import (
    Abort,
    AnyMessage,
    Dispatch,
    HeldAttempt,
    HelloReply,
    LoadReport,
    RequestBody,
    RequestFailed,
    RouterAlive,
    TokenAck,
    TokenBatch,
    TokenItem,
)
from baton.protocol.sampling import SamplingParams
from baton.protocol.spec import WorkerInfo
from router.decider import RouterDecider
from router.detokenizer import Detokenizer
from router.events import (
    Announced,
    ClientAbort,
    Connect,
    Deliver,
    Disconnect,
    Failure,
    FromWorker,
    Gone,
    Greeted,
    Instruction,
    Tick,
    ToWorker,
)
from router.frontend import GenerateSpec, Output
from router.tokenizer import Tokenizer

NUM_IDS = 6
"""So few request ids that they are used again and again."""
FIRST_ID = 64
"""The id of the letter a in the tiny tokenizer."""
ROLES = {"p-0": "prefill", "p-1": "prefill", "d-0": "decode", "d-1": "decode", "m-0": "mixed"}


def token_at(seed: int, position: int) -> int:
    return FIRST_ID + (seed * 31 + position * 7) % 26


def text_of(token_id: int) -> str:
    return chr(ord("a") + token_id - FIRST_ID)


@dataclass
class _Work:
    """One attempt on the workers. ``unacked`` are kept and sent again, as real workers do."""

    body: RequestBody
    decode: str
    at: str
    next_seq: int
    unacked: list[tuple[str, TokenItem]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.next_seq >= self.body.sampling.max_tokens


@dataclass
class Client:
    spec: GenerateSpec
    outputs: dict[int, list[Output]] = field(default_factory=dict)
    error: BatonError | None = None

    @property
    def is_over(self) -> bool:
        finished = [o[-1].finish_reason is not None for o in self.outputs.values() if o]
        return self.error is not None or (len(finished) == self.spec.n and all(finished))


class World:
    def __init__(self, rng: Random, tokenizer: Tokenizer) -> None:
        self.rng = rng
        self.now = 0.0
        self.config = RouterConfig(max_attempts=10)
        self.decider = RouterDecider(
            "r", 1, self.config, lambda spec: Detokenizer(tokenizer, spec.stop)
        )
        self.incarnation: dict[str, int] = {}
        self.work: dict[tuple[str, int], _Work] = {}
        self.mail: list[tuple[str, AnyMessage]] = []
        self.clients: dict[str, Client] = {}
        self.over: list[Client] = []
        self.num_submitted = 0
        self.is_cut = False
        for worker in ROLES:
            self.start(worker)

    # --- what may happen ----------------------------------------------------------------

    def start(self, worker: str) -> None:
        number = self.incarnation[worker] = self.incarnation.get(worker, -1) + 1
        info = WorkerInfo(
            worker_id=worker, incarnation=str(number), role=ROLES[worker], address="a", pid=1
        )
        self.feed(Announced(info))
        reply = HelloReply("", 1, worker, str(number), ROLES[worker], "fp", "kv", 10_000)
        self.feed(Greeted(worker, reply))

    def submit(self, n: int, max_tokens: int, stop: tuple[str, ...]) -> None:
        request_id = f"r{self.rng.randrange(NUM_IDS)}"
        last = self.clients.get(request_id)
        if last is not None and not last.is_over:
            return
        spec = GenerateSpec(
            request_id=request_id,  # type: ignore[arg-type]
            prompt_ids=(1, 2, 3),
            sampling=SamplingParams(max_tokens=max_tokens, seed=self.num_submitted * 10),
            n=n,
            stop=stop,
            timeout_s=1e6,
        )
        client = Client(spec)
        try:
            instructions = self.decider.submit(spec, self.now)
        except BatonError:
            return
        if last is not None:
            self.over.append(last)
        self.num_submitted += 1
        self.clients[request_id] = client
        self.execute(instructions)

    def compute(self) -> None:
        """One attempt draws its next token, if any is left to draw."""
        ready = [w for w in self.work.values() if not w.is_done]
        if not ready:
            return
        work = self.rng.choice(ready)
        seed = work.body.sampling.seed
        finish = "length" if work.next_seq + 1 >= work.body.sampling.max_tokens else ""
        item = TokenItem(
            work.body.request_id,
            work.body.attempt,
            work.next_seq,
            (token_at(seed, work.next_seq),),
            finish_reason=finish,
        )
        work.next_seq += 1
        work.unacked.append((work.at, item))
        self.post(work.at, item)
        work.at = work.decode

    def post(self, worker: str, *items: TokenItem) -> None:
        self.mail.append((worker, TokenBatch(worker, str(self.incarnation[worker]), items)))

    def deliver(self) -> None:
        """Any message, in any order; it may come once more later."""
        if self.mail:
            at = self.rng.randrange(len(self.mail))
            worker, message = self.mail[at] if self.rng.random() < 0.1 else self.mail.pop(at)
            self.feed(FromWorker(worker, message))

    def resend(self) -> None:
        for work in self.work.values():
            for worker, item in work.unacked:
                self.post(worker, item)

    def fail_one(self) -> None:
        if self.work:
            work = self.rng.choice(list(self.work.values()))
            retryable = self.rng.random() < 0.8
            body = work.body
            failed = RequestFailed(
                body.request_id, body.attempt, "transfer_failed", "x", retryable, "t", work.decode
            )
            del self.work[body.request_id, body.attempt]
            if not self.is_cut:
                self.mail.append((work.at, failed))

    def kill(self, worker: str) -> None:
        """What it held and what it said but was not heard is gone; it is started again."""
        old = str(self.incarnation[worker])
        self.mail = [m for m in self.mail if m[0] != worker]
        for key, work in list(self.work.items()):
            work.unacked = [u for u in work.unacked if u[0] != worker]
            if work.at == worker:
                del self.work[key]
        if self.rng.random() < 0.5:
            self.feed(Gone(worker, old))
        self.start(worker)

    def abort(self) -> None:
        if self.clients:
            self.feed(ClientAbort(self.rng.choice(list(self.clients))))

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        for worker in ROLES:
            self.feed(FromWorker(worker, self._report(worker)))
        self.feed(Tick())
        self.execute(self.decider.alive(self.now))

    def _report(self, worker: str) -> LoadReport:
        counts = dict.fromkeys(LoadReport.__struct_fields__, 0)
        counts |= {
            "worker_id": worker,
            "incarnation": str(self.incarnation[worker]),
            "role": ROLES[worker],
            "kv_transport": "",
            "integrity_errors": (),
        }
        return LoadReport(**counts)  # type: ignore[arg-type]

    # --- the shell ----------------------------------------------------------------------

    def feed(self, event: object) -> None:
        self.execute(self.decider.handle(event, self.now))  # type: ignore[arg-type]

    def execute(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case ToWorker(worker, message):
                    self._to_worker(worker, message)
                case Deliver(output):
                    client = self.clients[output.request_id]
                    assert not client.is_over, "nothing comes after the end"
                    client.outputs.setdefault(output.index, []).append(output)
                case Failure(request_id, error):
                    client = self.clients[request_id]
                    assert not client.is_over, "a request ends once"
                    client.error = error
                case Connect() | Disconnect():
                    pass

    def _answer_for(self, worker: str, attempts: tuple[HeldAttempt, ...]) -> None:
        for held in attempts:
            if (held.request_id, held.attempt) not in self.work:
                failed = RequestFailed(
                    held.request_id, held.attempt, "unavailable", "not here", True, "t", ""
                )
                self.mail.append((worker, failed))

    def _to_worker(self, worker: str, message: object) -> None:
        match message:
            case RouterAlive(_, attempts):
                self._answer_for(worker, attempts)
            case Dispatch() if self.is_cut:
                pass
            case Dispatch(body, decode):
                key = (body.request_id, body.attempt)
                assert key not in self.work, "an attempt is dispatched once"
                assert (decode is None) == (ROLES[worker] == "mixed")
                target = worker if decode is None else decode.worker_id
                if decode is not None:
                    assert decode.incarnation == str(self.incarnation[target])
                self.work[key] = _Work(body, target, worker, len(body.output_ids))
            case Abort(request_id, attempt):
                for key in [k for k in self.work if k[0] == request_id and k[1] <= attempt]:
                    if worker in (self.work[key].at, self.work[key].decode):
                        del self.work[key]
            case TokenAck(items):
                for item in items:
                    work = self.work.get((item.request_id, item.attempt))
                    if work is None:
                        continue
                    work.unacked = [u for u in work.unacked if u[1].seq >= item.next_seq]
                    if work.is_done and not work.unacked:
                        del self.work[item.request_id, item.attempt]

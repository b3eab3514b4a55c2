"""One fault, one request that meets it, and what has to be true afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from baton.protocol.config import ClusterConfig, KvTransferConfig
from baton.protocol.errors import BatonError
from tests.support.clusters import RESTART_S, Cluster, assert_no_residue, tiny_config, until
from tests.support.kv_chaos import OF_FRAMES, OF_KV, Harm, Script, Step
from tests.support.kv_witness import Counts, read
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties

LEASE_S = 1.0
STOP_S = 2.5
"""Over the lease, and under what the router waits for a report."""
PROMPT_TOKENS, MAX_TOKENS = 64, 8
TIMEOUT_S = 20.0
ANSWER_S = TIMEOUT_S + 10.0
MAX_REQUESTS = 8
SLOW_BYTES_PER_S = 8e6
"""So slow that sending layer after layer while the next are computed is worth it."""

Codec = Literal["raw", "split"]
Way = Literal["serialised", "layer-wise"]
ROLES = {"prefill": "p-0", "decode": "d-0"}


def config_of(codec: Codec, way: Way, num_decodes: int = 1) -> ClusterConfig:
    """Serialised: many small frames of chunks that are computed. Layer-wise: a frame has room for
    a whole chunk, so that frames of fewer layers come of sending layers by themselves."""
    frame_bytes = 16 * 1_024 if way == "serialised" else 4 * 2**20
    transfer = KvTransferConfig(
        transport="zeromq", codec=codec, max_frame_bytes=frame_bytes, lease_s=LEASE_S
    )
    return tiny_config(kv_transfer=transfer, num_decodes=num_decodes)


def message_faults() -> Iterator[tuple[Step, Harm]]:
    """Every harm at every step, but bits: TCP and the codec's types guard messages, and what a
    flipped bit of KV could do is what the checksums are for."""
    for step in Step:
        for harm in Harm:
            if harm is Harm.CORRUPT_HEADER and step not in OF_KV:
                continue
            if harm is Harm.CORRUPT_PAYLOAD and step not in OF_FRAMES:
                continue
            yield step, harm


def process_faults() -> Iterator[tuple[Step, str]]:
    return ((step, role) for step in Step for role in ROLES)


@dataclass
class Trial:
    """One cluster, and what was done to it so far."""

    cluster: Cluster
    script: Script
    log_dir: Path
    way: Way
    outcomes: Counter[str] = field(default_factory=Counter)
    last_error: str = ""
    _seed: int = 0

    def counts(self) -> Counts:
        return read(self.log_dir, "d-0")

    async def request(self) -> str:
        """ "exact", or the code of the typed error. Fails for wrong tokens and for no answer."""
        self._seed += 1
        length = 2 * PROMPT_TOKENS if self.way == "layer-wise" else PROMPT_TOKENS
        prompt_ids = prompt_of(length, 1_000 + self._seed)
        try:
            async with asyncio.timeout(ANSWER_S):
                completion = await self.cluster.client.generate(
                    prompt_ids,
                    max_tokens=MAX_TOKENS,
                    temperature=0.0,
                    ignore_eos=True,
                    timeout=TIMEOUT_S,
                )
        except BatonError as exc:
            self.last_error = str(exc)
            return exc.code
        token_ids = [token.token_id for token in completion.choices[0].tokens]
        assert len(token_ids) == MAX_TOKENS
        # Beside the event loop, which carries the workers' reports.
        await asyncio.to_thread(count_near_ties, prompt_ids, token_ids)
        return "exact"

    def _note(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    async def harmed(self, step: Step, harm: Harm) -> None:
        """A message is lost, comes twice, late or in bits: healed, and refused if it was KV."""
        before = self.counts()
        self.script.arm(step, harm)
        outcome = await self._met_by_a_request()
        assert outcome == "exact", f"{harm} at {step}: {outcome} ({self.last_error})"
        self._note(outcome)
        await assert_no_residue(self.cluster)
        is_refused = harm in (Harm.CORRUPT_HEADER, Harm.CORRUPT_PAYLOAD) or (
            step in OF_FRAMES and harm in (Harm.LOSE, Harm.DUPLICATE)
        )
        if is_refused:
            await until(lambda: self.counts().num_corrupt > before.num_corrupt, "it was noticed")

    async def _met_by_a_request(self) -> str:
        """How the one ended that met the fault. In how many parts a chunk's layers go is the
        sender's choice, by its clock: a middle frame may not come with the first request."""
        for _ in range(MAX_REQUESTS):
            outcome = await self.request()
            if self.script.num_harmed:
                break
            assert outcome == "exact", self.last_error
        assert self.script.num_harmed == 1, "the fault took effect"
        return outcome

    async def frozen(self, step: Step, role: str) -> None:
        """SIGSTOP beyond the lease just before that step, then SIGCONT."""
        victim = psutil.Process(self.cluster.pid_of(ROLES[role]))
        self.script.arm(step, act=lambda: os.kill(victim.pid, signal.SIGSTOP))
        request = asyncio.ensure_future(self._met_by_a_request())
        try:
            await until(lambda: self.script.num_harmed == 1 or request.done(), "the step came")
            await until(lambda: victim.status() == psutil.STATUS_STOPPED, "it stands still")
            await asyncio.sleep(STOP_S)
            assert victim.status() == psutil.STATUS_STOPPED
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        self._note(await request)
        await assert_no_residue(self.cluster)

    async def killed(self, step: Step, role: str) -> None:
        """SIGKILL just before that step. The cluster is supervised: another takes its place."""
        pid = self.cluster.pid_of(ROLES[role])
        self.script.arm(step, act=lambda: os.kill(pid, signal.SIGKILL))
        request = asyncio.ensure_future(self._met_by_a_request())
        await until(lambda: self.script.num_harmed == 1 or request.done(), "the step came")
        await until(lambda: not psutil.pid_exists(pid), "it is dead")
        self._note(await request)
        restarted = "it was started again"
        await until(lambda: self.cluster.pid_of(ROLES[role]) != pid, restarted, RESTART_S)
        self.cluster.idle_fds.clear()
        self.cluster.idle_tasks.clear()
        await assert_no_residue(self.cluster)
        assert await self.request() == "exact", "it serves as before"

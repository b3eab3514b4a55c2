"""``python -m baton.engine.structured.trial``: compiles constraints where it can do no harm.

A few hundred bytes of regular expression can keep the compiler busy for ever or fill all memory,
and a thread inside it cannot be stopped. So every new constraint is tried here first, in a
process of its own with a limit of CPU time and of memory that the kernel enforces: it dies, and
the worker says no.

One JSON line out (``{"code", "message", "param"}``, the first two empty when all is well) once it
is ready; from then on one line in (``{"kind", "text"}``), one out. The end of the input is the end
of the process.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from pathlib import Path

import llguidance

from baton.engine.structured.grammar import Vocabulary, compile_constraint, refused
from baton.protocol.constraint import Constraint
from baton.protocol.errors import BatonError

NUM_MASKS = 24
"""Masks cost work too: some grammars compile quickly and then stall the first step."""


def main(arguments: list[str]) -> None:
    """arguments: CPU seconds per constraint, bytes of memory, tokenizer path, vocabulary size,
    EOS ids."""
    seconds, memory_bytes = float(arguments[0]), int(arguments[1])
    vocabulary = Vocabulary(
        Path(arguments[2]), int(arguments[3]), tuple(int(i) for i in arguments[4:])
    )
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        tokenizer = vocabulary.load()
    except BatonError as exc:
        answer(exc)
        return
    answer(None)
    for line in sys.stdin.buffer:
        try:
            judge(tokenizer, Constraint(**json.loads(line)), seconds)
        except BatonError as exc:
            answer(exc)
        else:
            answer(None)


def answer(error: BatonError | None) -> None:
    code, message, param = (error.code, error.message, error.param) if error else ("", "", None)
    print(json.dumps({"code": code, "message": message, "param": param}), flush=True)


def judge(tokenizer: llguidance.LLTokenizer, constraint: Constraint, seconds: float) -> None:
    """Raises InvalidRequest, whatever the compiler raised, or ends the process by SIGPROF.

    Memory that is refused to the compiler itself ends the process by SIGABRT.
    """
    # The default action of this signal ends the process, whatever it is doing.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        try_out(tokenizer, constraint)
    except (BatonError, KeyboardInterrupt, SystemExit):
        raise
    except MemoryError as exc:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        raise refused(constraint, f"it needs more than {limit} bytes of memory") from exc
    except BaseException as exc:
        # A panic of the compiler is no Exception. It is this constraint's doing all the same.
        raise refused(constraint, f"the compiler raised {type(exc).__name__}: {exc}") from exc
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def try_out(tokenizer: llguidance.LLTokenizer, constraint: Constraint) -> None:
    """Compile it and walk some way along it. Raises InvalidRequest."""
    matcher = compile_constraint(tokenizer, constraint)
    choose = random.Random(0)
    for _ in range(NUM_MASKS):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise refused(constraint, matcher.get_error())
        if matcher.is_stopped():
            return
        # Not a list of all allowed ids: masks of large vocabularies are mostly ones.
        places = [place for place, byte in enumerate(mask) if byte]
        if not places:
            raise refused(constraint, "no token can follow")
        place = choose.choice(places)
        bits = [bit for bit in range(8) if mask[place] >> bit & 1]
        matcher.consume_token(8 * place + choose.choice(bits))


if __name__ == "__main__":
    main(sys.argv[1:])

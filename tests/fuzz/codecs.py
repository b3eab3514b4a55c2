"""Throws damaged streams at every codec's ``decode``; ``make fuzz-codecs`` does for ten minutes.

    python -m tests.fuzz.codecs --seconds 600 [--seed 1]

Whatever the bytes, ``decode`` fills its array or raises CodecError, and nothing else. Bytes that
are merely damaged end at a checksum, so most cases are sealed again with right checksums and reach
the codec itself. Kernels are compiled with bounds checks (into a cache of their own): a read or
write outside of an array, which in serving would go unseen, is an IndexError here. Memory is
capped, so that an allocation by what a stream claims is a MemoryError.

Mutations know nothing of coverage: the code under test is machine code, which a coverage-guided
fuzzer of Python cannot see into; they know the format instead (lengths, counts, table bytes).
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections import Counter

import click

MAX_MEMORY_BYTES = 6 << 30
_IS_CHECKED = "NUMBA_BOUNDSCHECK"


def with_bounds_checks() -> None:
    """Starts this process anew: numba reads its settings when it is imported."""
    if os.environ.get(_IS_CHECKED) == "1":
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {_IS_CHECKED: "1", "NUMBA_OPT": "1", "NUMBA_CACHE_DIR": cache}
        arguments = [sys.executable, "-m", "tests.fuzz.codecs", *sys.argv[1:]]
        raise SystemExit(os.spawnve(os.P_WAIT, sys.executable, arguments, environment))


@click.command(help=__doc__)
@click.option("--seconds", default=600, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(seconds: int, seed: int) -> None:
    with_bounds_checks()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    # Imported here: these import numba, whose settings are now right.
    from tests.fuzz.codec_cases import Fuzzer

    fuzzer, counts, end = Fuzzer(seed), Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(500):
            counts[fuzzer.run_one()] += 1
    total = sum(counts.values())
    click.echo(f"{total:,} streams, seed {seed}, bounds checked, nothing but CodecError:")
    for outcome, count in sorted(counts.items()):
        click.echo(f"  {outcome:32} {count:12,}")


if __name__ == "__main__":
    main()

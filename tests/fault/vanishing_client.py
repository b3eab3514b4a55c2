"""A client that streams until it is killed: ``python -m tests.fault.vanishing_client ADDRESS``."""

from __future__ import annotations

import sys

from baton import Client


def main(address: str) -> None:
    with (
        Client(address) as client,
        client.stream(
            [0, *range(40, 80)], max_tokens=2_000, temperature=0.0, ignore_eos=True
        ) as stream,
    ):
        for chunk in stream:
            sys.stdout.write(f"{len(chunk.tokens)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

"""The ``baton`` command. Each subcommand lives in a module of its own, loaded when it runs.

Owns words and exit codes; asks the SDK, ``cluster.load`` and ``cluster.serve`` for the work.
"""

from baton.cli.root import main

__all__ = ["main"]

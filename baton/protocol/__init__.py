"""What the processes of a cluster say to each other.

Ids, messages, lifecycle tables, configuration structs, errors and SLO formulas.
Nothing here does I/O. ``ids``, ``errors`` and ``slo`` use the standard library
alone, because the client SDK ships them.
"""

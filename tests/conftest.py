"""What every test relies on."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that
# press Ctrl-C would then wait for an answer that never comes.
signal.signal(signal.SIGINT, signal.default_int_handler)

"""What all tests need."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that: the tests that interrupt a process
# would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

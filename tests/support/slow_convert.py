"""A conversion in two processes, slow enough to be hit on its way: `slow_convert.py SOURCE RUN`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from megatron_r1.errors import UserError
from megatron_r1.hf import conversion

proper = conversion.write_file


def slow(*arguments):
    time.sleep(0.6)
    return proper(*arguments)


# The processes that are started import this file before they work, and so are slow too.
conversion.write_file = slow

if __name__ == "__main__":
    from tests.support.conversions import convert  # which the others need not wait for

    # A shell that starts a command in the background lets it ignore Ctrl-C, and so all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        convert(sys.argv[1], Path(sys.argv[2]), dtype="fp8", max_shard_gb=1e-4, workers=2)
    except UserError as error:
        sys.exit(f"refused: {error}")

"""A worker that does what it is told: reply, hang, or die."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

print("true", flush=True)
for line in sys.stdin:
    item = json.loads(line)
    reply: object = item.get("n")
    if item["do"] == "pid":
        reply = os.getpid()
    elif item["do"] == "sleep":
        time.sleep(100)
    elif item["do"] == "ignore signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    elif item["do"] == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif item["do"] == "die once":
        if not Path(item["mark"]).exists():
            Path(item["mark"]).touch()
            os._exit(1)
        reply = "second"
    print(json.dumps(reply), flush=True)

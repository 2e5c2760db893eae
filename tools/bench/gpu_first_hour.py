"""The GPU tests in the order in which they tell most, and one report of what they found.

    python tools/bench/gpu_first_hour.py                       # one GPU, half an hour
    python tools/bench/gpu_first_hour.py --gpus 8 --minutes 60 # and the layouts of up to eight
    salloc --nodes=2 ... python tools/bench/gpu_first_hour.py --nodes
    MEGATRON_R1_REHEARSE=cpu python tools/bench/gpu_first_hour.py --only resume

REPORT (runs/gpu_report.md) is written again after every file of tests, so that an allocation that ends leaves what is
known. It has the environment, and of every test its outcome, seconds and figures; failures with their last lines. A
file that begins after the minutes are over is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1.runs.provenance import attempt_facts

ROOT = Path(__file__).resolve().parents[2]
ONE_GPU = (
    *("test_environment", "test_transformer_engine", "test_resume_gpu", "test_cuda_path", "test_server_weights"),
    "test_colocated_gpu",
)
"""Files of tests/gpu: first what everything else stands on, then what trains, then servers."""
FAILURE_LINES = 25


@dataclass
class Test:
    """One test's outcome."""

    name: str
    outcome: str
    seconds: float
    figures: dict[str, str] = field(default_factory=dict)
    message: str = ""


def main() -> None:
    options = arguments()
    names = [*ONE_GPU, *["test_several_gpus"] * (options.gpus > 1), *["test_two_nodes"] * options.nodes]
    if options.only and not any(options.only in name for name in names):
        sys.exit(f"--only={options.only}: must be part of one of {', '.join(names)}")
    names = [name for name in names if options.only in name]
    ends = time.monotonic() + 60 * options.minutes
    found: list[Test] = []
    for place, name in enumerate(names):
        if (left := ends - time.monotonic()) <= 0:
            found += [Test(late, "left out: no time", 0.0) for late in names[place:]]
            break
        found += run(name, left)
        write(options.report, found)
    write(options.report, found)
    print(options.report)
    sys.exit(any(test.outcome in ("failed", "error", "timed out") for test in found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="of this machine; above 1 runs the layouts too")
    parser.add_argument("--nodes", action="store_true", help="run what needs a SLURM allocation of two nodes too")
    parser.add_argument("--minutes", type=float, default=30, help="after which no file of tests begins")
    parser.add_argument("--only", default="", help="part of a file's name")
    parser.add_argument("--report", type=Path, default=Path("runs/gpu_report.md"))
    return parser.parse_args()


def run(name: str, seconds: float) -> list[Test]:
    """One file of tests; pytest ends it after so many seconds, and at least ten minutes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={file}", "-o", "junit_family=xunit1"]
        command = [sys.executable, "-m", "pytest", *options, f"tests/gpu/{name}.py"]
        tests = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            status = tests.wait(max(seconds, 600))
        except subprocess.TimeoutExpired:
            end(tests)
            return [Test(name, "timed out", seconds)]
        if not file.exists():
            return [Test(name, "error", 0.0, message=f"pytest ended with {status} and recorded no test")]
        return list(tests_of(file))


def end(tests: subprocess.Popen[bytes]) -> None:
    """As by Ctrl-C, upon which tests end the ranks and servers that they started."""
    tests.send_signal(signal.SIGINT)
    try:
        tests.wait(60)
    except subprocess.TimeoutExpired:
        tests.kill()
        tests.wait()


def tests_of(file: Path) -> Iterator[Test]:
    """The tests that pytest recorded."""
    for case in ElementTree.parse(file).iter("testcase"):
        outcome, message = "passed", ""
        for kind, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            if (node := case.find(kind)) is not None:
                outcome, message = word, node.text or node.get("message") or ""
        figures = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}"
        yield Test(name, outcome, float(case.get("time", 0)), figures, message)


def write(report: Path, tests: Sequence[Test]) -> None:
    """The report of all tests so far."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(lines(tests)) + "\n")


def lines(tests: Sequence[Test]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for test in tests:
        counts[test.outcome] = counts.get(test.outcome, 0) + 1
    yield "# First hour on a GPU"
    yield ""
    yield f"{', '.join(f'{number} {outcome}' for outcome, number in counts.items())}; {devices()}"
    yield ""
    yield "| test | outcome | seconds | figures |"
    yield "|---|---|---|---|"
    for test in tests:
        figures = "; ".join(f"{name} {value}" for name, value in test.figures.items() if "\n" not in value)
        yield f"| {test.name} | {test.outcome} | {test.seconds:.0f} | {figures.replace('|', '/')} |"
    for test in tests:
        blocks = {name: value for name, value in test.figures.items() if "\n" in value}
        if test.outcome in ("failed", "error"):
            blocks["failure"] = "\n".join(test.message.splitlines()[-FAILURE_LINES:])
        for name, text in blocks.items():
            yield from ("", f"## {test.name}, {name}", "", "```", text.rstrip(), "```")
    yield from ("", "## Environment", "", "```", json.dumps(attempt_facts()[0], indent=1), "```")


def devices() -> str:
    """Names and drivers of the GPUs, by the driver's own tool."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "no GPU"
    return "; ".join(done.stdout.split("\n")).strip("; ")


if __name__ == "__main__":
    main()

"""Hold checkpoints against their manifests, to the last bit: `tools/verify_checkpoint.py RUN|CHECKPOINT|FOLDER ...`.

Every checkpoint of a run is read, the newest first; a Hugging Face folder that was converted here is held against its
audit.json. The exit status is 0 when all verify and 88 when one is damaged.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_r1.checkpoint.inspect import checkpoints_in
from megatron_r1.checkpoint.manifest import read_manifest, verify
from megatron_r1.errors import CheckpointDamaged, DataError, ExitCode, UserError
from megatron_r1.hf.audit import AUDIT_FILE, check_audit, read_audit
from megatron_r1.hf.folder import TensorFolder


def _converted(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / AUDIT_FILE).is_file()


def check_converted(folder: Path) -> str:
    """Hold a converted folder against its audit; what to say of it."""
    started = time.perf_counter()
    count = check_audit(read_audit(folder), TensorFolder(folder))
    return f"{folder}: {count} tensors are as audit.json says, {time.perf_counter() - started:.2f} s"


def check(checkpoint: Path, bar: Progress) -> str:
    """Verify one; what to say of it."""
    size = sum(record.size for record in read_manifest(checkpoint).files.values())
    task, started = bar.add_task(checkpoint.name, total=size), time.perf_counter()
    try:
        manifest = verify(checkpoint, on_file=lambda count: bar.advance(task, count))
    finally:
        bar.remove_task(task)
    seconds = time.perf_counter() - started
    speed = f"{size / 1e6:.1f} MB in {seconds:.2f} s, {size / 1e9 / seconds:.2f} GB/s"
    return f"{checkpoint}: step {manifest.metadata.get('step')}, {len(manifest.files)} files verify, {speed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN|CHECKPOINT|FOLDER")
    console, code = Console(stderr=True, highlight=False), ExitCode.DONE
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        given = parser.parse_args().folders
        folders = [path for named in given for path in ([named] if _converted(named) else checkpoints_in(named))]
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
            for checkpoint in folders:
                try:
                    print(check_converted(checkpoint) if _converted(checkpoint) else check(checkpoint, bar))
                except (CheckpointDamaged, DataError) as error:
                    print(f"damaged: {error}")
                    code = ExitCode.CHECKPOINT_DAMAGED
    except UserError as error:
        print(f"verify_checkpoint: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

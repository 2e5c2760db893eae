"""The command line: `megatron-r1 VERB key=value ...`.

A verb's code, and torch with it, is imported only after its configuration has been checked. An error that the user can
fix is one line on stderr and an exit code by kind; a traceback is a bug.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import sys
import textwrap
import time
import traceback
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from megatron_r1 import __version__, stop_signal
from megatron_r1.config.command_line import Command, parse, unknown_verb, with_files
from megatron_r1.config.keys import check_overrides, check_recipe, reads
from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.recipes import groups, recipes
from megatron_r1.config.verbs import VERBS, JobCommand, Verb
from megatron_r1.errors import ConfigError, ExitCode, PlatformError, Requeue, UserError
from megatron_r1.lifeline import die_with_parent
from megatron_r1.platform.launcher import check_launcher, is_rank_zero, rank, ranks_from_srun, world_size

if TYPE_CHECKING:
    from megatron_r1.config.run import RunConfig

logger = logging.getLogger("megatron_r1.main")

SILENT_S = 5.0
"""Seconds that other ranks wait before they exit with an error, so that rank 0 prints it first."""
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""Errors of files that are the machine's, not this program's."""
STOP_AT_A_CHECKPOINT = (*TRAINING_VERBS, "pipeline")
"""Verbs that a scheduler's warning does not end at once."""
INTERRUPTED = 130  # 128 + SIGINT, as a shell counts
NOBODY_READS = 141  # 128 + SIGPIPE
OPTIONS = """\
options:
  --config-name NAME   another recipe than the verb's own
  --list, --graph, --table
                       of a pipeline: state of its stages, graph, or table of their settings; print it and stop
  --cfg job            print the resolved configuration, with what each key means, and stop
  --help [KEY|SECTION] this text, or what a key or a section means
  --version            the version
  @FILE                arguments from a file, one a line, such as a plan's submit.args"""


def help_text(verb: str = "") -> str:
    """The help text, of one verb or of all."""
    lines = [f"usage: megatron-r1 {verb or 'VERB'} [--config-name NAME] [--cfg job] [key=value ...]", ""]
    if verb:
        lines += [f"{verb}: {VERBS[verb].summary}", f"recipe: {VERBS[verb].recipe}", ""]
    else:
        lines += ["verbs:", *(f"  {name:<10} {entry.summary}" for name, entry in VERBS.items()), ""]
    if verb:
        from megatron_r1.config.describe import sections_read_by

        lines += ["sections that it reads:"]
        for section, meaning in sections_read_by(verb):
            lines += _wrapped(f"  {section:<12} ", meaning)
        lines += [""]
    lines += ["groups (group=option):"]
    for group, options in groups().items():
        if not verb or reads(verb, group):
            lines += _wrapped(f"  {group:<12} ", ", ".join(options))
    lines += ["", *_wrapped("recipes (--config-name): ", ", ".join(recipes())), "", OPTIONS, ""]
    lines += [f"Every key, its value and its meaning: megatron-r1 {verb or 'VERB'} --cfg job"]
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=head, subsequent_indent=" " * len(head))


def prepare(command: Command) -> RunConfig | None:
    """The configuration to run with; None after --help, --version or --cfg, which only print."""
    if command.version:
        print(__version__)
    elif command.help:
        topics = [argument for argument in command.overrides if "=" not in argument]
        if topics:
            from megatron_r1.config.describe import help_of
        print("\n\n".join(help_of(topic, command.verb) for topic in topics) if topics else help_text(command.verb))
    elif not command.verb:
        raise ConfigError("VERB", "", f"must be one of {', '.join(VERBS)}")
    else:
        from megatron_r1.config.cross_checks import check_layout
        from megatron_r1.config.describe import commented_yaml
        from megatron_r1.config.load import load_all  # Hydra takes a tenth of a second: not for --help
        from megatron_r1.runs.source import find_model

        check_overrides(command.verb, command.overrides)
        loaded = load_all(command.verb, command.overrides, command.recipe, find_model)
        config = loaded.config
        check_recipe(command.verb, command.recipe)
        if not command.print_config:
            check_layout(config, command.verb, world_size())
            VERBS[command.verb].check(command.verb, config.init.from_)
            return config
        print(commented_yaml(config, command.verb, loaded.origins), end="")
    return None


def run_on_command(command: Command) -> int:
    """Run a verb that takes another verb's command, such as `check`; returns the exit status.

    Raises:
        ConfigError: there is no such command.
    """
    if not command.job_verb or VERBS[command.job_verb].of_command:
        others = [name for name, entry in VERBS.items() if not entry.of_command]
        words = [command.job_verb, *(line for line in command.overrides if "=" not in line), *command.overrides, ""]
        raise unknown_verb(next(filter(None, words), ""), f"{command.verb} takes the command of", others)
    job = JobCommand(command.job_verb, command.recipe, tuple(command.overrides))
    status: int = import_module(VERBS[command.verb].module).run_command(job)
    return status


def run_verb(verb: Verb, config: RunConfig) -> None:
    """Set up logging and run a verb; an error is also written to the rank's log file."""
    from megatron_r1.runs.folder import run_folder
    from megatron_r1.track.logs import FILE_ONLY, logging_to

    with logging_to(run_folder(config) if verb.computes else None, rank()):
        try:
            if verb.computes:
                check_launcher()
                import_module("megatron_r1.platform").select(config.platform)
            import_module(verb.module).run(config)
        except Exception as error:
            known = isinstance(error, UserError)
            logger.error("%s", error, exc_info=None if known else error, extra=FILE_ONLY)
            raise


def exit_code(arguments: list[str]) -> int:
    """Run the command line, print an error if there is one, and return the process's exit status."""
    try:
        os.environ.update(ranks_from_srun(os.environ))
        command = parse(with_files(arguments) or ["--help"])
        if command.job_verb and command.print_config:
            command.verb = command.job_verb
        if command.verb not in STOP_AT_A_CHECKPOINT:
            stop_signal.restore_default()
        if command.verb and VERBS[command.verb].of_command and not (command.help or command.version):
            return run_on_command(command)
        config = prepare(command)
        if config is not None:
            run_verb(VERBS[command.verb], config)
    except UserError as error:
        # All ranks have the same error or got the same signal: only rank 0 prints it.
        if not (isinstance(error, ConfigError | Requeue) and _another_rank_prints()):
            complain(" ".join(str(error).split()))
        return int(error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Exception, SystemExit) as error:
        if nobody_reads(error):
            return NOBODY_READS
        if isinstance(error, SystemExit):
            raise
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            complain(f"{error.filename or 'a file'}: {error.strerror}")
            return int(ExitCode.BAD_CONFIG)
        traceback.print_exc()
        return int(ExitCode.BUG)
    return int(ExitCode.DONE)


def complain(line: str) -> None:
    """Print an error, if somebody reads it."""
    with suppress(BrokenPipeError):
        print(f"megatron-r1: {line}", file=sys.stderr)


def nobody_reads(error: BaseException) -> bool:
    """Whether an error says that what read this program's output has ended, such as `head`.

    A connection that breaks raises the same error; then both outputs are still open.
    """
    if isinstance(error, SystemExit):  # rich's, which has given up the output itself
        return isinstance(error.__context__, BrokenPipeError)
    closed = select.poll()
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it is no file
            closed.register(output.fileno(), 0)  # an error, such as that of a pipe without a reader, is always reported
    return isinstance(error, BrokenPipeError) and any(event & select.POLLERR for _, event in closed.poll(0))


def flush_output(code: int) -> int:
    """Write what is still buffered; returns the exit status, that of a program whose output nobody reads if so.

    What cannot be written is dropped: Python would complain about it at its end.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or NOBODY_READS
    return code


def _another_rank_prints() -> bool:
    try:
        return not is_rank_zero()
    except PlatformError:  # the launcher's variables are the error
        return False


def main() -> None:
    """Entry point of the `megatron-r1` command."""
    die_with_parent()
    stop_signal.block()
    # OpenMP reads this when torch is imported. Threads that spin while they wait would starve an engine on their cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    code = flush_output(exit_code(sys.argv[1:]))
    if code == ExitCode.BAD_CONFIG and _another_rank_prints():
        # A launcher kills all ranks as soon as one has exited: rank 0, which prints the error, must exit first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SILENT_S)
    sys.exit(code)


if __name__ == "__main__":
    main()

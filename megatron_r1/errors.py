"""Errors, with an exit code for each kind.

Every error that is not a bug ends the program with one line on stderr and one of the exit codes below.
A traceback is printed only for a bug in this code.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit status; `launch/` acts on these numbers."""

    DONE = 0
    BUG = 1
    BAD_CONFIG = 2
    BAD_DATA = 3
    REQUEUE = 85
    DIVERGED = 86
    NO_ROLLOUT_CAPACITY = 87
    CHECKPOINT_DAMAGED = 88
    STALLED = 89
    PREFLIGHT_FAILED = 90


class UserError(Exception):
    """An error that the user can fix: printed as one line; the process ends with `exit_code`."""

    exit_code = ExitCode.BUG


class ConfigError(UserError):
    """A configuration key has a value that is not allowed.

    Args:
        key: dotted path of the key, e.g. ``train.optimizer.learning_rate``.
        value: the invalid value.
        allowed: description of valid values.
    """

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, key: str, value: object, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key}={value}: {allowed}")

    def under(self, section: str) -> ConfigError:
        """The same error with its key placed under `section`."""
        return ConfigError(f"{section}.{self.key}" if section else self.key, self.value, self.allowed)


class DataError(UserError):
    exit_code = ExitCode.BAD_DATA


class PlatformError(UserError):
    exit_code = ExitCode.BAD_CONFIG


class Diverged(UserError):
    exit_code = ExitCode.DIVERGED


class NoRolloutCapacity(UserError):
    exit_code = ExitCode.NO_ROLLOUT_CAPACITY


class CheckpointDamaged(UserError):
    exit_code = ExitCode.CHECKPOINT_DAMAGED


class FolderInUse(UserError):
    """Another process writes to this folder."""

    exit_code = ExitCode.BAD_CONFIG


class Requeue(UserError):
    """A signal stopped the run after a checkpoint, or the run goes back to one; the same command resumes it."""

    exit_code = ExitCode.REQUEUE


class Stalled(UserError):
    """A deadline of a phase has passed on some rank; the same command resumes."""

    exit_code = ExitCode.STALLED


class RankLost(UserError):
    """Another rank of the job has failed, or gives no sign of life; the same command resumes unless that rank's error
    has another exit code.
    """

    def __init__(self, text: str, exit_code: ExitCode = ExitCode.REQUEUE):
        super().__init__(text)
        self.exit_code = exit_code

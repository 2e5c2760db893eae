"""The command line's verb, options and overrides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from megatron_r1.config.recipes import recipes
from megatron_r1.config.verbs import VERBS
from megatron_r1.errors import ConfigError


@dataclass(slots=True)
class Command:
    """The parsed command line."""

    verb: str = ""
    """Empty where there is none, as with --help alone."""
    job_verb: str = ""
    """The verb of the job, where `verb` takes another verb's command."""
    config_name: str | None = None
    """Recipe; None takes the verb's own."""
    print_config: bool = False
    """Print the resolved configuration and stop."""
    help: bool = False
    """Print the help text and stop."""
    version: bool = False
    """Print the version and stop."""
    overrides: list[str] = field(default_factory=list)
    """KEY=VALUE and GROUP=OPTION, in their order; with `help`, what it is to explain."""

    @property
    def recipe(self) -> str:
        """Name of the recipe, the verb's own without --config-name."""
        return (self.config_name or VERBS[self.job_verb or self.verb].recipe).removesuffix(".yaml")


def with_files(arguments: list[str]) -> list[str]:
    """Arguments with those of each @FILE in its place: one a line, blank lines and lines that begin with # aside.

    Raises:
        ConfigError: a file cannot be read.
    """
    found: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            found.append(argument)
            continue
        try:
            lines = Path(argument[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("@FILE", argument[1:], f"must be a text file: {error}") from None
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def parse(arguments: list[str]) -> Command:
    """Arguments in any order; the first one that is no option is the verb, the others are overrides.

    Raises:
        ConfigError: an unknown verb or option.
    """
    command, waiting = Command(), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        option, equals, value = argument.partition("=")
        if option in ("-h", "--help"):
            command.help = True
        elif option == "--version":
            command.version = True
        elif option in ("--config-name", "--cfg"):
            value = value if equals else waiting.pop(0) if waiting else ""
            if option == "--cfg" and value != "job":
                raise ConfigError("--cfg", value, "must be job")
            if not value:
                raise ConfigError("--config-name", value, f"must be one of {', '.join(recipes())}")
            command.print_config |= option == "--cfg"
            command.config_name = value if option == "--config-name" else command.config_name
        elif argument in ("--list", "--graph", "--table"):
            command.overrides.append(f"pipeline.show={argument[2:]}")
        elif argument.startswith("-"):
            options = "--config-name, --cfg, --list, --graph, --table, --help, --version"
            raise ConfigError("option", argument, f"must be one of {options}")
        elif not command.verb and waiting and f"{argument} {waiting[0]}" in VERBS:
            command.verb = f"{argument} {waiting.pop(0)}"
        elif argument in VERBS and command.verb and VERBS[command.verb].of_command and not command.job_verb:
            command.job_verb = argument
        elif command.verb:
            command.overrides.append(argument)
        elif argument in VERBS:
            command.verb = argument
        elif command.help:
            command.overrides.append(argument)
        else:
            raise unknown_verb(argument, "must be", VERBS)
    return command


def unknown_verb(word: str, must: str, verbs: Iterable[str]) -> ConfigError:
    """The error for a word that stands where one of these verbs must be."""
    near = get_close_matches(word, names := [*verbs], n=1)
    return ConfigError("VERB", word, f"{must} one of {', '.join(names)}{f'; did you mean {near[0]}?' if near else ''}")

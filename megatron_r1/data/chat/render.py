"""Chat templates, which are programs that others wrote: rendered in Jinja's sandbox, as transformers does.

Whatever renders with `tokenizer.apply_chat_template` renders here to the same text. Only `strftime_now` gives no
today: it gives the run's `template_date`, so that a resumed run reads the same tokens. Without one it does not exist;
templates that test for it then fall back to a date of their own, and others are refused.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_r1.data.template import R1_ZERO_TEMPLATE
from megatron_r1.errors import DataError

Message = Mapping[str, Any]

RESPONSE_BEGINS, RESPONSE_ENDS = "\ue000<answer\ue000", "\ue000answer>\ue000"
"""Marks around what `{% generation %}` encloses; private-use characters, which are removed from the rendered text."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _r1_zero() -> str:
    before, after = R1_ZERO_TEMPLATE.split("{prompt}")
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if loop.index0 == 0 and message['role'] == 'user' %}"
        f"{{{{ {json.dumps(before)} + message['content'] + {json.dumps(after)} }}}}"
        "{% elif loop.index0 == 1 and message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ raise_exception('the template r1_zero takes one question and its response') }}{% endif %}"
        "{% endfor %}"
    )


R1_ZERO = _r1_zero()
"""DeepSeek-R1-Zero's template as a chat template, for the prompts of reinforcement learning and evaluation."""


class CannotRender(ValueError):
    """The template refuses these messages."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    responses: list[tuple[int, int]]
    """First character of each response that the template marks, and the one after its last; empty without marks."""


class ChatTemplate:
    """One template.

    Args:
        source: Jinja text.
        tokens: further variables of the template: bos_token, eos_token and the like.
        name: of the template, for error messages.
        date: YYYY-MM-DD, the day that `strftime_now` knows; empty: there is no `strftime_now`.

    Raises:
        DataError: Jinja cannot parse the source, or it reads no date and there is one.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], name: str, date: str = ""):
        self.source, self.name, self._tokens = source, name, dict(tokens)
        self.marks_responses = _MARKED.search(source) is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        if date:
            if "strftime_now" not in source:
                raise DataError(f"chat template {name}: reads no date, and template_date={date}")
            environment.globals["strftime_now"] = datetime.datetime.fromisoformat(date).strftime
        try:
            self._template = environment.from_string(source)
            self.fields = _names_read(environment.parse(source))
            """Names of fields that the template reads of messages, or of anything else."""
        except TemplateSyntaxError as error:
            raise DataError(f"chat template {name}: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The text of a conversation; with `add_generation_prompt` it ends where the next response begins.

        Raises:
            CannotRender: the template refuses these messages.
            DataError: the template tries what the sandbox forbids.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except SecurityError as error:
            raise DataError(f"chat template {self.name}: tries what no template may: {error}") from error
        except UndefinedError as error:
            if "strftime_now" not in str(error):
                raise CannotRender(_refusal(error)) from error
            allowed = "set template_date=YYYY-MM-DD beside chat_template, the day that its prompts name"
            raise DataError(f"chat template {self.name}: needs a date (strftime_now): {allowed}") from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise CannotRender(_refusal(error)) from error
        except RecursionError as error:
            raise DataError(f"chat template {self.name}: never comes to an end") from error
        return _unmarked(text)


def _refusal(error: Exception) -> str:
    return f"the chat template refuses it: {' '.join(str(error).split())}"


def _names_read(tree: nodes.Template) -> frozenset[str]:
    """Names of all attributes and items that a template reads: `message.name`, `message['name']`, `.get('name')`."""
    constants: list[nodes.Node] = [item.arg for item in tree.find_all(nodes.Getitem)]
    calls: list[nodes.Call | nodes.Filter] = [*tree.find_all(nodes.Call), *tree.find_all(nodes.Filter)]
    for call in calls:
        constants += [*call.args, *(keyword.value for keyword in call.kwargs)]
    names = {node.value for node in constants if isinstance(node, nodes.Const) and isinstance(node.value, str)}
    return frozenset(names | {node.attr for node in tree.find_all(nodes.Getattr)})


def _unmarked(text: str) -> Rendered:
    pieces, responses, at = [], [], 0
    for part in text.split(RESPONSE_BEGINS):
        inside, closed, after = part.partition(RESPONSE_ENDS)
        if closed:
            responses.append((at, at + len(inside)))
        pieces += [inside, after]
        at += len(inside) + len(after)
    return Rendered("".join(pieces), responses)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: a response, as the model is trained to write it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (RESPONSE_BEGINS, RESPONSE_ENDS))
        # A variable that is set inside does not exist outside, as in transformers.
        return [begin.set_lineno(line), nodes.Scope(body).set_lineno(line), end.set_lineno(line)]


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

"""Renders a model's chat template: messages in, one string out. Knows nothing about tokens.

Templates come with model files, so they run in Jinja's sandbox and within bounds: number of steps, size of output.
What they see and how they behave is as in transformers, for which they are written.
"""

import json
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.server.errors import RequestError, StartupError

MAX_OUTPUT_CHARS = 8 << 20
MAX_STEPS = 300_000  # loop rounds and calls; a few per message are usual
MAX_REFUSAL_CHARS = 200

_END_MARK = "\U000f0004"  # a private character; the space after it tells whether the template trims messages
_CANNOT_RENDER = "the model's chat template cannot render these messages"
_CANNOT_CONTINUE = "continue_final_message: the model's chat template does not reproduce the final message"

_steps: ContextVar[Iterator[int]] = ContextVar("steps")


class ChatTemplate:
    """A compiled template. Thread-safe.

    Args:
        source: text of the Jinja template.
        variables: names the template sees beside the messages, such as `bos_token`.

    Raises:
        StartupError: the template is no valid Jinja.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self.source = source
        self._variables = variables
        try:
            self._template = _Environment().from_string(source)
        except jinja2.TemplateError as error:
            raise StartupError(f"the chat template is not valid: {str(error).splitlines()[0]}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: dict[str, Any],
    ) -> str:
        """The prompt as text.

        With `continue_final_message` the text ends where the final message's content ends.

        Raises:
            RequestError: the template refuses or fails, a bound is exceeded, or the final message cannot be continued.
        """
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other",
                    param="continue_final_message",
                )
            messages = [*messages[:-1], _mark_end(messages[-1] if messages else {})]
        text = self._run(
            template_kwargs
            | self._variables
            | {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _run(self, variables: dict[str, Any]) -> str:
        _steps.set(iter(range(MAX_STEPS)))
        pieces, num_chars = [], 0
        try:
            for piece in self._template.generate(variables):
                num_chars += len(piece)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise RequestError(f"the rendered chat is longer than {MAX_OUTPUT_CHARS} characters")
                pieces.append(piece)
        except RequestError:
            raise
        except _Refusal as error:
            reason = str(error)[:MAX_REFUSAL_CHARS]
            raise RequestError(f"the model's chat template refuses this: {reason}", param="messages") from error
        except Exception as error:  # whatever a template can do wrong: it is a program that we do not know
            raise RequestError(_CANNOT_RENDER, param="messages") from error
        return "".join(pieces)


class _Refusal(jinja2.TemplateError):
    """The template itself called `raise_exception`."""


class _TooManySteps(jinja2.TemplateError):
    """The template runs too long."""


class _Generation(Extension):
    """`{% generation %}` marks what a model has written, for training; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up. Loops and calls are counted, as only they can make a template run for long."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters["octavo_counted"] = _counted
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "octavo_counted", [], [], None, None, lineno=loop.lineno)
        return template

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _count_step()
        return super().call(__context, __obj, *args, **kwargs)


def _count_step() -> None:
    if next(_steps.get(), None) is None:
        raise _TooManySteps(f"more than {MAX_STEPS} steps")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _count_step()
        yield item


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _mark_end(message: dict[str, Any]) -> dict[str, Any]:
    """A copy of the message with a mark after its content (after its last text part)."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _END_MARK + " "}
    if isinstance(content, list):
        for at in range(len(content) - 1, -1, -1):
            if isinstance(text := content[at].get("text"), str):
                part = {**content[at], "text": text + _END_MARK + " "}
                return {**message, "content": [*content[:at], part, *content[at + 1 :]]}
    raise RequestError("continue_final_message: the final message has no text content", param="messages")


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_END_MARK)
    if at < 0:
        raise RequestError(_CANNOT_CONTINUE, param="continue_final_message")
    # Without the space the template has trimmed the message, and would have trimmed what stands before the mark.
    return text[:at] if text.startswith(_END_MARK + " ", at) else text[:at].rstrip()

"""Text form of pipelines: ``a,b{x=1 y=0.5 z="macs=0.5" t=(1,2) f=true n=none}``.

A string stands bare where it is made of letters, digits and ``_.:/-`` alone and reads as nothing else; otherwise in
double quotes with JSON escapes. This module turns text into names and untyped values and back; what type an option
has is for the pass to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from graphprune.errors import UsageError

__all__ = ["Bare", "PassText", "Raw", "Value", "format_pass", "format_value", "interpret", "parse"]

Scalar = int | float | bool | str | None
Value = Scalar | tuple[Scalar, ...]
"""What an option can hold."""


@dataclass(frozen=True)
class Bare:
    """A word without quotes: a number, true, false, none, or a string, as the option's type decides."""

    text: str


Raw = Bare | str | tuple["Bare | str", ...]
"""An option as written: a bare word, a quoted string, or a tuple of these."""


@dataclass(frozen=True)
class PassText:
    """One pass of a pipeline as written."""

    name: str
    options: Mapping[str, Raw] = field(default_factory=dict)


_TOKENS = re.compile(
    r"""(?P<space>\s+)|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<mark>[{}(),=])|(?P<bare>[^\s{}(),="]+)""",
    re.VERBOSE,
)
_BARE_STRING = re.compile(r"[A-Za-z0-9_.:/-]+")


def parse(text: str) -> tuple[PassText, ...]:
    """Read a pipeline.

    Raises:
        UsageError: The text is not a pipeline; the message shows where.
    """
    return _Parser(text).pipeline()


def format_pass(name: str, options: Mapping[str, Value]) -> str:
    """Write one pass with its options."""
    if not options:
        return name
    return (
        name
        + "{"
        + " ".join(f"{key}={format_value(value)}" for key, value in options.items())
        + "}"
    )


def format_value(value: Value) -> str:
    """Write one option so that `parse` reads the same value back."""
    if isinstance(value, tuple):
        return "(" + ",".join(map(format_value, value)) + ")"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if _BARE_STRING.fullmatch(value) and interpret(Bare(value)) == value:
        return value
    return json.dumps(value)


def interpret(raw: Bare | str) -> Scalar:
    """Read a word without knowing its type: none, a boolean, a number, else a string."""
    if isinstance(raw, str):
        return raw
    constants = {"none": None, "true": True, "false": False}
    if raw.text in constants:
        return constants[raw.text]
    for number in (int, float):
        try:
            return number(raw.text)
        except ValueError:
            continue
    return raw.text


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text):
            match = _TOKENS.match(text, position)
            if match is None:
                raise self.error("a quote that is never closed", position)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match.group(), position))
            position = match.end()
        self.at = 0

    def error(self, found: str, position: int, expected: str = "") -> UsageError:
        wanted = f"expected {expected}, found " if expected else "found "
        return UsageError(
            f"pipeline text: {wanted}{found} at position {position} of {self.text!r}; "
            'the form is a,b{x=1 name="text" sizes=(1,2)}'
        )

    def skip(self) -> None:
        while self.at < len(self.tokens) and self.tokens[self.at][0] == "space":
            self.at += 1

    def peek(self) -> tuple[str, str, int]:
        self.skip()
        return (
            self.tokens[self.at]
            if self.at < len(self.tokens)
            else ("end", "the end", len(self.text))
        )

    def take(self, *wanted: str) -> str:
        kind, text, position = self.peek()
        if text not in wanted and kind not in wanted:
            raise self.error(text if kind == "end" else repr(text), position, " or ".join(wanted))
        self.at += 1
        return text

    def pipeline(self) -> tuple[PassText, ...]:
        passes = [self.one_pass()]
        while self.peek()[0] != "end":
            self.take(",")
            passes.append(self.one_pass())
        return tuple(passes)

    def one_pass(self) -> PassText:
        kind, text, position = self.peek()
        if kind != "bare":
            raise self.error(text if kind == "end" else repr(text), position, "the name of a pass")
        self.at += 1
        return PassText(text, self.options() if self.peek()[1] == "{" else {})

    def options(self) -> dict[str, Raw]:
        self.take("{")
        options: dict[str, Raw] = {}
        while self.peek()[1] != "}":
            kind, key, position = self.peek()
            if kind != "bare":
                raise self.error(
                    key if kind == "end" else repr(key), position, "the name of an option or }"
                )
            self.at += 1
            key = key.replace("-", "_")
            if key in options:
                raise self.error(f"option {key!r} a second time", position)
            self.take("=")
            options[key] = self.value()
        self.take("}")
        return options

    def value(self) -> Raw:
        if self.peek()[1] != "(":
            return self.word()
        self.take("(")
        words: list[Bare | str] = []
        while self.peek()[1] != ")":
            words.append(self.word())
            if self.peek()[1] != ")":
                self.take(",")
        self.take(")")
        return tuple(words)

    def word(self) -> Bare | str:
        kind, text, position = self.peek()
        if kind not in ("bare", "quoted"):
            raise self.error(text if kind == "end" else repr(text), position, "a value")
        self.at += 1
        if kind == "bare":
            return Bare(text)
        try:
            return str(json.loads(text))
        except json.JSONDecodeError as error:
            raise self.error(f"{text} ({error.msg})", position, "a JSON string") from error

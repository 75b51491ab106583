"""Options and text form: what is written is read back, and what cannot be read says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune import textform
from graphprune.contract import Artifacts, Context, Pass
from graphprune.errors import UsageError
from graphprune.options import convert_options, describe_options, option_types
from graphprune.program import Program


@dataclass(frozen=True, kw_only=True)
class Many(Pass):
    """Have an option of every type."""

    name: ClassVar[str] = "many"
    must: int
    rate: float = 0.5
    flag: bool = False
    text: str = "plain"
    maybe: int | None = None
    word: str | None = "x"
    choice: Literal["l1", "l2"] = "l2"
    level: Literal[1, 2] = 1
    sizes: tuple[int, ...] = ()
    pair: tuple[float, str] = (1.0, "a")

    def run(self, program: Program, context: Context) -> Artifacts:
        return Artifacts()


def read(text: str) -> Many:
    (part,) = textform.parse(text)
    return Many(**convert_options(Many, part.options))  # type: ignore[arg-type]


texts = st.text(max_size=12) | st.sampled_from(
    ["none", "true", "1", "1.5", "a b", '"', "a,b", "\\"]
)
floats = st.floats(allow_nan=False)


@given(
    st.builds(
        Many,
        must=st.integers(),
        rate=floats,
        flag=st.booleans(),
        text=texts,
        maybe=st.none() | st.integers(),
        word=st.none() | texts,
        choice=st.sampled_from(["l1", "l2"]),
        level=st.sampled_from([1, 2]),
        sizes=st.lists(st.integers(), max_size=3).map(tuple),
        pair=st.tuples(floats, texts),
    )
)
def test_every_option_survives_the_text_form(many: Many) -> None:
    assert read(many.spec()) == many


@pytest.mark.parametrize(
    ("many", "text"),
    [
        (Many(must=1), "many{must=1}"),
        (Many(must=1, text="macs=0.5"), 'many{must=1 text="macs=0.5"}'),
        (Many(must=1, text="a/b:c.d-e_f"), "many{must=1 text=a/b:c.d-e_f}"),
        (Many(must=1, text="none"), 'many{must=1 text="none"}'),
        (Many(must=1, text="12"), 'many{must=1 text="12"}'),
        (Many(must=1, word=None, flag=True), "many{must=1 flag=true word=none}"),
        (Many(must=1, sizes=(1,), pair=(2.0, "b")), "many{must=1 sizes=(1) pair=(2.0,b)}"),
    ],
)
def test_the_text_form_is_short(many: Many, text: str) -> None:
    assert many.spec() == text


def test_reading_is_lenient_where_the_type_decides() -> None:
    many = read(" many { must = 1  rate=2 text=12 maybe=none sizes=( 1 , 2 ) } ")
    assert many == Many(must=1, rate=2.0, text="12", sizes=(1, 2))
    assert type(many.rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "pass 'many' needs the option must=<int>"),
        ("many{must=1 colour=red}", "pass 'many' has no option 'colour'; it takes must, rate, "),
        ("many{must=1.5}", "option must expects int, found 1.5"),
        ("many{must=true}", "option must expects int, found true"),
        ("many{must=1 flag=1}", "option flag expects bool, found 1"),
        ("many{must=1 choice=l3}", "option choice expects l1|l2, found l3"),
        ("many{must=1 level=true}", "option level expects 1|2, found true"),
        ("many{must=1 maybe=x}", "option maybe expects int|none, found x"),
        (
            "many{must=1 sizes=3}",
            "option sizes expects (int, ...), found 3; one alone stands in brackets too: (3)",
        ),
        ("many{must=1 pair=(1)}", "option pair expects (float, str), found (1)"),
        ("many{must=(1)}", "option must expects int, found (1)"),
        ("", "expected the name of a pass, found the end"),
        ("many,", "expected the name of a pass, found the end"),
        ("many{must=1", "expected the name of an option or }, found the end"),
        ("many{must}", "expected =, found '}'"),
        ("many{must=}", "expected a value, found '}'"),
        ("many{must=1 must=2}", "found option 'must' a second time"),
        ('many{text="a}', "found a quote that is never closed at position 10"),
        ('many{text="\\x"}', "expected a JSON string"),
        ("many{sizes=(1 2)}", "expected ,, found '2'"),
        ("many other", "expected ,, found 'other'"),
    ],
)
def test_what_cannot_be_read_says_so(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        read(text)


def test_options_are_described_with_type_and_default() -> None:
    described = describe_options(Many)
    assert described["must"] == "int"
    assert described["maybe"] == "int|none = none"
    assert described["choice"] == "l1|l2 = l2"
    assert described["pair"] == "(float, str) = (1.0,a)"


def test_an_option_of_another_type_is_an_error_to_the_author() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bad(Pass):
        name: ClassVar[str] = "bad"
        table: dict[str, Any]

        def run(self, program: Program, context: Context) -> Artifacts:
            return Artifacts()

    with pytest.raises(TypeError, match="Bad.table: an option is int, float, .*found dict"):
        option_types(Bad)

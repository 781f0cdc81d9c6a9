"""Interface descriptions: the text as data, and values against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.control.idl import (
    Array,
    DescriptionError,
    Enum,
    Map,
    Maybe,
    MismatchError,
    Named,
    Primitive,
    Struct,
    parse,
)
from vfio_user_virtio.control.interface import INTERFACES
from vfio_user_virtio.control.service import _METHODS

if TYPE_CHECKING:
    from vfio_user_virtio.control.varlink import Json

TEXT = """\
# A comment.
interface org.example-1.test   # and another

type Color (red, green)
type Point (x: int, y: ?float)
type Nothing ()

method Draw(points: []Point, names: [string]Color, inline: ?(a: bool, b: (on, off)))
  -> (raw: object, color: ?[]string)

error Broken (what: string)
"""
EXAMPLE = parse(TEXT)
DRAW = EXAMPLE.methods["Draw"].parameters
GOOD: dict[str, Json] = {
    "points": [{"x": 1, "y": 2}, {"x": -(1 << 63), "y": 0.5}, {"x": 0}],
    "names": {"a": "red"},
    "inline": {"a": True, "b": "off"},
}


def test_the_text_as_data() -> None:
    assert EXAMPLE.name == "org.example-1.test"
    assert EXAMPLE.text == TEXT
    assert EXAMPLE.types == {
        "Color": Enum(("red", "green")),
        "Point": Struct({"x": Primitive("int"), "y": Maybe(Primitive("float"))}),
        "Nothing": Struct({}),
    }
    inline = Struct({"a": Primitive("bool"), "b": Enum(("on", "off"))})
    assert (
        Struct(
            {"points": Array(Named("Point")), "names": Map(Named("Color")), "inline": Maybe(inline)}
        )
        == DRAW
    )
    assert EXAMPLE.methods["Draw"].reply == Struct(
        {"raw": Primitive("object"), "color": Maybe(Array(Primitive("string")))}
    )
    assert EXAMPLE.errors == {"Broken": Struct({"what": Primitive("string")})}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "too early"),
        ("interface org.a_b.c", "no name here"),
        ("interface single", "no name here"),
        ("interface a.b\ntype lower ()", "no name here"),
        ("interface a.b\nnonsense A ()", "no member"),
        ("interface a.b\ntype A (x: B)", "no type B"),
        ("interface a.b\ntype A (x: int", "too early"),
        ("interface a.b\ntype A (x: int; y: int)", "what is"),
        ("interface a.b\ntype A (x, y: int)", "where ','"),
        ("interface a.b\ntype A (x: int y: int)", "where ','"),
        ("interface a.b\nmethod A()", "too early"),
        ("interface a.b\nmethod A() ()", "where '->'"),
        ("interface a.b\ntype A (x: [][]int)", "in another"),
        ("interface a.b\ntype A (x: [string][]int)", "in another"),
    ],
)
def test_texts_that_are_wrong(text: str, why: str) -> None:
    with pytest.raises(DescriptionError, match=why):
        parse(text)


def test_values_that_fit() -> None:
    EXAMPLE.check_untrusted(DRAW, GOOD, strict=True)
    EXAMPLE.check_untrusted(DRAW, GOOD | {"inline": None}, strict=True)
    EXAMPLE.check_untrusted(DRAW, GOOD | {"more": 1}, strict=False)
    EXAMPLE.check_untrusted(Primitive("object"), {}, strict=True)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"points": None}, "points"),
        ({"points": {}}, "points"),
        ({"points": [{"x": 1}, 5]}, "points[1]"),
        ({"points": [{"x": 1.0}]}, "points[0].x"),
        ({"points": [{"x": True}]}, "points[0].x"),
        ({"points": [{"x": 1 << 63}]}, "points[0].x"),
        ({"points": [{}]}, "points[0].x"),
        ({"points": [{"x": 1, "z": 1}]}, "points[0].z"),
        ({"points": [{"x": 1, "y": "1"}]}, "points[0].y"),
        ({"names": {"a": "blue"}}, "names.a"),
        ({"names": {"a": ["red"]}}, "names.a"),
        ({"names": []}, "names"),
        ({"inline": {"a": 1, "b": "on"}}, "inline.a"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_values_that_do_not(change: dict[str, Json], path: str) -> None:
    with pytest.raises(MismatchError) as caught:
        EXAMPLE.check_untrusted(DRAW, GOOD | change, strict=True)
    assert caught.value.path == path


def test_parameters_that_are_no_object() -> None:
    with pytest.raises(MismatchError, match="the parameters: it is no object"):
        EXAMPLE.check_untrusted(DRAW, [], strict=True)


def test_every_method_of_ours_is_described_and_there() -> None:
    described = {
        f"{interface.name}.{method}"
        for interface in INTERFACES.values()
        for method in interface.methods
    }
    assert described == _METHODS.keys()

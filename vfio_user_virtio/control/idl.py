"""Interface descriptions of varlink: the text as data, and values checked against it.  Sans-I/O.

The text is the single truth about an interface: it is what introspection shows, what a call's
parameters are checked against before a method sees them, and what a client checks replies against.

Grammar, as far as interfaces of ours need it, which is all but recursion without a way out:

    interface  = {comment} "interface" name {member}
    member     = "type" Name struct-or-enum | "method" Name struct "->" struct | "error" Name struct
    struct     = "(" [field ":" type {"," field ":" type}] ")"
    enum       = "(" word {"," word} ")"
    type       = ["?"] ("[]" type | "[string]" type | struct | enum | Name
                 | "bool" | "int" | "float" | "string" | "object")

Systemd's parser takes no array of arrays, nor a map of maps; nor does this one.

Numbers are those of JSON: an int is a signed 64-bit one, and where a float is wanted an int will
do.  A field that may be null may be absent.  A field that nobody knows is an error in a call, as
in systemd's services, since it is most likely misspelt; in a reply it is ignored.

Source: varlink.org, Interface Definition.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfio_user_virtio.control.varlink import Json

_TOKEN: Final = re.compile(r"\s*(->|\[\]|\[string\]|[?():,]|[A-Za-z][\w.-]*)")
_PRIMITIVES: Final[Mapping[str, tuple[type, ...]]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "string": (str,),
    "object": (dict,),
}
_INTERFACE_NAME: Final = re.compile(r"[A-Za-z](-*[A-Za-z0-9])*(\.[A-Za-z0-9](-*[A-Za-z0-9])*)+")
_MEMBER_NAME: Final = re.compile(r"[A-Z][A-Za-z0-9]*")
_INT_RANGE: Final = range(-(1 << 63), 1 << 63)


class MismatchError(ValueError):
    """A value is not what the description says; `path` is where, such as ``ranges[2].iova``."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path or 'the parameters'}: {problem}")
        self.path = path


@attrs.frozen
class Primitive:
    name: str


@attrs.frozen
class Named:
    name: str


@attrs.frozen
class Struct:
    fields: Mapping[str, Type]


@attrs.frozen
class Enum:
    words: tuple[str, ...]


@attrs.frozen
class Array:
    element: Type


@attrs.frozen
class Map:
    element: Type


@attrs.frozen
class Maybe:
    element: Type


Type: TypeAlias = "Primitive | Named | Struct | Enum | Array | Map | Maybe"


@attrs.frozen
class Method:
    parameters: Struct
    reply: Struct


@attrs.frozen
class Interface:
    """An interface: its `name`, its `text` as it was written, and what that says."""

    name: str
    text: str
    types: Mapping[str, Struct | Enum]
    methods: Mapping[str, Method]
    errors: Mapping[str, Struct]

    def check_untrusted(self, kind: Type, value: Json, *, strict: bool, path: str = "") -> None:
        """Raises MismatchError if `value` is no `kind`; `strict`: unknown fields are an error."""
        match kind:
            case Maybe(element):
                if value is not None:
                    self.check_untrusted(element, value, strict=strict, path=path)
            case Named(name):
                self.check_untrusted(self.types[name], value, strict=strict, path=path)
            case Primitive(name):
                _check_primitive(name, value, path)
            case Enum(words):
                if value not in words:
                    raise MismatchError(path, f"it is none of {', '.join(words)}")
            case Array(element):
                if not isinstance(value, list):
                    raise MismatchError(path, "it is no array")
                for index, item in enumerate(value):
                    self.check_untrusted(element, item, strict=strict, path=f"{path}[{index}]")
            case Map(element):
                for key, item in _object(value, path).items():
                    self.check_untrusted(element, item, strict=strict, path=f"{path}.{key}")
            case Struct(fields):
                self._check_fields(fields, _object(value, path), strict=strict, path=path)

    def _check_fields(
        self, fields: Mapping[str, Type], value: Mapping[str, Json], *, strict: bool, path: str
    ) -> None:
        prefix = f"{path}." if path else ""
        if strict and (unknown := [name for name in value if name not in fields]):
            raise MismatchError(prefix + unknown[0][:40], "there is no such field")
        for name, kind in fields.items():
            if name in value or not isinstance(kind, Maybe):
                here = prefix + name
                if name not in value:
                    raise MismatchError(here, "it is missing")
                self.check_untrusted(kind, value[name], strict=strict, path=here)


def _object(value: Json, path: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise MismatchError(path, "it is no object")
    return value


def _check_primitive(name: str, value: Json, path: str) -> None:
    kinds = _PRIMITIVES[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise MismatchError(path, f"it is no {name}")
    if isinstance(value, int) and value not in _INT_RANGE:
        raise MismatchError(path, "it is no 64-bit number")


class DescriptionError(Exception):
    """The text of a description is wrong."""


def parse(text: str) -> Interface:
    """The interface that `text` describes.  Raises DescriptionError."""
    return _Parser(text).interface()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._used: list[str] = []

    def interface(self) -> Interface:
        self._expect("interface")
        name = self._named(_INTERFACE_NAME)
        types: dict[str, Struct | Enum] = {}
        methods: dict[str, Method] = {}
        errors: dict[str, Struct] = {}
        while self._tokens:
            member, called = self._take(), self._named(_MEMBER_NAME)
            match member:
                case "type":
                    types[called] = self._struct_or_enum()
                case "method":
                    parameters = self._struct()
                    self._expect("->")
                    methods[called] = Method(parameters, self._struct())
                case "error":
                    errors[called] = self._struct()
                case _:
                    raise DescriptionError(f"{member} is no member of an interface")
        if missing := [used for used in self._used if used not in types]:
            raise DescriptionError(f"there is no type {missing[0]}")
        return Interface(name, self._text, types, methods, errors)

    def _type(self) -> Type:
        match self._take():
            case "?":
                return Maybe(self._type())
            case "[]":
                return Array(self._element())
            case "[string]":
                return Map(self._element())
            case "(":
                self._tokens.insert(0, "(")
                return self._struct_or_enum()
            case name if name in _PRIMITIVES:
                return Primitive(name)
            case name:
                self._used.append(name)
                return Named(name)

    def _element(self) -> Type:
        if self._tokens[:1] in (["[]"], ["[string]"]):
            raise DescriptionError("an array or a map in another; name a type that has it")
        return self._type()

    def _struct_or_enum(self) -> Struct | Enum:
        if self._tokens[2:3] == [":"] or self._tokens[1:2] == [")"]:
            return self._struct()
        words = []
        self._expect("(")
        while True:
            words.append(self._take())
            if (found := self._take()) == ")":
                return Enum(tuple(words))
            self._require(found, ",")

    def _struct(self) -> Struct:
        fields: dict[str, Type] = {}
        self._expect("(")
        if self._tokens[:1] == [")"]:
            self._take()
            return Struct(fields)
        while True:
            name = self._take()
            self._expect(":")
            fields[name] = self._type()
            if (found := self._take()) == ")":
                return Struct(fields)
            self._require(found, ",")

    def _take(self) -> str:
        if not self._tokens:
            raise DescriptionError("the description ends too early")
        return self._tokens.pop(0)

    def _named(self, grammar: re.Pattern[str]) -> str:
        name = self._take()
        if not grammar.fullmatch(name):
            raise DescriptionError(f"{name!r} is no name here")
        return name

    def _expect(self, token: str) -> None:
        self._require(self._take(), token)

    def _require(self, found: str, token: str) -> None:
        if found != token:
            raise DescriptionError(f"{found!r} where {token!r} should be")


def _tokens(text: str) -> list[str]:
    bare = re.sub(r"#[^\n]*", "", text).strip()
    tokens: list[str] = []
    position = 0
    while position < len(bare):
        found = _TOKEN.match(bare, position)
        if found is None:
            raise DescriptionError(f"what is {bare[position : position + 20]!r}?")
        tokens.append(found[1])
        position = found.end()
    return tokens

"""The structures of the control interface as classes, and how they come from and go to JSON.

Each class has the name and the fields of a type in `interface.CONTROL_TEXT`; a test compares the
two.  What arrives has been checked against that text, so making objects of it cannot fail.
"""

from __future__ import annotations

import functools
import types
import typing
from typing import TYPE_CHECKING, TypeVar, cast

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from vfio_user_virtio.control.varlink import Json

_T = TypeVar("_T")


@attrs.frozen(kw_only=True)
class Session:
    """The client of a device; `connected` in seconds since 1970, `process` its pid if known."""

    connected: float
    process: int | None = None
    version: str | None = None
    commands: dict[str, int] = attrs.field(factory=dict)
    errors: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


@attrs.frozen(kw_only=True)
class Migration:
    """A device's migration; sizes in bytes of the stream."""

    state: str
    options: list[str]
    holder: str
    to_read: int
    read: int
    loaded: int
    images: int
    half_loaded: bool


@attrs.frozen
class Memory:
    """DMA mappings: how many, and how many bytes with a file and without."""

    mappings: int
    mapped: int
    remote: int


@attrs.frozen(kw_only=True)
class Device:
    """A served device and how it is."""

    name: str
    kind: str
    identity: str
    abilities: list[str]
    session: Session | None
    migration: Migration | None
    memory: Memory | None
    dirty_log: str


@attrs.frozen
class Counters:
    """A group of counters, by name."""

    group: str
    counts: dict[str, int]


@attrs.frozen
class Statistics:
    """Counters of a device."""

    device: str
    counters: list[Counters]


@attrs.frozen
class Range:
    """`size` bytes of guest memory from `iova` on."""

    iova: int
    size: int


@attrs.frozen(kw_only=True)
class Mapping:
    """A DMA mapping; `file`: it came with one."""

    iova: int
    size: int
    read: bool
    write: bool
    file: bool


@attrs.frozen
class Pages:
    """What is in `ranges` of guest memory, one after the other, in base64."""

    ranges: list[Range]
    data: str


def to_json(record: attrs.AttrsInstance) -> dict[str, Json]:
    """As `attrs.asdict`, which takes several times as long."""
    return {name: _plain(getattr(record, name)) for name in _fields(type(record))}


def from_json(kind: type[_T], value: Json) -> _T:
    """The `kind` that `value` is, which has been checked."""
    return cast("_T", _maker(cast("Hashable", kind))(value))


def _plain(value: object) -> Json:
    if type(value) in (int, str):
        return cast("Json", value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if attrs.has(type(value)):
        return to_json(cast("attrs.AttrsInstance", value))
    return cast("Json", value)


@functools.cache
def _fields(kind: type) -> dict[str, Hashable]:
    return typing.get_type_hints(kind)


def _same(value: Json) -> object:
    return value


@functools.cache
def _maker(kind: Hashable) -> Callable[[Json], object]:
    """What makes a `kind` of its JSON; worked out once, since messages have thousands of some."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        make = _maker(arguments[0])
        return lambda value: None if value is None else make(value)
    if origin is list:
        make = _maker(arguments[0])
        if make is _same:
            return _same
        return lambda value: [make(item) for item in cast("list[Json]", value)]
    if isinstance(kind, type) and attrs.has(kind):
        return _maker_of_record(kind)
    return _same


def _maker_of_record(kind: type) -> Callable[[Json], object]:
    makers = {name: _maker(field) for name, field in _fields(kind).items()}

    def make(value: Json) -> object:
        given = cast("dict[str, Json]", value)
        return kind(**{name: make(given.get(name)) for name, make in makers.items()})

    return make

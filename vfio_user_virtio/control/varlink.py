"""Varlink messages: JSON objects, each ended by a NUL byte.  Sans-I/O.

Why varlink: it is plain JSON over a socket, describes itself, can stream, and every host with a
current systemd has a client for it (``varlinkctl``).  D-Bus wants a broker, HTTP a library.

A call is an object with

- ``method``: interface and method, such as ``org.varlink.service.GetInfo``
- ``parameters``: an object, may be absent
- ``oneway``: there is to be no reply, not even an error
- ``more``: there may be several replies
- ``upgrade``: both sides are to leave varlink afterwards, which no method here offers

and a reply one with ``parameters``, ``continues`` (there is more to come), and ``error``, a name
like a method's.  Replies come in the order of the calls; a caller need not wait for them.

What is no JSON object, or longer than `limits.MAX_CONTROL_MESSAGE`, ends the connection, since
nobody knows what the peer meant.  Everything else is an error reply.  Members that are not known
are ignored, as JSON protocols grow.

Source: varlink.org, Method Call; systemd's sd-varlink, behaviour of 257.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias, cast

import attrs

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_CONTROL_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

END: Final = b"\0"

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""A value as `json` reads it."""

Object: TypeAlias = "Mapping[str, Json]"

INTERFACE_NOT_FOUND: Final = "org.varlink.service.InterfaceNotFound"
METHOD_NOT_FOUND: Final = "org.varlink.service.MethodNotFound"
METHOD_NOT_IMPLEMENTED: Final = "org.varlink.service.MethodNotImplemented"
INVALID_PARAMETER: Final = "org.varlink.service.InvalidParameter"
EXPECTED_MORE: Final = "org.varlink.service.ExpectedMore"


class VarlinkError(Exception):
    """An error reply: its full name and its parameters."""

    def __init__(self, name: str, parameters: Object | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.parameters: Object = parameters or {}

    def __str__(self) -> str:
        shown = ", ".join(f"{key}: {value}" for key, value in self.parameters.items())
        return f"{self.name} ({shown})" if shown else self.name


@attrs.frozen
class Call:
    """A method call; `interface` and `name` are the two halves of its method."""

    method: str
    parameters: Object = attrs.field(factory=dict)
    oneway: bool = False
    more: bool = False
    upgrade: bool = False

    @property
    def interface(self) -> str:
        return self.method.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.method.rpartition(".")[2]


@attrs.frozen
class Reply:
    """A reply; `error` is None for one that is none."""

    parameters: Object = attrs.field(factory=dict)
    continues: bool = False
    error: str | None = None


class Splitter:
    """Cuts what came, in whatever pieces, into messages."""

    def __init__(self, limit: int = MAX_CONTROL_MESSAGE) -> None:
        self._limit = limit
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a message has begun that is not whole."""
        return bool(self._buffer)

    def feed_untrusted(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes, without their NUL.

        Raises ConnectionLost for a message beyond the limit, before more of it is kept.
        """
        *whole, rest = data.split(END)
        if whole:
            whole[0] = bytes(self._buffer) + whole[0]
            self._buffer.clear()
        self._buffer += rest
        if max(len(self._buffer), *map(len, whole), 0) > self._limit:
            raise ConnectionLost(f"a varlink message has more than {self._limit} bytes")
        return whole


def encode_call(call: Call) -> bytes:
    document: dict[str, Json] = {"method": call.method}
    if call.parameters:
        document["parameters"] = dict(call.parameters)
    for name in ("oneway", "more", "upgrade"):
        if getattr(call, name):
            document[name] = True
    return _encode(document)


def encode_reply(reply: Reply) -> bytes:
    document: dict[str, Json] = {"parameters": dict(reply.parameters)}
    if reply.error is not None:
        document["error"] = reply.error
    if reply.continues:
        document["continues"] = True
    return _encode(document)


def decode_call_untrusted(message: bytes) -> Call:
    """Raises ConnectionLost for what is no call."""
    document = _object_untrusted(message)
    method = document.get("method")
    if not isinstance(method, str) or "." not in method:
        raise ConnectionLost("a varlink call without the name of a method")
    return Call(
        method,
        _parameters(document),
        oneway=_flag(document, "oneway"),
        more=_flag(document, "more"),
        upgrade=_flag(document, "upgrade"),
    )


def decode_reply_untrusted(message: bytes) -> Reply:
    """Raises ConnectionLost for what is no reply."""
    document = _object_untrusted(message)
    error = document.get("error")
    if error is not None and not isinstance(error, str):
        raise ConnectionLost("the error of a varlink reply is no string")
    return Reply(_parameters(document), continues=_flag(document, "continues"), error=error)


def _encode(document: dict[str, Json]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + END


def _object_untrusted(message: bytes) -> dict[str, Json]:
    try:
        document = json.loads(message.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConnectionLost(f"a varlink message is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConnectionLost("a varlink message is no JSON object")
    return cast("dict[str, Json]", document)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _parameters(document: Object) -> dict[str, Json]:
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ConnectionLost("the parameters of a varlink message are no object")
    return parameters


def _flag(document: Object, name: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConnectionLost(f"{name} of a varlink message is neither true nor false")
    return bool(value)

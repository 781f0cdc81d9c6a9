"""VFIO_USER_VERSION: the versions and capabilities two peers agree on.

Source: vfio-user, VFIO_USER_VERSION.  Payload, both ways, little-endian:

- ``0`` u16 major
- ``2`` u16 minor
- ``4`` optional: a JSON object in UTF-8, ended by a NUL

The reply has the major version that was asked for, a minor that is no greater, and no capability
beyond what was proposed.  QEMU 11.1.3 receives it into the buffer of its own request, so a reply
must not be longer than `limits.MAX_VERSION_REPLY_SIZE`: the JSON is compact and says only what the
client proposed or QEMU understands.  JSON is always sent: without it QEMU reads its own proposal.

A version that cannot be agreed on ends the connection, after an error reply: every `ConnectionLost`
of the request's side carries EINVAL as `reply_errno`.

The document is hostile.  It is bounded before it is parsed, a key that stands twice is refused (two
readers could read two things), and NaN, depth and long integers end as a malformed document.
Unknown keys are ignored on every level.
"""

from __future__ import annotations

import errno
import json
import struct
from typing import TYPE_CHECKING, Final, NoReturn

import attrs

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import (
    MAX_ANCILLARY_FDS,
    MAX_DATA_XFER_SIZE,
    MAX_DMA_MAPS,
    MAX_MSG_FDS,
    MAX_VERSION_JSON,
    PAGE_SIZE,
)

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

MAJOR: Final = 0
MINOR: Final = 0

VERSION: Final = struct.Struct("<HH")
assert VERSION.size == 4

_U64_MAX: Final = (1 << 64) - 1


@attrs.frozen
class MigrationCapability:
    """Capability "migration": no longer in the specification, but sent by QEMU and others.

    `pgsize` is the dirty bitmap's page size in bytes, `max_bitmap_size` its largest size in bytes.
    """

    pgsize: int = PAGE_SIZE
    max_bitmap_size: int = 256 << 20


@attrs.frozen
class TwinSocketCapability:
    """Capability "twin_socket": a second socket for the server's commands and their replies.

    `fd_index` is the client's end among the fds of the VERSION reply, None in a request.
    """

    supported: bool = False
    fd_index: int | None = None


@attrs.frozen
class Capabilities:
    """What a peer proposes or grants; the defaults are the specification's for absent keys.

    Sizes in bytes; `pgsizes` is a bit mask of page sizes for DMA mappings.
    """

    max_msg_fds: int = 1
    max_data_xfer_size: int = 1 << 20
    pgsizes: int = 4096
    max_dma_maps: int = 65_535
    write_multiple: bool = False
    migration: MigrationCapability | None = None
    twin_socket: TwinSocketCapability | None = None


@attrs.frozen
class Version:
    """One VERSION message, request or reply."""

    major: int
    minor: int
    capabilities: Capabilities


OWN_CAPABILITIES: Final = Capabilities(
    max_msg_fds=MAX_MSG_FDS,
    max_data_xfer_size=MAX_DATA_XFER_SIZE,
    pgsizes=PAGE_SIZE,
    max_dma_maps=MAX_DMA_MAPS,
    write_multiple=True,
    migration=MigrationCapability(),
    twin_socket=TwinSocketCapability(supported=True),
)
"""What this library can do, as server or client."""


class _MalformedError(ValueError):
    """The document is not what it should be."""


def encode_version(version: Version) -> bytes:
    """The payload of a VERSION request or reply."""
    granted = version.capabilities
    document: dict[str, object] = {
        "max_msg_fds": granted.max_msg_fds,
        "max_data_xfer_size": granted.max_data_xfer_size,
        "pgsizes": granted.pgsizes,
        "max_dma_maps": granted.max_dma_maps,
        "write_multiple": granted.write_multiple,
    }
    if granted.migration is not None:
        document["migration"] = attrs.asdict(granted.migration)
    if granted.twin_socket is not None:
        twin: dict[str, object] = {"supported": granted.twin_socket.supported}
        if granted.twin_socket.fd_index is not None:
            twin["fd_index"] = granted.twin_socket.fd_index
        document["twin_socket"] = twin
    text = json.dumps({"capabilities": document}, separators=(",", ":"))
    return VERSION.pack(version.major, version.minor) + text.encode() + b"\0"


def decode_version_request_untrusted(payload: Buffer, num_fds: int = 0) -> Version:
    """A client's proposal.  Raises ConnectionLost with `reply_errno` EINVAL."""
    if num_fds:
        raise _no_agreement(f"VERSION brought {num_fds} file descriptors, it takes none")
    try:
        version = _parse(payload)
    except _MalformedError as error:
        raise _no_agreement(f"VERSION: {error}") from None
    if version.major != MAJOR:
        raise _no_agreement(f"VERSION asks for {version.major}.x, this server speaks {MAJOR}.x")
    return version


def decode_version_reply_untrusted(payload: Buffer, num_fds: int = 0) -> Version:
    """A server's answer to this library's proposal of version 0.0.  Raises ConnectionLost."""
    try:
        version = _parse(payload)
    except _MalformedError as error:
        raise ConnectionLost(f"the reply to VERSION: {error}") from None
    if version.major != MAJOR or version.minor > MINOR:
        raise ConnectionLost(
            f"the server speaks {version.major}.{version.minor}, this client {MAJOR}.{MINOR}"
        )
    twin = version.capabilities.twin_socket
    needed = 0 if twin is None or twin.fd_index is None else twin.fd_index + 1
    if (twin is not None and twin.supported and not needed) or needed > num_fds:
        raise ConnectionLost(
            f"the reply to VERSION has twin_socket {twin} and {num_fds} file descriptors"
        )
    return version


def negotiate(client: Version, own: Capabilities = OWN_CAPABILITIES) -> Version:
    """The reply to `client`: of each capability what both can do.

    "migration" and "twin_socket" are answered only if the client proposed them and `own` has
    them; the twin socket is granted as fd 0 of the reply.  Raises ConnectionLost(EINVAL) when no
    page size is common, since then no memory could be mapped.
    """
    asked = client.capabilities
    pgsizes = asked.pgsizes & own.pgsizes
    if not pgsizes:
        raise _no_agreement(f"VERSION has pgsizes {asked.pgsizes:#x}, none of {own.pgsizes:#x}")
    migration = None
    if asked.migration is not None and own.migration is not None:
        migration = MigrationCapability(
            min(asked.migration.pgsize, own.migration.pgsize),
            min(asked.migration.max_bitmap_size, own.migration.max_bitmap_size),
        )
    twin = None
    if asked.twin_socket is not None and own.twin_socket is not None:
        granted = asked.twin_socket.supported and own.twin_socket.supported and asked.max_msg_fds
        twin = TwinSocketCapability(True, 0) if granted else TwinSocketCapability()
    return Version(
        MAJOR,
        min(client.minor, MINOR),
        Capabilities(
            max_msg_fds=min(asked.max_msg_fds, own.max_msg_fds),
            max_data_xfer_size=min(asked.max_data_xfer_size, own.max_data_xfer_size),
            pgsizes=pgsizes,
            max_dma_maps=min(asked.max_dma_maps, own.max_dma_maps),
            write_multiple=asked.write_multiple and own.write_multiple,
            migration=migration,
            twin_socket=twin,
        ),
    )


def _no_agreement(message: str) -> ConnectionLost:
    return ConnectionLost(message, reply_errno=errno.EINVAL)


def _parse(payload: Buffer) -> Version:
    if len(payload) < VERSION.size:
        raise _MalformedError(f"a payload of {len(payload)} bytes holds no version")
    major, minor = VERSION.unpack_from(payload)
    document = bytes(payload[VERSION.size :])
    if not document:
        return Version(major, minor, Capabilities())
    if len(document) > MAX_VERSION_JSON:
        raise _MalformedError(f"{len(document)} bytes of JSON, at most {MAX_VERSION_JSON} are read")
    if document[-1]:
        raise _MalformedError("the JSON does not end in NUL")
    try:
        top = json.loads(
            document[:-1].decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise _MalformedError(f"not JSON as it should be: {error}") from None
    if not isinstance(top, dict):
        raise _MalformedError("the JSON is not an object")
    return Version(major, minor, _capabilities(_object(top, "capabilities") or {}))


def _capabilities(found: dict[str, object]) -> Capabilities:
    default = Capabilities()
    migration = _object(found, "migration")
    twin = _object(found, "twin_socket")
    return Capabilities(
        max_msg_fds=_integer(found, "max_msg_fds", default.max_msg_fds, 0, MAX_ANCILLARY_FDS),
        max_data_xfer_size=_integer(found, "max_data_xfer_size", default.max_data_xfer_size, 1),
        pgsizes=_integer(found, "pgsizes", default.pgsizes, 1),
        max_dma_maps=_integer(found, "max_dma_maps", default.max_dma_maps, 0),
        write_multiple=_boolean(found, "write_multiple"),
        migration=None if migration is None else _migration(migration),
        twin_socket=None if twin is None else _twin_socket(twin),
    )


def _migration(found: dict[str, object]) -> MigrationCapability:
    default = MigrationCapability()
    pgsize = _integer(found, "pgsize", default.pgsize, PAGE_SIZE)
    if pgsize % PAGE_SIZE:
        raise _MalformedError(f"migration.pgsize {pgsize} is not a multiple of {PAGE_SIZE}")
    size = _integer(found, "max_bitmap_size", default.max_bitmap_size, 0)
    return MigrationCapability(pgsize, size)


def _twin_socket(found: dict[str, object]) -> TwinSocketCapability:
    index = None
    if "fd_index" in found:
        index = _integer(found, "fd_index", 0, 0, MAX_ANCILLARY_FDS - 1)
    return TwinSocketCapability(_boolean(found, "supported"), index)


def _integer(
    found: dict[str, object], key: str, default: int, low: int, high: int = _U64_MAX
) -> int:
    value = found.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _MalformedError(f"{key} {_shown(value)} is not an integer in {low}…{high}")
    return value


def _boolean(found: dict[str, object], key: str) -> bool:
    value = found.get(key, False)
    if not isinstance(value, bool):
        raise _MalformedError(f"{key} {_shown(value)} is neither true nor false")
    return value


def _object(found: dict[str, object], key: str) -> dict[str, object] | None:
    if key not in found:
        return None
    value = found[key]
    if not isinstance(value, dict):
        raise _MalformedError(f"{key} {_shown(value)} is not an object")
    return value


def _shown(value: object) -> str:
    """A value for a message; never a container, whose repr could recurse as deep as it nests."""
    return type(value).__name__ if isinstance(value, dict | list) else f"{value!r:.40}"


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _MalformedError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _MalformedError(f"{name} is not JSON")

"""How values are written, on the command line and in configuration files alike.

One grammar for both, so that what works in one place can be pasted into the other: TOML strings
are parsed by the same functions that argparse calls.  Each takes what the user wrote and returns
the value, or raises ValueError with a message that names the value, the limit and the remedy; the
caller puts the option or the key in front of it.

Addresses are made up only when none is given: see `derived_mac`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import Final, TypeAlias

import attrs

MAX_SOCKET_PATH: Final = 107
"""Bytes of a UNIX socket's path: sun_path holds 108, one of which is the NUL."""

MAX_INTERFACE_NAME: Final = 15
"""Bytes of a network interface's name: IFNAMSIZ is 16, one of which is the NUL."""

_MAC_ADDRESS: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_OCTAL_MODE: Final = re.compile(r"0?[0-7]{3}")
_RATE: Final = re.compile(r"([0-9]{1,18})((?:[kmg]?bit)?)", re.IGNORECASE)
_RATE_UNITS: Final = {"": 1, "bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@attrs.frozen
class NoUplink:
    """Members reach each other and nothing else."""


@attrs.frozen
class TapUplink:
    """A TAP device that exists, by name."""

    name: str


@attrs.frozen
class TapFdUplink:
    """A TAP device that whoever started us has opened."""

    fd: int


@attrs.frozen
class DatagramUplink:
    """UNIX datagrams, one frame each: QEMU's ``-netdev dgram``."""

    local: str
    remote: str


@attrs.frozen
class StreamUplink:
    """A UNIX stream that we connect to: QEMU's ``-netdev stream`` with ``server=on``."""

    path: str


@attrs.frozen
class StreamListenUplink:
    """A UNIX stream that a peer connects to: QEMU's ``-netdev stream`` with ``server=off``."""

    path: str


@attrs.frozen
class PasstUplink:
    """passt: one that listens on `path`, or one of our own when None."""

    path: str | None


NO_UPLINK: Final = NoUplink()

UplinkConfig: TypeAlias = (
    NoUplink
    | TapUplink
    | TapFdUplink
    | DatagramUplink
    | StreamUplink
    | StreamListenUplink
    | PasstUplink
)


def parse_mac(text: str) -> bytes:
    """A unicast address as six bytes; ``52:54:00:12:34:56``."""
    if not _MAC_ADDRESS.fullmatch(text):
        raise ValueError(f"{text!r} is not a MAC address; write it as 52:54:00:12:34:56")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1:
        raise ValueError(
            f"{text} is a group address; a device needs one whose first byte is even, "
            f"such as {format_mac(bytes([mac[0] & 0xFE]) + mac[1:])}"
        )
    if not any(mac):
        raise ValueError(f"{text} is no address; leave the MAC out to have one made")
    return mac


def format_mac(mac: bytes) -> str:
    return mac.hex(":")


def derived_mac(*names: str, seed: bytes) -> bytes:
    """A locally administered unicast address that is always the same for the same names and seed.

    The first byte ends in the digit 2, the quadrant that IEEE 802c leaves to administrators; the
    other 44 bits are a hash.  `seed` keeps two hosts with the same file apart; see `host_seed`.
    """
    digest = hashlib.blake2b("\0".join(names).encode(), key=seed[:64], digest_size=6).digest()
    return bytes([digest[0] & 0xF0 | 0x02]) + digest[1:]


def host_seed() -> bytes:
    """What distinguishes this host: its machine id, else its host name."""
    try:
        with open("/etc/machine-id", "rb") as file:
            if machine_id := file.read(64).strip():
                return machine_id
    except OSError:
        pass  # A container may have none.
    import socket

    return socket.gethostname().encode()


def parse_mode(text: str) -> int:
    """Permission bits in octal, 0000 to 0777."""
    if not _OCTAL_MODE.fullmatch(text):
        raise ValueError(f"{text!r} is not a file mode; write three octal digits, such as 0660")
    return int(text, 8)


def parse_name(text: str) -> str:
    """A name of an owner, a member or a passed socket."""
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a name; use 1 to 63 letters, digits, '-', '_' and '.', "
            "a letter or digit first"
        )
    return text


def parse_path(text: str) -> str:
    """The path of a file."""
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    return text


def parse_socket_path(text: str) -> str:
    """The path of a UNIX socket; it must fit into a sockaddr_un.  Abstract names are refused."""
    size = len(text.encode(errors="surrogateescape"))
    if not text or "\0" in text or text.startswith("@"):
        raise ValueError(f"{text!r} is not a path; abstract sockets have no access control")
    if size > MAX_SOCKET_PATH:
        raise ValueError(
            f"{text!r} has {size} bytes, a socket's path at most {MAX_SOCKET_PATH}; "
            "use a shorter one, for example in /run"
        )
    return text


def parse_interface(text: str) -> str:
    """The name of a network interface."""
    if not text or len(text.encode()) > MAX_INTERFACE_NAME or re.search(r"[\s/:\0]", text):
        raise ValueError(
            f"{text!r} is not an interface's name, which has 1 to {MAX_INTERFACE_NAME} bytes "
            "without spaces, '/' or ':'; 'ip link' lists those there are"
        )
    return text


def parse_number(text: str) -> int:
    """A decimal integer."""
    if not re.fullmatch(r"-?[0-9]{1,19}", text):
        raise ValueError(f"{text!r} is not a number; write a decimal integer")
    return int(text)


def parse_seconds(text: str) -> float:
    """A time limit: more than 0, and at most an hour."""
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 3600:
            return seconds
    raise ValueError(f"{text!r} is not a number of seconds from 0 to 3600")


def parse_rate(text: str) -> int:
    """Bits per second, written as tc(8) has it: a number, or one with kbit, mbit or gbit."""
    match = _RATE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a rate; write bits per second, 500mbit or 10gbit")
    return int(match[1]) * _RATE_UNITS[match[2].lower()]


def check_fd(number: int) -> int:
    """A descriptor that whoever started us has left open."""
    if not 3 <= number < 1 << 20:
        raise ValueError(
            f"{number} is not a passed descriptor, which is 3 or more; "
            "0, 1 and 2 are standard input, output and error"
        )
    return number


def parse_fd(text: str) -> int:
    """A passed descriptor, as a decimal number."""
    return check_fd(parse_number(text))


def parse_uplink(text: str) -> UplinkConfig:
    """An uplink: what the switch of an owner is wired to.

    ``none``, ``tap:NAME``, ``tap-fd:N``, ``datagram:LOCAL,REMOTE``, ``stream:PATH``,
    ``stream-listen:PATH``, ``passt`` or ``passt:PATH``.
    """
    kind, colon, rest = text.partition(":")
    match kind:
        case "none" if not colon:
            return NoUplink()
        case "tap" if colon:
            return TapUplink(parse_interface(rest))
        case "tap-fd" if colon:
            return TapFdUplink(parse_fd(rest))
        case "datagram" if rest.count(",") == 1:
            local, remote = rest.split(",")
            return DatagramUplink(parse_socket_path(local), parse_socket_path(remote))
        case "stream" if colon:
            return StreamUplink(parse_socket_path(rest))
        case "stream-listen" if colon:
            return StreamListenUplink(parse_socket_path(rest))
        case "passt":
            return PasstUplink(parse_socket_path(rest) if colon else None)
        case _:
            raise ValueError(f"{text!r} is not an uplink; use {UPLINK_FORMS}")


UPLINK_FORMS: Final = (
    "none, tap:NAME, tap-fd:N, datagram:LOCAL,REMOTE, stream:PATH, stream-listen:PATH or "
    "passt[:PATH]"
)

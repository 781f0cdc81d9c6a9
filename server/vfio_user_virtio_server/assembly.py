"""From configuration to live objects: owners with their members, uplinks and captures.

Everything that the host can refuse (a TAP device, a capture's file) is asked for here, before the
daemon says that it is ready.  What has to be given back goes on the caller's exit stack.  Only the
uplinks that are configured are imported.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import values

if TYPE_CHECKING:
    import contextlib

    from vfio_user_virtio.backends.software.owner import RunnableUplink
    from vfio_user_virtio.backends.software.ports import Port
    from vfio_user_virtio.backends.software.switch import Switch
    from vfio_user_virtio_server.config import OwnerConfig


def assemble(config: OwnerConfig, closers: contextlib.ExitStack) -> Owner:
    """The owner that `config` describes; its members have the ids that are in it.

    Raises HostError, ConfigError.
    """
    owner = Owner(config.name)
    uplink = _uplink(config.uplink, owner.switch, closers)
    if uplink is not None:
        owner.add_uplink(uplink)
        _capture(owner.switch, uplink, config.pcap, closers)
    elif config.pcap is not None:
        raise HostError(
            f"owner {config.name} has no uplink to capture in {config.pcap}; "
            "give it one, or capture its members",
            exit_code=os.EX_CONFIG,
        )
    for served in config.members:
        member = owner.add_member(served.member, served.name)
        _capture(owner.switch, member, served.pcap, closers)
    return owner


def _uplink(
    config: values.UplinkConfig, switch: Switch, closers: contextlib.ExitStack
) -> RunnableUplink | None:
    match config:
        case values.NoUplink():
            return None
        case values.TapUplink() | values.TapFdUplink():
            return _tap(config, switch, closers)
        case values.DatagramUplink(local, remote):
            from vfio_user_virtio.backends.software.uplinks.datagram import DatagramUplink

            return DatagramUplink(switch, local=local, remote=remote)
        case values.StreamUplink(path):
            from vfio_user_virtio.backends.software.uplinks.stream import StreamClientUplink

            return StreamClientUplink(switch, path=path)
        case values.StreamListenUplink(path):
            from vfio_user_virtio.backends.software.uplinks.stream import StreamServerUplink

            return StreamServerUplink(switch, path=path)
        case values.PasstUplink(path):
            if path is not None:
                return _uplink(values.StreamUplink(path), switch, closers)
            from vfio_user_virtio.backends.software.uplinks.passt import PasstUplink

            return PasstUplink(switch)


def _tap(
    config: values.TapUplink | values.TapFdUplink, switch: Switch, closers: contextlib.ExitStack
) -> RunnableUplink:
    from vfio_user_virtio.backends.software.uplinks.tap import TapUplink
    from vfio_user_virtio.backends.software.uplinks.tun_device import open_tap, tap_from_fd

    try:
        if isinstance(config, values.TapUplink):
            device = open_tap(config.name)
        else:
            device = tap_from_fd(config.fd)
            os.set_inheritable(device.fd, False)
    except OSError as error:
        raise HostError(
            f"cannot use {_shown(config)}: {error.strerror}; "
            "if a sandbox forbids it, pass an open TAP device as tap-fd:N"
        ) from None
    uplink = TapUplink(switch, device)
    closers.callback(uplink.close)
    return uplink


def _shown(config: values.TapUplink | values.TapFdUplink) -> str:
    if isinstance(config, values.TapUplink):
        return f"the TAP device {config.name}"
    return f"the TAP device of descriptor {config.fd}"


def _capture(switch: Switch, port: Port, path: str | None, closers: contextlib.ExitStack) -> None:
    """Record what passes at `port` in a new file at `path`, which only its owner can read."""
    if path is None:
        return
    from vfio_user_virtio.backends.software.pcap import Capture

    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            capture = Capture(fd, port.name)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise HostError(
            f"cannot capture {port.name} in {path}: {error.strerror or error}; "
            "choose a file that this user can write",
            exit_code=os.EX_NOPERM if isinstance(error, PermissionError) else os.EX_CANTCREAT,
        ) from None
    closers.callback(capture.close)
    switch.capture(port, capture)

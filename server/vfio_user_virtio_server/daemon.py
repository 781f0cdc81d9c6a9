"""The daemon: devices on one side, sockets on the other, signals and the service manager around.

Three rings of tasks.  The innermost has one task per device, which serves one client after the
other; around it run the owners, whose switches must outlive every session, and the control
interface; the outermost waits for a signal.  They end from the inside: on SIGTERM or SIGINT the
paths of our sockets go first, so that nobody connects to a server that is about to end, then
sessions end in order, then owners.

A session's failure stays in its session (`Session.run`).  An uplink that fails for good at start is
a HostError and ends the daemon; later it is that uplink's affair.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import trio

from vfio_user_virtio.backends.software.migratable import administered, migratable_members
from vfio_user_virtio.errors import ConfigError, HostError
from vfio_user_virtio.migration.states import EVERYTHING, VFIO_USER
from vfio_user_virtio.transport.listener import serve_connected, serve_listener
from vfio_user_virtio_server import activation, sockets
from vfio_user_virtio_server.assembly import assemble
from vfio_user_virtio_server.config import (
    CONTROL_NAME,
    InheritedSocket,
    OwnerConfig,
    SocketFd,
    SocketPath,
)
from vfio_user_virtio_server.notify import ServiceManager

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Sequence

    from vfio_user_virtio.backends.software.owner import Owner
    from vfio_user_virtio.device import Device
    from vfio_user_virtio.transport.listener import MakeSession, Serving
    from vfio_user_virtio_server.config import Configuration, Configured, Served, SocketConfig
    from vfio_user_virtio_server.physical_config import PhysicalOwnerConfig

_log: Final = logging.getLogger(__name__)

Watcher: TypeAlias = "Callable[[Serving], None]"
"""Is told of each session of a device when it begins."""

_START_CHECKPOINTS: Final = 5
"""Turns of the scheduler in which what owners do first has been done, such as binding uplinks."""


@attrs.frozen
class _Door:
    """Where the clients of a device come in; `listener` is ours to unlink, if not None."""

    sock: socket.socket
    listening: bool
    listener: sockets.PathListener | None = None

    def close(self) -> None:
        if self.listener is None:
            self.sock.close()
        else:
            self.listener.close()


def run(
    configuration: Configuration, *, one_off: bool, make_session: MakeSession | None = None
) -> int:
    """Serve until a signal comes, or until no client can come any more; the exit code.

    `make_session` is another engine's, if not None.  Raises HostError, ConfigError when it cannot
    start.
    """
    passed = activation.take_inherited()
    manager = ServiceManager()
    _allow_many_descriptors()
    trio.run(_main, configuration, passed, manager, one_off, make_session)
    return os.EX_OK


async def _main(
    configuration: Configuration,
    passed: Sequence[activation.Inherited],
    manager: ServiceManager,
    one_off: bool,
    make_session: MakeSession | None,
) -> None:
    configs = configuration.owners
    with contextlib.ExitStack() as closers:
        signals = closers.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
        everything = [served for config in configs for served in config.served]
        control = _open_control(configuration.control, everything, passed, closers)
        if control is not None:
            passed = [one for one in passed if one.fd != control.sock.fileno()]
        doors = _open_doors(everything, passed, closers)
        every_door = doors if control is None else [*doors, control]
        broken: list[str] = []
        try:
            async with contextlib.AsyncExitStack() as physical, trio.open_nursery() as outer:
                devices: list[Device] = []
                for config in configs:
                    if isinstance(config, OwnerConfig):
                        owner = assemble(config, closers)
                        outer.start_soon(owner.run)
                        devices += await _devices(config, owner)
                    else:
                        devices += await _open_physical(config, physical, control is not None)
                watchers: list[Watcher] = [_nobody] * len(devices)
                if control is not None:
                    watchers = _start_control(outer, control, everything, devices)
                async with trio.open_nursery() as clients:
                    outer.start_soon(_stop_on_signal, signals, clients, every_door, manager)
                    for served, device, door, watcher in zip(
                        everything, devices, doors, watchers, strict=True
                    ):
                        clients.start_soon(
                            _serve_device,
                            served.name,
                            device,
                            door,
                            one_off,
                            broken,
                            watcher,
                            make_session,
                        )
                    for _ in range(_START_CHECKPOINTS):
                        await trio.lowlevel.checkpoint()
                    manager.ready()
                    manager.status(_summary(configs))
                    _log.info("ready: %s", _summary(configs))
                outer.cancel_scope.cancel()
        except* HostError as failures:
            failure = _first(failures)
        else:
            if broken:
                raise HostError(f"{broken[0]}; restart with a socket that listens")
            return
        raise failure


async def _open_physical(
    config: PhysicalOwnerConfig, physical: contextlib.AsyncExitStack, sees_memory: bool
) -> list[Device]:
    from vfio_user_virtio.backends.vfio.physical import physical_functions

    wanted = attrs.evolve(config.physical, sees_memory=sees_memory)
    return await physical.enter_async_context(physical_functions(wanted))


async def _devices(config: OwnerConfig, owner: Owner) -> list[Device]:
    """What is served of `owner`, in the order of `OwnerConfig.served`.

    Members of an owner that is served itself are left to its client: it migrates them, if anybody.
    """
    if config.pf is not None:
        from vfio_user_virtio.backends.software.owner_function import OwnerFunction

        function = OwnerFunction(config.pf.name, config.pf.function, owner)
        return [*owner.members.values(), function]
    options = EVERYTHING if config.p2p else VFIO_USER
    parts_owner = await administered(owner)
    members = await migratable_members(owner, options=options, parts_owner=parts_owner)
    devices: list[Device] = []
    for served in config.members:
        member_id = served.member.member_id
        device = members[member_id]
        if served.legacy:
            from vfio_user_virtio.backends.transitional import transitional

            devices.append(await transitional(device, parts_owner.client, member_id))
        else:
            devices.append(device)
    return devices


async def _stop_on_signal(
    signals: AsyncIterator[int],
    clients: trio.Nursery,
    doors: Sequence[_Door],
    manager: ServiceManager,
) -> None:
    async for number in signals:
        _log.info("%s: ending", signal.Signals(number).name)
        manager.stopping()
        for door in doors:
            if door.listener is not None:
                door.listener.unlink()
        clients.cancel_scope.cancel()


def _nobody(_: Serving) -> None:
    """Without a control interface nobody looks at sessions."""


def _start_control(
    outer: trio.Nursery, door: _Door, everything: Sequence[Served], devices: Sequence[Device]
) -> list[Watcher]:
    """Serve the control interface; who is to be told of each device's sessions."""
    from vfio_user_virtio.control.connections import serve_control
    from vfio_user_virtio.control.device_control import DeviceControl
    from vfio_user_virtio.control.service import ControlService

    controls = [
        DeviceControl(served.name, device, kind=served.kind, identity=served.identity)
        for served, device in zip(everything, devices, strict=True)
    ]
    outer.start_soon(serve_control, door.sock, ControlService(controls))
    return [control.session_began for control in controls]


async def _serve_device(
    name: str,
    device: Device,
    door: _Door,
    one_off: bool,
    broken: list[str],
    watcher: Watcher = _nobody,
    make_session: MakeSession | None = None,
) -> None:
    """Serve the clients of one device.  Returns when there can be no other."""
    try:
        if door.listening and not one_off:
            await serve_listener(
                door.sock, device, name=name, on_session=watcher, make_session=make_session
            )
            return
        sock = await _accept_one(door) if door.listening else door.sock
        await serve_connected(
            sock, device, name=name, on_session=watcher, make_session=make_session
        )
    except OSError as error:
        # Only the listening socket is left to fail so: whoever passed it may have shut it down.
        broken.append(f"{name}: no client can come any more: {error.strerror}")
        _log.error("%s", broken[-1])


async def _accept_one(door: _Door) -> socket.socket:
    """The first client; whoever comes later finds nobody."""
    while True:
        await trio.lowlevel.wait_readable(door.sock)
        try:
            sock, _ = door.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        door.close()
        return sock


def _open_doors(
    everything: Sequence[Served],
    passed: Sequence[activation.Inherited],
    closers: contextlib.ExitStack,
) -> list[_Door]:
    """A door for all that is served, in its order.  Raises HostError, ConfigError."""
    wanted = {
        served.name: served.socket
        for served in everything
        if isinstance(served.socket, InheritedSocket)
    }
    numbers = activation.assign(list(wanted.values()), passed, list(wanted))
    inherited = dict(zip(wanted, numbers, strict=True))
    doors = []
    for served in everything:
        match served.socket:
            case SocketPath() as place:
                listener = sockets.listen_at(place)
                door = _Door(listener.sock, True, listener)
                where = sockets.describe_access(place.path)
            case SocketFd(fd):
                door, where = _adopted(fd, "--fd")
            case InheritedSocket():
                door, where = _adopted(inherited[served.name], "LISTEN_FDS")
        closers.callback(door.close)
        doors.append(door)
        _log.info("%s: %s, clients come by %s", served.name, served.identity, where)
    return doors


def _open_control(
    wanted: SocketConfig | None,
    everything: Sequence[Served],
    passed: Sequence[activation.Inherited],
    closers: contextlib.ExitStack,
) -> _Door | None:
    """The door of the control interface: the one that is wanted, or a passed one of its name.

    Raises HostError, ConfigError.
    """
    match wanted:
        case SocketPath():
            listener = sockets.listen_at(wanted)
            door = _Door(listener.sock, True, listener)
            where = sockets.describe_access(wanted.path)
        case SocketFd(fd):
            door, where = _adopted(fd, "the control interface's")
        case _:
            name = CONTROL_NAME if wanted is None else wanted.fd_name
            taken = {s.socket.fd_name for s in everything if isinstance(s.socket, InheritedSocket)}
            found = [one.fd for one in passed if one.name == name]
            if wanted is None and (not found or name in taken):
                return None
            if len(found) != 1:
                raise ConfigError(
                    f"the control interface wants the passed socket {name!r}, of which there are "
                    f"{len(found)}; set FileDescriptorName= in the socket unit"
                )
            door, where = _adopted(found[0], "LISTEN_FDS")
    closers.callback(door.close)
    if not door.listening:
        raise ConfigError(f"the control interface is {where}; pass a socket that listens")
    _log.info("control: clients come by %s", where)
    return door


def _adopted(fd: int, how: str) -> tuple[_Door, str]:
    adopted = activation.adopt(fd, how)
    kind = "listening" if adopted.listening else "connected"
    return _Door(adopted.sock, adopted.listening), f"descriptor {fd} ({kind})"


def _allow_many_descriptors() -> None:
    """Raise the soft limit to the hard one: every session brings eventfds and memory."""
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # a sandbox may forbid it, and set it itself
        _log.debug("cannot raise the limit of open descriptors: %s", error)


def _summary(configs: Sequence[Configured]) -> str:
    devices = sum(len(config.served) for config in configs)
    return f"serving devices: {devices}, owners: {len(configs)}"


def _first(group: BaseExceptionGroup[HostError]) -> HostError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, HostError)
    return error

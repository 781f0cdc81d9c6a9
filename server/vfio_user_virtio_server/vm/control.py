"""What moving a VM needs of a server, on the control interface: `ServerControl`.

A device is named as its server names it.  What is begun here (a stopped device, a half loaded one,
a log of writes) is the connection's: it ends with it, so the guest at the source runs on even if
this process is killed.

A call that is given up leaves a connection that cannot be used again, and with it the way back; so
calls are not cancelled, and have their time instead.  What may be long is many calls.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.control.client import control_of
from vfio_user_virtio.control.varlink import VarlinkError
from vfio_user_virtio.errors import ConnectionLost, HostError
from vfio_user_virtio_server.dial import dial
from vfio_user_virtio_server.vm.errors import ServerGone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from vfio_user_virtio.control import records
    from vfio_user_virtio.control.client import ControlClient
    from vfio_user_virtio.control.records import Range

ANSWER_SECONDS: Final = 15.0
"""How long a server may take for one call; its own patience with a device is 10 s."""

NEEDED: Final = ("migration", "dirty_log")
"""Abilities without which a guest cannot be moved.  One that does not announce itself can: its
driver does so, if it was taught to."""


@attrs.frozen(kw_only=True)
class ServedDevice:
    """A device of a server.

    `missing`: what it lacks of what moving takes, by name; `announces`: it can tell the network;
    `logs_pages`: its log knows pages, and not only that all of the memory may have been written.
    `process`: the pid of its client, None without a client or if it cannot be told.  `busy`: who
    has its migration or its log in hand, empty if nobody.
    """

    name: str
    connected: bool
    process: int | None = None
    missing: tuple[str, ...] = ()
    announces: bool = False
    logs_pages: bool = True
    busy: str = ""
    state: str = "RUNNING"


class ServerControl:
    """One server, called `name` in messages.  Every method raises HostError."""

    def __init__(self, client: ControlClient, name: str) -> None:
        self.name = name
        self._client = client
        self._silent = False

    async def devices(self) -> list[ServedDevice]:
        with self._call("GetDevices"):
            return [described(device) for device in await self._client.devices()]

    # --- the source ----------------------------------------------------------------------------

    async def start_log(self, device: str) -> None:
        """Log all that the device writes to guest memory from here on."""
        with self._call(f"{device}: StartDirtyLog"):
            await self._client.start_dirty_log(device)

    async def take_log(self, device: str) -> list[Range]:
        """What was written since the last call, as whole pages."""
        with self._call(f"{device}: ReportDirtyLog"):
            return await self._client.report_dirty_log(device)

    async def image(self, device: str) -> bytes:
        """The stream as it begins while the device runs on."""
        with self._call(f"{device}: image"):
            await self._client.set_migration_state(device, "PRE_COPY")
            stream = await self._client.read_image(device)
            await self._client.release(device)
            return stream

    async def first_image(self, device: str) -> bytes:
        """The same, to go on with: what comes later is the rest of this stream."""
        with self._call(f"{device}: PRE_COPY"):
            await self._client.set_migration_state(device, "PRE_COPY")
        with self._call(f"{device}: ReadImage"):
            return await self._client.read_image(device)

    async def stop(self, device: str) -> None:
        """Stop the device, as migration does."""
        with self._call(f"{device}: STOP_COPY"):
            await self._client.set_migration_state(device, "STOP_COPY")

    async def final_image(self, device: str) -> bytes:
        """The stream of a device that is stopped: the rest of it, if it was begun before."""
        with self._call(f"{device}: ReadImage"):
            return await self._client.read_image(device)

    async def announce(self, device: str) -> None:
        """Tell the network that the device's address is here."""
        with self._call(f"{device}: Announce"):
            await self._client.announce(device)

    async def release(self, device: str) -> None:
        """End what was begun: the device runs as it did before, a half loaded one is reset."""
        with self._call(f"{device}: Release"):
            await self._client.release(device)

    async def leave_stopped(self, device: str) -> None:
        """Let the device stay as it is, stopped, until its client goes."""
        with self._call(f"{device}: STOP"):
            await self._client.set_migration_state(device, "STOP", keep=True)

    # --- the target ----------------------------------------------------------------------------

    async def expect(self, device: str) -> None:
        """Stop the device, and have it wait for what is to be loaded."""
        with self._call(f"{device}: RESUMING"):
            await self._client.set_migration_state(device, "RESUMING")

    async def load(self, device: str, stream: bytes) -> None:
        """Have the device take `stream`; it takes effect when it runs."""
        with self._call(f"{device}: WriteImage"):
            await self._client.write_image(device, stream)

    async def resume(self, device: str) -> None:
        """Let the device run with what was loaded: each queue is looked at, each interrupt sent
        once, the network told."""
        with self._call(f"{device}: Resume"):
            await self._client.resume(device)

    @contextlib.contextmanager
    def _call(self, what: str) -> Iterator[None]:
        patience = trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_SECONDS)
        try:
            with patience:
                yield
        except VarlinkError as error:
            raise HostError(f"{self.name}: {what}: {error}") from None
        except ConnectionLost as error:
            if self._silent:
                raise HostError(f"{self.name}: {what}: {error}", exit_code=os.EX_IOERR) from None
            raise ServerGone(f"the server at {self.name}", f"is gone ({what}: {error})") from None
        if patience.cancelled_caught:
            self._silent = True
            raise HostError(f"{self.name}: {what}: no answer in {ANSWER_SECONDS:g} s")


@contextlib.asynccontextmanager
async def connect_server(path: str) -> AsyncIterator[ServerControl]:
    """The server whose control socket is at `path`.  Raises HostError."""
    async with control_of(await dial(path)) as client:
        yield ServerControl(client, path)


def described(device: records.Device) -> ServedDevice:
    """What a server says of a device, as far as it matters here."""
    migration, session = device.migration, device.session
    busy = [
        f"{what} of {holder}"
        for what, holder in (
            ("migration", "nobody" if migration is None else migration.holder),
            ("dirty log", device.dirty_log),
        )
        if holder != "nobody"
    ]
    return ServedDevice(
        name=device.name,
        connected=session is not None,
        process=None if session is None else session.process,
        announces="announce" in device.abilities,
        logs_pages="dirty_pages" in device.abilities,
        missing=tuple(name for name in NEEDED if name not in device.abilities),
        busy=", ".join(busy),
        state="RUNNING" if migration is None else migration.state,
    )

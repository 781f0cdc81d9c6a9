"""One of the two QEMUs: what is to be known of it beforehand, and its part in the migration.

`Facts` are plain data, for `comparison`; what QEMU says is taken apart here and nowhere else.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

from vfio_user_virtio_server.vm.errors import QemuError
from vfio_user_virtio_server.vm.qtest import remove_socket_untrusted, socket_untrusted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from vfio_user_virtio_server.vm.qmp import Json, Qmp
    from vfio_user_virtio_server.vm.qtest import Forwarded

_T = TypeVar("_T")

DRIVER: Final = "vfio-user-pci"
PERIPHERALS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
NEEDED: Final = ("events", "pause-before-switchover")
"""Migration capabilities that are turned on."""

LOOK_SECONDS: Final = 0.1
"""How often a migration is looked at, if somebody wants to see how far it is."""

END_SECONDS: Final = 20.0
"""How long QEMU may take to end, or to give a migration up."""

_MIGRATING: Final = frozenset({"setup", "active", "device", "pre-switchover", "wait-unplug"})
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})


@attrs.frozen
class PciDevice:
    """A vfio-user device: its QOM `path`, its address as ``addr`` has it, the bus it is on."""

    ident: str
    path: str
    address: str
    bus: str


@attrs.frozen(kw_only=True)
class Facts:
    """A QEMU as its monitor shows it.

    `memory`: backends by id, their size in bytes and whether others can map them.  `peripherals`:
    types by id of all that the user has added.  `capabilities`: of migration, those that are on.
    """

    version: tuple[int, int, int]
    machine: str
    status: str
    migration: str
    blockers: tuple[str, ...]
    cpus: tuple[str, ...]
    memory: Mapping[str, tuple[int, bool]]
    peripherals: Mapping[str, str]
    devices: Mapping[str, PciDevice]
    offered: frozenset[str]
    capabilities: frozenset[str]


@attrs.frozen(kw_only=True)
class Ram:
    """How far QEMU's migration is, in bytes of the guest's memory.

    `sent`: on the wire so far, of which `sent_running` while the guest ran; `left`: to be sent, of
    `size`.  `rounds`: how often it has begun.  `downtime`: seconds that it would take QEMU to send
    the rest, as it expects; None if it does not know.
    """

    size: int
    sent: int
    sent_running: int
    left: int
    rounds: int
    downtime: float | None


class Qemu:
    """The QEMU behind `qmp`.  `ram`: of its migration as a source, as it was looked at last.

    `forwarded`: how its test protocol is reached, if it is on another host.
    """

    def __init__(self, qmp: Qmp, forwarded: Forwarded | None = None) -> None:
        self.qmp = qmp
        self.forwarded = forwarded
        self.name = qmp.name
        self.ram: Ram | None = None

    async def facts(self) -> Facts:
        """Raises QemuError."""
        migration = _dict(await self.qmp.execute("query-migrate"))
        blockers = migration.get("blocked-reasons", [])
        offered = await self._capabilities()
        peripherals, devices = await self._peripherals()
        return Facts(
            version=self.qmp.version,
            machine=str(await self.qmp.execute("qom-get", path="/machine", property="type")),
            status=await self.status(),
            migration=str(migration.get("status", "none")),
            blockers=tuple(map(str, blockers)) if isinstance(blockers, list) else (),
            cpus=tuple(
                str(cpu.get("qom-type"))
                for cpu in map(_dict, _list(await self.qmp.execute("query-cpus-fast")))
            ),
            memory={
                str(one.get("id")): (_int(one.get("size")), one.get("share") is True)
                for one in map(_dict, _list(await self.qmp.execute("query-memdev")))
            },
            peripherals=peripherals,
            devices=devices,
            offered=frozenset(offered),
            capabilities=frozenset(name for name, on in offered.items() if on),
        )

    async def status(self) -> str:
        """The run state.  Raises QemuError."""
        return str(_dict(await self.qmp.execute("query-status")).get("status"))

    async def _capabilities(self) -> dict[str, bool]:
        found = map(_dict, _list(await self.qmp.execute("query-migrate-capabilities")))
        return {str(one.get("capability")): one.get("state") is True for one in found}

    async def _peripherals(self) -> tuple[dict[str, str], dict[str, PciDevice]]:
        types: dict[str, str] = {}
        devices: dict[str, PciDevice] = {}
        for folder in PERIPHERALS:
            for entry in map(_dict, _list(await self.qmp.execute("qom-list", path=folder))):
                name, kind = str(entry.get("name")), str(entry.get("type"))
                if not kind.startswith("child<"):
                    continue
                types[name] = kind.removeprefix("child<").removesuffix(">")
                if types[name] == DRIVER:
                    path = f"{folder}/{name}"
                    devices[name] = PciDevice(
                        name,
                        path,
                        str(await self.qmp.execute("qom-get", path=path, property="addr")),
                        str(await self.qmp.execute("qom-get", path=path, property="parent_bus")),
                    )
        return types, devices

    # --- migration -----------------------------------------------------------------------------

    async def set_capabilities(self, names: frozenset[str], on: bool) -> None:
        """Raises QemuError."""
        wanted: list[Json] = [{"capability": name, "state": on} for name in sorted(names)]
        if wanted:
            await self.qmp.execute("migrate-set-capabilities", capabilities=wanted)

    async def wait_migration(self, *wanted: str, on_look: Callable[[], None] | None = None) -> None:
        """Until the migration is in one of the states `wanted`; with `on_look`, `ram` is kept new.

        Raises QemuError if it ends in another.
        """
        while True:
            status: Json = None
            with trio.move_on_after(math.inf if on_look is None else LOOK_SECONDS):
                event = await self.qmp.wait_event(lambda event: event.name == "MIGRATION")
                status = event.data.get("status")
            if status is None and on_look is not None:
                with contextlib.suppress(QemuError):  # whoever waits hears it if QEMU is gone
                    await self.migration()
                    on_look()
            if status in wanted:
                return
            if status in _ENDED:
                raise QemuError(f"{self.name}: the migration is {status}{await self._why()}")

    async def completes(self) -> bool:
        """Whether the migration ends well; not if that takes END_SECONDS."""
        with contextlib.suppress(QemuError), trio.move_on_after(END_SECONDS):
            while True:
                if (status := await self.migration()) in _ENDED:
                    return status == "completed"
                await trio.sleep(0.01)
        return False

    async def migration(self) -> str:
        """The state of the migration, and `ram`.  Raises QemuError."""
        said = _dict(await self.qmp.execute("query-migrate"))
        if "ram" in said:
            self.ram = _ram(said)
        return str(said.get("status", "none"))

    async def _why(self) -> str:
        with contextlib.suppress(QemuError):
            said = _dict(await self.qmp.execute("query-migrate")).get("error-desc")
            return f": {said}" if said else ""
        return ""

    async def give_up(self) -> None:
        """End a migration from here, whatever has become of it.  Raises QemuError."""
        with trio.move_on_after(END_SECONDS):
            while True:
                status = await self.migration()
                if status in _MIGRATING:
                    await self.qmp.execute("migrate_cancel")
                elif status != "cancelling":
                    return
                await trio.sleep(0.01)
        raise QemuError(f"{self.name} does not give the migration up in {END_SECONDS:g} s")

    async def run(self) -> None:
        """Let the guest run, if it does not.  Raises QemuError."""
        if await self.status() != "running":
            await self.qmp.execute("cont")

    @contextlib.asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """The guest does not run meanwhile.  Raises QemuError."""
        if await self.status() != "running":
            yield
            return
        try:
            await self.qmp.execute("stop")
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self.run()

    async def quit(self) -> None:
        """End QEMU, and until it has ended.  Raises QemuError."""
        path: str | None = None
        with trio.move_on_after(END_SECONDS):
            with contextlib.suppress(QemuError):
                path = await socket_untrusted(self.qmp)
            with contextlib.suppress(QemuError):
                await self.qmp.execute("quit")
            await self.qmp.wait_gone()
            if path is not None:
                remove_socket_untrusted(path)
            return
        raise QemuError(f"{self.name} does not end in {END_SECONDS:g} s")


def _ram(said: Mapping[str, Json]) -> Ram:
    """What ``query-migrate`` says; see qapi/migration.json, MigrationRAMStats."""
    ram = _dict(said["ram"])
    downtime = said.get("expected-downtime")
    return Ram(
        size=_int(ram.get("total")),
        sent=_int(ram.get("transferred")),
        sent_running=_int(ram.get("precopy-bytes", 0)),
        left=_int(ram.get("remaining")),
        rounds=_int(ram.get("dirty-sync-count", 0)),
        downtime=None if downtime is None else _int(downtime) / 1e3,
    )


def _dict(value: Json) -> Mapping[str, Json]:
    return _is(dict, value)


def _list(value: Json) -> list[Json]:
    return _is(list, value)


def _int(value: Json) -> int:
    return _is(int, value)


def _is(kind: type[_T], value: object) -> _T:
    if not isinstance(value, kind):
        raise QemuError(f"QEMU answered {value!r:.60} where a {kind.__name__} is due")
    return value

"""One served device under the control interface: what it offers, and who has it in hand.

A device is a stack: `MigratableDevice` around a member or a VF, and maybe a transitional view
around that (`Layer.inner`).  What is found in the stack is offered; what is not answers
NotSupported, with the reason.

What lasts belongs to a *caller*, which is one connection: its end is the end of what it began
(`caller_is_gone`), unless it was begun with ``keep``; that anybody may go on with.  A device never
stays stopped because an orchestrator died.

Errors are the interface's, as `VarlinkError`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from vfio_user_virtio.control import records
from vfio_user_virtio.control.interface import CONTROL
from vfio_user_virtio.control.varlink import VarlinkError
from vfio_user_virtio.device import LoggingStart
from vfio_user_virtio.errors import ClientError, ConnectionLost, DriverError, RemoteError
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.migration.migratable_device import Holder, MigratableDevice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from vfio_user_virtio.device import Device, LoggingReport
    from vfio_user_virtio.memory.guest_memory import MappedRange
    from vfio_user_virtio.migration.member_migration import MemberMigration
    from vfio_user_virtio.migration.migratable_device import DmaLogging
    from vfio_user_virtio.transport.listener import Serving

_log: Final = logging.getLogger(__name__)

_ABILITIES: Final = ("migration", "dirty_log", "dirty_pages", "memory", "replay", "announce")
"""In the order in which they are told."""

_WHY_NOT: Final = {
    "migration": "its migration is in other hands, or it has no owner that knows device parts",
    "dirty_log": "it does not log what it writes",
    "memory": "the server does not see its client's memory",
    "replay": "the server has no way to its queues and interrupts",
    "announce": "the server does not send for it",
}


@runtime_checkable
class Layer(Protocol):
    """A device around another."""

    @property
    def inner(self) -> Device: ...


class GuestPages(Protocol):
    """The client's memory (`memory.access.GuestAccess`)."""

    def mappings(self) -> Sequence[MappedRange]: ...

    async def read(self, iova: int, count: int) -> bytes: ...

    async def write(self, iova: int, data: bytes | memoryview) -> None: ...


class Operator(Protocol):
    """What a device has for operators.  `offers`: which of memory, replay and announce it can."""

    @property
    def offers(self) -> frozenset[str]: ...

    def counters(self) -> Mapping[str, Mapping[str, int]]: ...

    @property
    def guest_access(self) -> GuestPages | None:
        """None without a client."""
        ...

    def replay(self) -> None:
        """Look at each queue, and send each interrupt once; the device runs, which is looked at
        before if it migrates.  The guest of a physical device must not be setting it up meanwhile.

        Raises ClientError.
        """
        ...

    def announce(self) -> None: ...


@runtime_checkable
class Operable(Protocol):
    """A device with an `Operator`."""

    @property
    def operator(self) -> Operator: ...


class Caller:
    """A connection; only its identity counts."""


class DeviceControl:
    """`device` as it is served under `name`; `kind` and `identity` are for people."""

    def __init__(self, name: str, device: Device, *, kind: str, identity: str) -> None:
        self.name: Final = name
        self._session: Serving | None = None
        """The last session, over or not."""
        self._kind = kind
        self._identity = identity
        self._migratable: MigratableDevice | None = None
        self._operator: Operator | None = None
        for layer in _layers(device):
            if isinstance(layer, MigratableDevice):
                self._migratable = layer
            if isinstance(layer, Operable):
                self._operator = layer.operator
        self._migrates: Caller | None = None
        self._logs: Caller | None = None
        """Whose it is while the holder is CONTROL; None: anybody's."""

    def session_began(self, session: Serving) -> None:
        self._session = session

    # --- what there is -------------------------------------------------------------------------

    @property
    def abilities(self) -> list[str]:
        migratable = self._migratable
        found = {
            "migration": migratable is not None,
            "dirty_log": migratable is not None and migratable.can_log,
            "dirty_pages": migratable is not None and migratable.logs_pages,
        }
        offers = frozenset() if self._operator is None else self._operator.offers
        return [name for name in _ABILITIES if found.get(name, name in offers)]

    def status(self) -> records.Device:
        migratable = self._migratable
        return records.Device(
            name=self.name,
            kind=self._kind,
            identity=self._identity,
            abilities=self.abilities,
            session=self._session_record(),
            migration=None if migratable is None else self.migration_status(),
            memory=self._memory_record(),
            dirty_log=(Holder.NOBODY if migratable is None else migratable.log_holder).value,
        )

    def statistics(self) -> records.Statistics:
        """The session's are in `status`."""
        groups = {} if self._operator is None else self._operator.counters()
        counters = [records.Counters(group, dict(counts)) for group, counts in groups.items()]
        return records.Statistics(self.name, counters)

    def migration_status(self) -> records.Migration:
        migratable = self._with_migration()
        migration = migratable.migration
        progress = migration.progress
        return records.Migration(
            state=migration.state.name,
            options=[str(option.name) for option in migration.options],
            holder=migratable.holder.value,
            to_read=progress.to_read,
            read=progress.read,
            loaded=progress.loaded,
            images=progress.images,
            half_loaded=migration.half_loaded,
        )

    def _session_record(self) -> records.Session | None:
        session = self._session
        if session is None or session.over:
            return None
        counted = session.statistics()
        version = counted.version
        return records.Session(
            connected=session.connected,
            process=session.process,
            version=None if version is None else f"{version.major}.{version.minor}",
            commands=dict(counted.commands),
            errors=counted.errors,
            bytes_received=counted.bytes_received,
            bytes_sent=counted.bytes_sent,
        )

    def _memory_record(self) -> records.Memory | None:
        access = None if self._operator is None else self._operator.guest_access
        if access is None:
            return None
        mapped, remote, ranges = 0, 0, access.mappings()
        for one in ranges:
            mapped += one.size * one.file
            remote += one.size * (not one.file)
        return records.Memory(len(ranges), mapped, remote)

    # --- migration -----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def migration(
        self, caller: Caller, *, keep: bool = False
    ) -> AsyncIterator[MemberMigration]:
        """The migration, for one call of `caller`."""
        migratable = self._with_migration()
        with self._translated():
            async with migratable.in_hand(Holder.CONTROL) as migration:
                if migratable.holder is Holder.CONTROL:
                    self._check_mine(self._migrates, caller, "migrates it")
                else:
                    self._migrates = caller
                if keep:
                    self._migrates = None
                yield migration

    async def release(self, caller: Caller) -> None:
        """End the migration and the log that `caller` may end, and let the device run."""
        migratable = self._with_migration()
        if migratable.holder is Holder.CONTROL:
            self._check_mine(self._migrates, caller, "migrates it")
            with self._translated():
                await migratable.give_up()
        if migratable.log_holder is Holder.CONTROL:
            self._check_mine(self._logs, caller, "logs its writes")
            migratable.stop_logging(Holder.CONTROL)

    async def caller_is_gone(self, caller: Caller) -> None:
        """End what `caller` has begun and not given to anybody."""
        migratable = self._migratable
        if migratable is None:
            return
        if migratable.log_holder is Holder.CONTROL and self._logs is caller:
            migratable.stop_logging(Holder.CONTROL)
        if migratable.holder is Holder.CONTROL and self._migrates is caller:
            _log.warning(
                "%s: whoever had it in %s by the control interface has gone; it is let run again",
                self.name,
                migratable.migration.state.name,
            )
            await migratable.give_up()

    # --- dirty log -----------------------------------------------------------------------------

    def dirty_log(self, caller: Caller) -> DmaLogging:
        """The log that control has started."""
        migratable = self._with_migration("dirty_log")
        with self._translated():
            log = migratable.logging_in_hand(Holder.CONTROL)
            if migratable.log_holder is Holder.CONTROL:
                self._check_mine(self._logs, caller, "logs its writes")
        return log

    def start_log(
        self, caller: Caller, ranges: Sequence[records.Range], *, keep: bool = False
    ) -> None:
        migratable = self._with_migration("dirty_log")
        self.dirty_log(caller)
        with self._translated():
            migratable.start_logging(
                Holder.CONTROL,
                LoggingStart(PAGE_SIZE, tuple((one.iova, one.size) for one in ranges)),
            )
        self._logs = None if keep else caller

    def report_log(self, caller: Caller, report: LoggingReport) -> bytes:
        """The bitmap of what was written since the last report of it."""
        log = self.dirty_log(caller)
        with self._translated():
            return log.report_logging(report)

    def stop_log(self, caller: Caller) -> None:
        self.dirty_log(caller)
        self._with_migration("dirty_log").stop_logging(Holder.CONTROL)

    # --- memory, and the rest ------------------------------------------------------------------

    def guest_pages(self) -> GuestPages:
        access = self._with_operator("memory").guest_access
        if access is None:
            raise VarlinkError(f"{CONTROL.name}.NoClient", {"device": self.name})
        return access

    async def read_memory(self, ranges: Sequence[records.Range]) -> bytes:
        """What is in them, one after the other."""
        pages = self.guest_pages()
        with self._translated():
            return b"".join([await pages.read(one.iova, one.size) for one in ranges])

    async def write_memory(self, ranges: Sequence[records.Range], data: memoryview) -> None:
        """Write `data`, which is as long as all of them."""
        pages = self.guest_pages()
        position = 0
        with self._translated():
            for one in ranges:
                await pages.write(one.iova, data[position : position + one.size])
                position += one.size

    def replay(self) -> None:
        operator = self._with_operator("replay")
        if self._migratable is not None and self._migratable.migration.stopped:
            raise self._busy("it does not run; resume it first")
        with self._translated():
            operator.replay()

    def announce(self) -> None:
        self._with_operator("announce").announce()

    # --- what is missing, and whose it is ------------------------------------------------------

    def _with_migration(self, ability: str = "migration") -> MigratableDevice:
        migratable = self._migratable
        if migratable is None or (ability == "dirty_log" and not migratable.can_log):
            raise self._not_supported(ability)
        return migratable

    def _with_operator(self, ability: str) -> Operator:
        if self._operator is None or ability not in self._operator.offers:
            raise self._not_supported(ability)
        return self._operator

    def _not_supported(self, ability: str) -> VarlinkError:
        return VarlinkError(
            f"{CONTROL.name}.NotSupported",
            {"device": self.name, "ability": ability, "why": _WHY_NOT[ability]},
        )

    def _busy(self, why: str) -> VarlinkError:
        return VarlinkError(f"{CONTROL.name}.Busy", {"device": self.name, "why": why})

    def _check_mine(self, whose: Caller | None, caller: Caller, what: str) -> None:
        if whose is not None and whose is not caller:
            raise self._busy(f"another connection of the control interface {what}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """The device's errors as the interface's."""
        try:
            yield
        except ClientError as error:
            if error.errno == errno.EBUSY:
                raise self._busy(str(error.args[0])) from error
            raise self._refused(error.errno, str(error.args[0])) from error
        except DriverError as error:
            raise self._refused(errno.EFAULT, str(error)) from error
        except RemoteError as error:
            raise self._refused(error.errno, str(error)) from error
        except ConnectionLost as error:
            raise self._refused(errno.ENOTCONN, str(error)) from error

    def _refused(self, number: int, why: str) -> VarlinkError:
        return VarlinkError(
            f"{CONTROL.name}.Refused", {"device": self.name, "errno": number, "why": why}
        )


def _layers(device: Device) -> Iterator[Device]:
    while True:
        yield device
        if not isinstance(device, Layer):
            return
        device = device.inner

"""The VFIO migration of one member, as administration commands on its owner.

The client asks for states and moves bytes; the owner knows objects, parts and a mode.  Each single
arc of the state machine is one row of `_STEPS`: what it does to the member.  It is what Linux's
vfio-virtio driver does in the kernel (behaviour of 6.13 and newer), with these differences: an
image that grew while it was asked for is asked for again; a stream that ends early, or brought no
image, fails the way out of RESUMING; an object that may still exist is not forgotten.

Entering a saving state makes an object and an image, PRE_COPY may refresh it, and the last image is
made of the stopped device.  Entering RESUMING makes an object, and each image is set as it
completes, so that the target is warm by the time the last one comes.

What device parts cannot carry travels behind the last image in a record of ours
(`private_record`), if the device gives access to it (`PrivateStateHolder`).

A step that fails leaves the state that was reached last; the client can ask for it, and go back
from it.  Only where a step cannot be undone either is the state ERROR, which a reset ends.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError, HostError
from vfio_user_virtio.migration.admin_client import UNANSWERED, AdminError
from vfio_user_virtio.migration.precopy import PrecopyInfo, SavingSession
from vfio_user_virtio.migration.private_record import (
    PRIVATE_TAG,
    PrivateState,
    decode_private_untrusted,
    encode_private,
    lost_on_linux,
)
from vfio_user_virtio.migration.states import (
    ERROR,
    EVERYTHING,
    PRE_COPY,
    PRE_COPY_P2P,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SAVING,
    STOP,
    STOP_COPY,
    path,
)
from vfio_user_virtio.migration.stream import (
    RecordHeader,
    StreamDecoder,
    encode_private_record,
    encode_record_header,
)
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin_commands import (
    COUNT_SIZE,
    MetadataKind,
    ObjectKind,
    decode_count_untrusted,
)
from vfio_user_virtio.virtio.parts import image_untrusted, strip_kernel_junk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractContextManager

    from vfio_user_virtio.migration.parts_owner import PartsOwner
    from vfio_user_virtio.migration.states import Arc
    from vfio_user_virtio.migration.stream import Record
    from vfio_user_virtio.protocol.header import Buffer
    from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState

_log: Final = logging.getLogger(__name__)


@attrs.frozen
class Progress:
    """Bytes of the stream that can be read, that have been, and that were loaded; and how many
    whole images were."""

    to_read: int = 0
    read: int = 0
    loaded: int = 0
    images: int = 0


class PrivateStateHolder(Protocol):
    """A device whose state beside the parts can be had and given back."""

    def private_state(self) -> PrivateState: ...

    def set_private_state_untrusted(self, private: PrivateState) -> None:
        """Take effect when the member is resumed.  Raises ClientError if it does not fit."""
        ...


class MemberMigration:
    """The migration of `member` (its VF number) of `owner`; `name` is for the log.

    `clock` gives seconds.  `resumed` is called when the member runs with what was loaded, for a
    device that does not see to its queues and interrupts then.  Calls come one at a time.  All of
    them raise ClientError; when the owner fails, with the errno that the failure stands for.
    """

    def __init__(
        self,
        owner: PartsOwner,
        member: int,
        *,
        name: str,
        clock: Callable[[], float],
        options: MigrationFlags = EVERYTHING,
        private: PrivateStateHolder | None = None,
        resumed: Callable[[], None] | None = None,
        max_record_size: int = limits.MAX_MIGRATION_RECORD,
    ) -> None:
        self.state = RUNNING
        self.options = options
        self._owner = owner
        self._member = member
        self._name = name
        self._clock = clock
        self._private = private
        self._resumed = resumed
        self._max_record_size = max_record_size
        self._stopped = False
        self._object: int | None = None
        self._saving: SavingSession | None = None
        self._loading: StreamDecoder | None = None
        self.half_loaded = False
        """Something of a stream waits at the member, and takes effect when it is let run."""

    # --- what the client asks ------------------------------------------------------------------

    def request(self) -> AbstractContextManager[None]:
        """What is called inside belongs to one request, for which the client does not wait long."""
        return self._owner.client.request(self._member)

    async def set_state(self, wanted: int) -> None:
        """Go to state `wanted`, by way of others if need be."""
        for arc in path(self.state, wanted, self.options):
            try:
                await _STEPS[arc](self)
            except (AdminError, HostError, ClientError) as error:
                raise ClientError(
                    _errno_of(error),
                    f"{self._name}: {arc[0].name} to {arc[1].name}: {error}; "
                    f"the state is {self.state.name}",
                ) from error
            _log.info("%s: %s", self._name, arc[1].name)
            self.state = arc[1]

    def read(self, count: int) -> bytes | memoryview:
        """Up to `count` bytes of the stream; fewer mean that no more is there now."""
        if self.state not in SAVING or self._saving is None:
            raise self._wrong_state("read from", SAVING)
        return self._saving.read(count)

    async def write(self, data: Buffer) -> None:
        """The next bytes of the stream; every image that they complete is set at once."""
        if self.state is not RESUMING or self._loading is None:
            raise self._wrong_state("written to", {RESUMING})
        for record in self._loading.feed_untrusted(data):
            try:
                await self._load(record)
            except (AdminError, HostError) as error:
                raise ClientError(_errno_of(error), f"{self._name}: {error}") from error
            except MemoryError:
                size = len(record.payload)
                raise ClientError(
                    errno.ENOMEM, f"{self._name}: no memory to set an image of {size} bytes"
                ) from None

    async def precopy_info(self) -> PrecopyInfo:
        """How much there is to read, by the kernel's accounting; may queue a new image."""
        saving = self._saving
        if self.state not in (PRE_COPY, PRE_COPY_P2P) or saving is None:
            raise self._wrong_state("asked for precopy info", {PRE_COPY, PRE_COPY_P2P})
        try:
            fresh = 0
            if saving.limiter.allow(self._clock()):
                assert self._object is not None
                fresh = await self._image_size(self._object)
            info = saving.info(fresh)
            if saving.needs_refresh(fresh):
                image = await self._image()
                saving.queue(encode_record_header(RecordHeader(len(image))), image)
        except (AdminError, HostError) as error:
            raise ClientError(_errno_of(error), f"{self._name}: {error}") from error
        return info

    @property
    def stopped(self) -> bool:
        """Whether the member was told to stop."""
        return self._stopped

    @property
    def progress(self) -> Progress:
        """How far the stream that is being saved, or loaded, has come."""
        if self._saving is not None:
            return Progress(to_read=self._saving.backlog, read=self._saving.position)
        if self._loading is not None:
            return Progress(loaded=self._loading.taken, images=self._loading.images)
        return Progress()

    async def data_size(self) -> int:
        """How many bytes the final image is likely to have (feature MIG_DATA_SIZE)."""
        try:
            if self._saving is not None and self._object is not None:
                return await self._image_size(self._object)
            object_id = await self._owner.create(self._member, ObjectKind.GET)
            try:
                return await self._image_size(object_id)
            finally:
                await self._give_back(object_id)
        except (AdminError, HostError) as error:
            raise ClientError(_errno_of(error), f"{self._name}: {error}") from error

    # --- what happens to the device ------------------------------------------------------------

    async def device_was_reset(self) -> None:
        """The client has reset the device: whatever was going on is over, and it runs."""
        await self._abandon()
        if self.state is not RUNNING:
            _log.info("%s: RUNNING, by a reset", self._name)
        self.state = RUNNING

    async def function_was_reset(self) -> None:
        """The guest has reset the function, of which the client knows nothing: the state stays.

        A function that is reset runs, so one that was stopped is stopped again.
        """
        if self._stopped and not await self._try(
            self._stop(), "stopping it again after a reset by the guest"
        ):
            self.state = ERROR

    async def client_is_gone(self) -> None:
        """The session is over: end its migration, and let the device run.

        One that is `half_loaded` is to be reset first: it would run as another.  Where the owner
        does not let it run, the next client finds ERROR, and has to reset the device.
        """
        self.state = RUNNING if await self._abandon() else ERROR

    async def _abandon(self) -> bool:
        """End what is going on; whether the device runs, as far as the owner has a say in it."""
        self._saving = None
        self._loading = None
        self.half_loaded = False
        await self._destroy()
        runs = True
        if self._stopped or self.state is not RUNNING:
            runs = await self._try(self._let_run(), "letting it run again")
        self._stopped = False
        return runs

    async def _let_run(self) -> None:
        await self._owner.client.execute(commands.mode_set(self._member, stopped=False))

    async def _try(self, step: Awaitable[None], what: str) -> bool:
        try:
            await step
        except (AdminError, HostError) as error:
            _log.warning("%s: %s failed: %s", self._name, what, error)
            return False
        return True

    # --- steps ---------------------------------------------------------------------------------

    async def _nothing(self) -> None:
        """Between these two states the device does the same."""

    async def _stop(self) -> None:
        await self._set_mode(stopped=True)

    async def _resume(self) -> None:
        await self._set_mode(stopped=False)
        loaded, self.half_loaded = self.half_loaded, False
        if loaded and self._resumed is not None:
            try:
                self._resumed()
            except ClientError as error:  # it runs, and may need no waking
                _log.warning("%s: waking it up failed: %s", self._name, error)

    async def _set_mode(self, *, stopped: bool) -> None:
        """Stop the member or let it run; if that fails, it is as it was.

        A command that was not answered may have been carried out, so it is taken back.  Where that
        fails too, nobody knows whether the member runs: ERROR.
        """
        before, self._stopped = self._stopped, True  # a call that is cancelled may have stopped it
        try:
            await self._owner.client.execute(commands.mode_set(self._member, stopped=stopped))
        except (AdminError, HostError) as error:
            if isinstance(error, AdminError) and error.errno in UNANSWERED:
                try:
                    await self._owner.client.execute(
                        commands.mode_set(self._member, stopped=not stopped)
                    )
                except (AdminError, HostError):
                    self.state = ERROR
            self._stopped = before
            raise
        self._stopped = stopped

    async def _begin_saving(self) -> None:
        await self._create(ObjectKind.GET)
        try:
            record = await self._record()
        except (AdminError, HostError, ClientError):
            await self._destroy()
            raise
        self._saving = SavingSession()
        self._saving.queue(*record)

    async def _add_final_image(self) -> None:
        assert self._saving is not None
        self._saving.queue(*await self._record())

    async def _stop_and_add_final_image(self) -> None:
        await self._stop()
        try:
            await self._add_final_image()
        except (AdminError, HostError, ClientError):
            try:
                await self._resume()
            except (AdminError, HostError):
                self.state = ERROR
            raise

    async def _end_saving(self) -> None:
        self._saving = None
        await self._destroy()

    async def _begin_resuming(self) -> None:
        await self._create(ObjectKind.SET)
        self._loading = StreamDecoder(max_record_size=self._max_record_size)

    async def _end_resuming(self) -> None:
        assert self._loading is not None
        self._loading.finish_untrusted()
        self._loading = None
        await self._destroy()

    # --- objects and images --------------------------------------------------------------------

    async def _create(self, kind: ObjectKind) -> None:
        self._object = await self._owner.create(self._member, kind)

    async def _destroy(self) -> None:
        object_id, self._object = self._object, None
        if object_id is not None:
            await self._give_back(object_id)

    async def _give_back(self, object_id: int) -> None:
        """Destroy an object.  One that cannot be destroyed is the owner's to remember."""
        await self._try(
            self._owner.destroy(self._member, object_id), f"destroying object {object_id}"
        )

    async def _image_size(self, object_id: int) -> int:
        command = commands.metadata_get(self._member, object_id, MetadataKind.SIZE)
        size = decode_count_untrusted(await self._owner.client.execute(command, COUNT_SIZE))
        if not 0 < size <= self._max_record_size:
            raise AdminError(
                errno.EINVAL,
                f"the owner says that an image has {size} bytes; "
                f"it must be 1 to {self._max_record_size}",
            )
        return size

    async def _image(self) -> memoryview:
        """All parts, without the padding behind them."""
        assert self._object is not None
        command = commands.parts_get(self._member, self._object)
        for attempt in range(limits.IMAGE_ATTEMPTS):
            try:
                size = await self._image_size(self._object)
                blob = await self._owner.client.execute(command, _padded(size))
                return image_untrusted(blob)
            except (AdminError, ClientError) as error:
                grown = isinstance(error, ClientError) or error.errno == errno.ENOMEM
                if not grown or attempt + 1 == limits.IMAGE_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _record(self) -> tuple[Buffer, ...]:
        """An image as the stream has it; of a stopped device, with what parts cannot carry."""
        image = await self._image()
        header = encode_record_header(RecordHeader(len(image)))
        if not self._stopped or self._private is None:
            return header, image
        private = self._private.private_state()
        _log.info(
            "%s: a target that is not of this project goes without %s",
            self._name,
            ", ".join(lost_on_linux(private)),
        )
        return header, image, encode_private_record(encode_private(private))

    async def _load(self, record: Record) -> None:
        self.half_loaded = True
        if record.tag == PRIVATE_TAG:
            state, notes = decode_private_untrusted(record.payload)
            for note in notes:
                _log.warning("%s: %s", self._name, note)
            if self._private is not None:
                self._private.set_private_state_untrusted(state)
            return
        image, had_junk = strip_kernel_junk(record.payload)
        if had_junk:
            _log.warning(
                "%s: the source is Linux 6.13.0 to 6.15.2: 8 bytes behind the image dropped",
                self._name,
            )
        parts = image_untrusted(image)
        assert self._object is not None
        await self._owner.client.execute(commands.parts_set(self._member, self._object, parts))

    def _wrong_state(
        self, what: str, states: frozenset[MigrationState] | set[MigrationState]
    ) -> ClientError:
        allowed = " or ".join(state.name for state in sorted(states))
        return ClientError(
            errno.EINVAL, f"{self._name}: {what} in {self.state.name}; it can be in {allowed}"
        )


_STEPS: Final[Mapping[Arc, Callable[[MemberMigration], Awaitable[None]]]] = {
    (RUNNING, RUNNING_P2P): MemberMigration._stop,
    (RUNNING_P2P, RUNNING): MemberMigration._resume,
    (RUNNING_P2P, STOP): MemberMigration._nothing,
    (STOP, RUNNING_P2P): MemberMigration._nothing,
    (RUNNING, STOP): MemberMigration._stop,
    (STOP, RUNNING): MemberMigration._resume,
    (RUNNING, PRE_COPY): MemberMigration._begin_saving,
    (RUNNING_P2P, PRE_COPY_P2P): MemberMigration._begin_saving,
    (STOP, STOP_COPY): MemberMigration._begin_saving,
    (PRE_COPY, PRE_COPY_P2P): MemberMigration._stop,
    (PRE_COPY_P2P, PRE_COPY): MemberMigration._resume,
    (PRE_COPY_P2P, STOP_COPY): MemberMigration._add_final_image,
    (PRE_COPY, STOP_COPY): MemberMigration._stop_and_add_final_image,
    (PRE_COPY, RUNNING): MemberMigration._end_saving,
    (PRE_COPY_P2P, RUNNING_P2P): MemberMigration._end_saving,
    (STOP_COPY, STOP): MemberMigration._end_saving,
    (STOP, RESUMING): MemberMigration._begin_resuming,
    (RESUMING, STOP): MemberMigration._end_resuming,
}
"""What each single arc does; `states.ARCS` says with which options it is one."""


def _padded(size: int) -> int:
    return (size + 7) & ~7


def _errno_of(error: AdminError | HostError | ClientError) -> int:
    return errno.ENODEV if isinstance(error, HostError) else error.errno

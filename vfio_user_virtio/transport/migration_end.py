"""One end of a migration: a device behind a client, asked for states and data; errors name it.

A server refuses with an errno and no more, and a client knows only that a connection ended.  What
goes wrong here says which end it was, and at what.  `state` is kept because whoever migrates must
know, after any failure, which of two devices runs.

Source: vfio-user, Device Migration; linux/vfio.h, enum vfio_device_mig_state.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

from vfio_user_virtio.device import FeatureOperation, VfioIrq
from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import (
    DEVICE_STATE_SIZE,
    FEATURE_U64,
    MigrationFlags,
    MigrationState,
    decode_device_state_reply_untrusted,
    decode_migration_flags_untrusted,
    encode_device_state,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vfio_user_virtio.protocol.header import Buffer
    from vfio_user_virtio.transport.client import Client

_T = TypeVar("_T")

ANSWER_SECONDS: Final = 10.0
"""How long a server may take for one request, unless told otherwise."""

_NOT_THERE: Final = frozenset({errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""Refusals that mean that there is no such feature or command."""


@attrs.define
class MigrationEnd:
    """The device behind `client`, which errors call the `side`: source or target.

    `state`: the migration state that the device is in, None if it is not known.  `asked`: it was
    told to leave RUNNING.  All methods raise RemoteError and ConnectionLost.
    """

    client: Client
    side: str
    answer_seconds: float = ANSWER_SECONDS
    state: MigrationState | None = MigrationState.RUNNING
    asked: bool = False

    @property
    def piece_size(self) -> int:
        """Bytes of data in one request."""
        return self.client.version.capabilities.max_data_xfer_size

    async def options(self) -> MigrationFlags:
        """What the device offers.  Raises HostError if it cannot migrate, or does so already."""
        get = FeatureOperation.GET
        try:
            data = await self._ask(
                "GET MIGRATION",
                self.client.feature(Feature.MIGRATION, get, room=FEATURE_U64.size),
            )
        except RemoteError as error:
            if error.errno not in _NOT_THERE:
                raise
            raise HostError(
                f"the {self.side} does not offer migration; its log may say why",
                exit_code=os.EX_UNAVAILABLE,
            ) from None
        options = decode_migration_flags_untrusted(data)
        if MigrationFlags.STOP_COPY not in options:
            raise HostError(
                f"the {self.side} offers migration without STOP_COPY ({options:#x}), "
                "which every device that can migrate has",
                exit_code=os.EX_UNAVAILABLE,
            )
        data = await self._ask(
            "GET MIG_DEVICE_STATE",
            self.client.feature(Feature.MIG_DEVICE_STATE, get, room=DEVICE_STATE_SIZE),
        )
        state = decode_device_state_reply_untrusted(data)
        if state is not MigrationState.RUNNING:
            raise HostError(
                f"the {self.side} is in state {state.name}, not RUNNING; reset it first",
                exit_code=os.EX_UNAVAILABLE,
            )
        return options

    async def num_vectors(self) -> int | None:
        """How many MSI-X vectors it has; None if that cannot be told."""
        try:
            info = await self._ask("DEVICE_GET_IRQ_INFO", self.client.irq_info(VfioIrq.MSIX))
        except RemoteError as error:
            if error.errno not in _NOT_THERE:
                raise
            return None
        return info.count

    async def set_state(self, state: MigrationState) -> None:
        self.asked = True
        self.state = None
        await self._ask(
            f"the change to {state.name}",
            self.client.feature(
                Feature.MIG_DEVICE_STATE, FeatureOperation.SET, encode_device_state(state)
            ),
        )
        self.state = state

    async def read(self, size: int) -> bytes | memoryview:
        """The next bytes of the stream; less than `size` of them if there are no more just now."""
        return await self._ask("MIG_DATA_READ", self.client.migration_read(size))

    async def write(self, data: Buffer) -> None:
        """The next bytes of the stream, `piece_size` at most."""
        write = self.client.migration_write(data)
        await self._ask(f"MIG_DATA_WRITE of {len(data)} bytes", write)

    async def look_for_more(self) -> None:
        """Ask how much there is, which is what makes our server, and Linux, save anew."""
        try:
            await self._ask("MIG_GET_PRECOPY_INFO", self.client.precopy_info())
        except RemoteError as error:
            if error.errno not in _NOT_THERE:
                raise

    async def reset(self) -> None:
        await self._ask("DEVICE_RESET", self.client.reset())
        self.state = MigrationState.RUNNING

    async def _ask(self, what: str, request: Awaitable[_T]) -> _T:
        """The answer to a request; errors say which server and what."""
        try:
            with trio.fail_after(self.answer_seconds):
                return await request
        except trio.TooSlowError:
            raise ConnectionLost(
                f"the {self.side} did not answer {what} within {self.answer_seconds:g} s"
            ) from None
        except ConnectionLost as error:
            raise ConnectionLost(f"the {self.side}, at {what}: {error}") from error
        except RemoteError as error:
            raise RemoteError(
                error.errno,
                f"the {self.side} refuses {what}, and its log may say why",
            ) from error

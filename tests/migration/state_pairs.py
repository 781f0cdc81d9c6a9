"""Every pair of migration states, asked of a member wherever it lives."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

import pytest

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.states import PRE_COPY, RESUMING, RUNNING, path, supported_states

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vfio_user_virtio.migration.member_migration import MemberMigration
    from vfio_user_virtio.migration.states import Options


class Subject(Protocol):
    """A member in RUNNING, of an owner that holds no object."""

    migration: MemberMigration

    def check(self, *, stopped: bool) -> None:
        """It is stopped, or it is not."""
        ...

    async def check_idle(self) -> None:
        """No object is left, here and at the owner."""
        ...


async def check_every_pair(
    options: Options, stream: bytes, subject: Callable[[], Awaitable[Subject]]
) -> None:
    """Every (state, request): there and back to RUNNING, with no object left.

    `stream`: of a member like those of `subject`.
    """
    for start in sorted(supported_states(options)):
        for goal in range(10):
            made = await subject()
            migration = made.migration
            await migration.set_state(start)
            if start is RESUMING:
                await migration.write(stream)
            try:
                path(start, goal, options)
            except ClientError:
                with pytest.raises(ClientError) as caught:
                    await migration.set_state(goal)
                assert caught.value.errno == errno.EINVAL
                assert migration.state is start
            else:
                await migration.set_state(goal)
                assert migration.state == goal
            made.check(stopped=migration.state not in (RUNNING, PRE_COPY))
            await migration.device_was_reset()
            assert migration.state is RUNNING
            made.check(stopped=False)
            await made.check_idle()

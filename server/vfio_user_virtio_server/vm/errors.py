"""What goes wrong with a QEMU or with moving its guest, as one family for the command line."""

from __future__ import annotations

import os

from vfio_user_virtio.errors import HostError


class QemuError(HostError):
    """QEMU refused something, answered what cannot be read, or is gone."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=os.EX_IOERR)


class Gone(HostError):
    """The connection to `who` has ended: so has its process, or somebody has ended it."""

    def __init__(self, who: str, how: str) -> None:
        HostError.__init__(self, f"{who} {how}", exit_code=os.EX_IOERR)
        self.who = who


class QemuGone(Gone, QemuError):
    """A QEMU is gone, or does not speak as one."""


class ServerGone(Gone):
    """A server is gone, or does not speak as one."""


class NotMovable(HostError):
    """The guest would arrive broken; nothing was touched."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems), exit_code=os.EX_CONFIG)
        self.problems = problems

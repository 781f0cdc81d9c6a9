"""The error families: each says who is at fault and what is to be done about it.

There is no common base class, because no handler wants them all: a session answers a
`ClientError`, a device turns a `DriverError` into DEVICE_NEEDS_RESET, the command line prints a
`HostError` or a `ConfigError` and exits.  A message names what failed, the value, the limit or
expectation, and the remedy.
"""

from __future__ import annotations

import errno as errno_module
import os


class ClientError(Exception):
    """The client asked for something it may not have; the session answers with `errno`.

    The connection stays usable: the offending message was complete and has been consumed.
    """

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.args[0]} ({errno_module.errorcode.get(self.errno, self.errno)})"


class ConnectionLost(Exception):
    """The client broke the framing or a rule that leaves no safe answer; the session closes.

    Also raised to whoever waits for a reply of a peer that has gone.  `reply_errno`, if not 0, is
    sent as the answer to the message at hand before the connection closes.
    """

    def __init__(self, message: str, *, reply_errno: int = 0) -> None:
        super().__init__(message)
        self.reply_errno = reply_errno


class RemoteError(Exception):
    """The peer answered one of our commands with an error reply."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno

    def __str__(self) -> str:
        reason = os.strerror(self.errno) if self.errno else "no reason given"
        return f"{self.args[0]}: {reason}"


class DriverError(Exception):
    """The guest's driver broke a rule of virtio; the device sets DEVICE_NEEDS_RESET."""


class HostError(Exception):
    """The host refuses or lacks something; the user, not the client or guest, can mend it.

    `exit_code` is a value of ``sysexits.h`` (``os.EX_…``) for the command line.
    """

    def __init__(self, message: str, *, exit_code: int = os.EX_OSERR) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(Exception):
    """A configuration file or option is wrong; the command line exits with ``EX_CONFIG``."""

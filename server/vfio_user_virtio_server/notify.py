"""Tell the service manager how we are: READY, STATUS, STOPPING.

The protocol of sd_notify(3) is one datagram of ``KEY=value`` lines to the socket in
``$NOTIFY_SOCKET``, promised to be stable; so it is written here instead of binding libsystemd.
Telling is never worth failing for: without a manager, or when it does not listen, nothing happens.
"""

from __future__ import annotations

import logging
import os
import socket

_log = logging.getLogger(__name__)


class ServiceManager:
    """Where notifications go.  Made once; takes ``NOTIFY_SOCKET`` out of the environment."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address: str | None = None
        self._status = ""
        if address.startswith("/"):
            self._address = address
        elif address.startswith("@"):
            self._address = "\0" + address[1:]
        elif address:
            _log.warning("NOTIFY_SOCKET=%s is neither a path nor abstract; not notifying", address)

    def ready(self) -> None:
        """Start-up is complete: every socket listens."""
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; sent only when it differs from the last."""
        if text != self._status:
            self._status = text
            self._send("STATUS=" + text.replace("\n", " "))

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode(), self._address)
        except OSError as error:
            _log.warning("cannot notify the service manager: %s; going on without", error)
            self._address = None

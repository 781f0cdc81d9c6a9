"""An uplink through passt: the host's network without any privilege.

We start passt with one end of a socket pair (`--fd`) and are a stream uplink on the other; it ends
when that socket closes, and we end it when we do.  It needs no TAP device, no namespace and no
root.  What it prints on stderr goes to our log.  passt that ends at once has a problem that the
user must mend, so that is a HostError; one that ends later is started again.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.uplinks.stream import StreamUplink
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.backends.software.switch import Switch

_log = logging.getLogger(__name__)

_STARTED_SECONDS: Final = 1.0
_END_SECONDS: Final = 0.5
_MAX_LINE: Final = 4_096


class PasstUplink(StreamUplink):
    """An uplink through a passt of our own.  Raises HostError if there is no `program`.

    `options` are added to its command line, for example ``("--tcp-ports", "2222:22")``.
    """

    def __init__(
        self, switch: Switch, *, program: str = "passt", options: Sequence[str] = ()
    ) -> None:
        super().__init__(switch, "passt")
        found = shutil.which(program)
        if found is None:
            raise HostError(
                f"{program} is not there, or cannot be run; install passt, or name its path",
                exit_code=os.EX_UNAVAILABLE,
            )
        self._program = found
        self._options = tuple(options)
        self._last_line = ""

    async def run(self) -> None:
        """Move frames until cancelled.  Raises HostError if passt does not stay."""
        pause = limits.MIN_RECONNECT_SECONDS
        ever_stayed = False
        while True:
            started = trio.current_time()
            status = await self._run_once()
            lived = trio.current_time() - started
            words = f"passt ended with status {status}"
            if self._last_line:
                words += f", saying: {self._last_line}"
            if not ever_stayed and lived < _STARTED_SECONDS:
                raise HostError(
                    f"{words}; try its command line by hand: {self._program} --foreground "
                    + " ".join(self._options),
                    exit_code=os.EX_UNAVAILABLE,
                )
            ever_stayed = True
            if lived > limits.MAX_RECONNECT_SECONDS:
                pause = limits.MIN_RECONNECT_SECONDS
            _log.warning("uplink passt is down: %s; starting it again", words)
            await trio.sleep(pause)
            pause = min(2 * pause, limits.MAX_RECONNECT_SECONDS)

    async def _run_once(self) -> int:
        """Run passt until it ends; its exit status."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            ours.setblocking(False)
            with theirs:
                try:
                    process = await trio.lowlevel.open_process(
                        self._command(theirs.fileno()),
                        pass_fds=(theirs.fileno(),),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                    )
                except OSError as error:
                    raise HostError(
                        f"cannot start {self._program}: {error.strerror}",
                        exit_code=os.EX_UNAVAILABLE,
                    ) from error
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._log_lines, process)
                    await self.serve(ours.fileno())
            finally:
                ours.close()
                await _end(process)
        assert process.returncode is not None
        return process.returncode

    def _command(self, fd: int) -> list[str]:
        return [self._program, "--fd", str(fd), "--foreground", "--quiet", *self._options]

    async def _log_lines(self, process: trio.Process) -> None:
        """Log each line of stderr; ends when passt does."""
        assert process.stderr is not None
        rest = b""
        async for data in process.stderr:
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-_MAX_LINE:]
            for line in lines:
                self._last_line = line[:_MAX_LINE].decode(errors="backslashreplace").strip()
                _log.warning("passt: %s", self._last_line)


async def _end(process: trio.Process) -> None:
    """Wait for a process whose socket is closed; help if it does not end by itself."""
    with trio.CancelScope(shield=True):
        for next_step in (process.terminate, process.kill):
            with trio.move_on_after(_END_SECONDS):
                await process.wait()
                return
            next_step()
        await process.wait()

"""The demo tells what happened, and its exit code is the truth."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.examples.example_process import environment, processes_of, start_example
from tests.testbed.netns import Netns, unshare_options

if TYPE_CHECKING:
    from tests.testbed.bed import Bed

DEMO: Final = "examples/demo.py"


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


@pytest.fixture
def demo_bed(bed: Bed, namespaces: None) -> Bed:
    return bed


@pytest.mark.e2e
@pytest.mark.slow
def test_packets_flow(demo_bed: Bed, tmp_path: Path) -> None:
    demo = start_example(DEMO, environ=environment(tmp_path))
    output, _ = demo.communicate()
    assert demo.returncode == 0, output
    unwrapped = re.sub(r"\n {18}", " ", output)
    for part in (
        r"server +ready: serving devices: 1, owners: 1",
        r"server +device: client connected",
        r"qemu +takes vfio-user 0\.0",
        r"qemu +DMA_MAP 512 MiB at 0x0, read and write",
        r"qemu +finds MSI-X with 4 vectors",
        r"qemu +the guest's driver switches MSI-X on",
        r"guest +PCI function 1af4:1041 is bound to virtio_net",
        r"guest +negotiated .*\bHOST_TSO4, .*\bVERSION_1\b",
        r"guest +eth0 has address 52:54:00:12:34:56 and 10\.0\.0\.2/24; link up",
        r"host +has learnt that 10\.0\.0\.2 is at 52:54:00:12:34:56",
        r"device: session over: the client closed the connection",
        r"\nguest → host: 5 sent, 5 answered \(.*\); seen at tap0: 5 requests, 5 replies\n",
        r"\nhost → guest: 5 sent, 5 answered \(.*\); seen at tap0: 5 requests, 5 replies\n",
        r"\nPackets flow both ways\.\n$",
    ):
        assert re.search(part, unwrapped), f"{part} is not in\n{output}"
    for way in ("10.0.0.2 → 10.0.0.1", "10.0.0.1 → 10.0.0.2"):
        assert output.count(f"{way}  echo") == 5
    assert "\x1b" not in output
    assert list(tmp_path.iterdir()) == []
    assert processes_of(demo.pid) == []


@pytest.mark.e2e
@pytest.mark.slow
def test_says_that_packets_do_not_flow(demo_bed: Bed, tmp_path: Path) -> None:
    """The host gives its address up once the link is up.

    Nobody is killed: QEMU 11.1.3 may abort when its server dies, and would end the demo otherwise.
    """
    demo = start_example(DEMO, environ=environment(tmp_path))
    assert demo.stdout is not None
    output = ""
    with demo.stdout as lines:
        for line in lines:
            output += line
            if "link up" in line:
                (server,) = [
                    pid
                    for pid in children(demo.pid)
                    if b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
                ]
                netns = Netns(demo_bed, server, user="--user" in unshare_options())
                flush = netns.command("ip", "address", "flush", "dev", "tap0")
                subprocess.run(flush, check=True)
    assert demo.wait() == 1, output
    # the first echo may be quicker than that
    assert re.search(r"Failed: guest → host: 5 sent, [0-4] answered", output), output
    assert "Packets flow" not in output
    (folder,) = tmp_path.iterdir()
    assert f"The logs of the server, QEMU and the guest are in {folder}" in output
    assert {"server.log", "guest"} <= {path.name for path in folder.iterdir()}
    assert processes_of(demo.pid) == []


@pytest.mark.e2e
@pytest.mark.slow
def test_is_interrupted(demo_bed: Bed, tmp_path: Path) -> None:
    """Ctrl-C on a terminal, which goes to all processes in the foreground."""
    ours, theirs = pty.openpty()
    take_terminal = "import fcntl, termios, runpy, sys; fcntl.ioctl(1, termios.TIOCSCTTY, 0); "
    run_demo = f"runpy.run_path('{DEMO}', run_name='__main__')"
    with open(ours, "r+b", buffering=0) as terminal:
        demo = subprocess.Popen(
            [sys.executable, "-c", take_terminal + run_demo],
            env=environment(tmp_path, TERM="xterm", NO_COLOR=""),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        output = b""
        interrupted = False
        while True:
            try:
                data = terminal.read(4096)
            except OSError:  # EIO: nobody has the terminal open any more
                break
            output += data
            if not interrupted and b"starts the guest" in output:
                terminal.write(b"\x03")
                interrupted = True
    assert demo.wait() == 130, output.decode()
    assert b"all that was started has ended" in output
    assert b"\x1b[36mserver" in output
    assert list(tmp_path.iterdir()) == []
    assert processes_of(demo.pid) == []


def test_says_what_is_missing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    demo = start_example(DEMO, environ=environment(tmp_path, XDG_CACHE_HOME=str(cache)))
    output, _ = demo.communicate()
    assert demo.returncode == 1, output
    assert re.search(r"Failed: no test bed in .*; `make setup` provides it\n$", output), output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
@pytest.mark.slow
def test_goes_on_when_nobody_reads(demo_bed: Bed, tmp_path: Path) -> None:
    """`make demo | head -1`, on a terminal that knows only ASCII."""
    demo = start_example(DEMO, environ=environment(tmp_path, PYTHONIOENCODING="ascii"))
    assert demo.stdout is not None
    demo.stdout.readline()
    demo.stdout.close()
    assert demo.wait() == 0
    assert list(tmp_path.iterdir()) == []
    assert processes_of(demo.pid) == []

"""An inner host: a guest with real kernel VFIO in which the project's own Python code runs.

There is neither an IOMMU nor a physical VF on the machines that run these tests, but an emulated
machine can have both.  Its kernel, VFIO, IOMMU driver and SR-IOV are the real ones; the code under
test cannot tell.  Python and the project are in its initial RAM file system (`inner_python`), under
the same paths as outside.  With our own kernel the cache folder (QEMU, kernels) is there too, by
9p and read only, so that a guest can run inside.  Imports over 9p from this host's root were tried
and rejected: pytest took 33 s to start instead of 9 s.

In a test::

    async with boot_inner_host(bed, InnerMachine(), tmp_path) as host:
        await host.enable_vfs()                        # and bind them to vfio-pci
        print(await host.python("-c", "print('hello from inside')"))
        cases = await host.pytest("tests/inner/test_inner_bed.py")
        await host.ports[1].send(frame)                # VF 1's cable; 0 is the PF's

By hand, from the project's folder (`make setup inner-kernel` once)::

    python -m tests.testbed.inner_host --program -c 'import os; print(os.listdir("/dev/vfio"))'
    python -m tests.testbed.inner_host --iommu virtio --pytest tests/inner -k cdev
    python -m tests.testbed.inner_host --kernel debian --shell 'dmesg | grep -i iommu'
    python -m tests.testbed.inner_host --vfs 0 --socket vf.sock --shell 'ls /sys/bus/pci/devices'

What it prints at the end is the program's output; its exit status is the program's.  The folder
given by `--folder` keeps the console's log.

Commands go by the agent of `guest`, so that one channel serves both kernels.  Tests inside report
by JUnit XML, so that each is told by its name outside.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from tests.testbed import inner_python
from tests.testbed.bed import Bed, TestbedMissing, cache_root
from tests.testbed.guest import Guest, GuestFailed, boot
from tests.testbed.inner_kernel import InnerKernelMissing
from tests.testbed.inner_machine import CACHE_TAG, InnerIommu, InnerMachine, Kernel
from tests.testbed.inner_ports import FramePort
from tests.testbed.inner_results import read_cases
from vfio_user_virtio.testing.loopback import ungrouped_nursery

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from tests.testbed.guest import Result
    from tests.testbed.inner_results import Case

PROJECT: Final = inner_python.PROJECT
FACTS: Final = "INNER_HOST"
"""Environment variable in which tests inside find, as JSON, what they run on."""

MOUNT_DEVICES: Final = """
set -e
mkdir -p /dev/pts /dev/shm
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
"""
MOUNT_CACHE: Final = f"""
mkdir -p {{0}}
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose {CACHE_TAG} {{0}}
"""

PYTEST: Final = (
    *("-m", "pytest", "-c", "pyproject.toml"),
    *("--confcutdir=tests/inner", "-p", "no:cacheprovider"),
)
RESULTS: Final = "/run/results.xml"
LOG_CHARACTERS: Final = 4000
"""How much of the end of each log a failed run by hand shows."""

ENDED: Final = (0, 1)
"""pytest's exit status when tests ran: all passed, or some failed."""


class InnerHost:
    """A running inner host; `boot_inner_host` makes one.

    `guest` is its shell, busybox; `ports` are the cables of the
    SR-IOV device's functions, the PF's first.
    """

    def __init__(self, machine: InnerMachine, guest: Guest, ports: Sequence[FramePort]) -> None:
        self.machine = machine
        self.guest = guest
        self.ports = ports

    async def execute(
        self, *argv: str, seconds: float = 60, env: Mapping[str, str] | None = None
    ) -> Result:
        """Runs a program in the project's folder; its output is text, standard error included.

        It is killed after `seconds`.
        """
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/run",
            "XDG_CACHE_HOME": str(cache_root().parent),
            "TMPDIR": "/run",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": "server:.",
            "PYTHONDONTWRITEBYTECODE": "1",
            FACTS: json.dumps(self.facts()),
            **(env or {}),
        }
        settings = " ".join(f"{name}={shlex.quote(text)}" for name, text in environment.items())
        inside = f"cd {shlex.quote(str(PROJECT))} && {settings} exec {shlex.join(argv)}"
        return await self.guest.execute(inside, seconds)

    async def python(
        self, *argv: str, seconds: float = 60, env: Mapping[str, str] | None = None
    ) -> str:
        """What `python ARGV` printed; raises `GuestFailed` with it if it fails."""
        result = await self.execute(sys.executable, *argv, seconds=seconds, env=env)
        if result.code:
            raise GuestFailed(
                f"`python {shlex.join(argv)}` failed inside with {result.code}:\n{result.output}"
            )
        return result.output

    async def pytest(
        self, *argv: str, seconds: float = 120, env: Mapping[str, str] | None = None
    ) -> list[Case]:
        """Every test that `pytest ARGV` ran inside; raises `GuestFailed` if it ran none."""
        command = (*PYTEST, "-q", "--tb=short", f"--junitxml={RESULTS}", *argv)
        result = await self.execute(sys.executable, *command, seconds=seconds, env=env)
        if result.code not in ENDED:
            raise GuestFailed(
                f"`pytest {shlex.join(argv)}` ended inside with {result.code}:\n{result.output}"
            )
        return read_cases(await self.guest.run(f"cat {RESULTS}"))

    async def bind(self, address: str, driver: str = "vfio-pci") -> None:
        """Binds a PCI function to `driver`, away from what it is bound to."""
        device = f"/sys/bus/pci/devices/{address}"
        await self.guest.run(
            f"set -e; echo {driver} >{device}/driver_override\n"
            f"[ ! -e {device}/driver ] || echo {address} >{device}/driver/unbind\n"
            f"echo {address} >/sys/bus/pci/drivers_probe\n"
            f'[ "$(basename "$(readlink {device}/driver)")" = {driver} ]'
        )

    async def enable_vfs(self, driver: str | None = "vfio-pci") -> None:
        """All VFs of the SR-IOV device come to be, bound to `driver` or to none."""
        device = f"/sys/bus/pci/devices/{self.machine.pf}"
        await self.guest.run(
            f"set -e; echo 0 >{device}/sriov_drivers_autoprobe\n"
            f"echo {self.machine.vfs} >{device}/sriov_numvfs\n"
            f"echo 1 >{device}/sriov_drivers_autoprobe"
        )
        for address in self.machine.vf_addresses if driver else ():
            await self.bind(address, driver or "")

    @asynccontextmanager
    async def vfs_cabled(self) -> AsyncIterator[None]:
        """A cable from VF 1 to VF 2, from 3 to 4 …: what one sends comes out of QEMU and goes into
        the other, until the block ends."""
        async with ungrouped_nursery() as nursery:
            for first, second in zip(self.ports[1::2], self.ports[2::2], strict=False):
                nursery.start_soon(_carry, first, second)
                nursery.start_soon(_carry, second, first)
            yield
            nursery.cancel_scope.cancel()

    def facts(self) -> dict[str, object]:
        """What tests inside are told of their host."""
        machine = self.machine
        return {
            "kernel": machine.kernel.value,
            "iommu": machine.iommu.value,
            "ways": machine.ways,
            "pf": machine.pf if machine.vfs else None,
            "vfs": machine.vf_addresses,
            "functions": machine.function_addresses,
        }


async def _carry(source: FramePort, target: FramePort) -> None:
    while True:
        frame = await source.receive()
        with suppress(OSError):  # its QEMU has gone, or has no room: frames get lost
            await target.send(frame)


def write_archive(folder: Path) -> Path:
    """Makes the host's folder, and in it what its initial file system gets beside its own."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "python.cpio"
    inner_python.write(archive)
    return archive


@asynccontextmanager
async def boot_inner_host(
    bed: Bed, machine: InnerMachine, folder: Path
) -> AsyncIterator[InnerHost]:
    """An inner host whose Python can run; `folder` is its own and gets the logs.

    Raises `GuestFailed`, `InnerKernelMissing`.
    """
    own = machine.kernel is Kernel.OWN
    archive = write_archive(folder)
    async with AsyncExitStack() as stack:
        ports = [
            FramePort(folder, number) for number in range(machine.vfs + 1 if machine.vfs else 0)
        ]
        for port in ports:
            stack.callback(port.close)
            await port.open()
        outer = machine.machine(bed, folder, (archive,))
        guest = await stack.enter_async_context(boot(bed, outer, folder))
        await guest.run(MOUNT_DEVICES)
        if own:
            await guest.run(MOUNT_CACHE.format(shlex.quote(str(cache_root()))))
        elif machine.iommu in (InnerIommu.VIRTIO, InnerIommu.AMD):
            # busybox's insmod takes no module's options from the kernel's command line
            option = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
            await guest.run(f"echo 1 >{option}")
        yield InnerHost(machine, guest, ports)


async def run_by_hand(options: argparse.Namespace, folder: Path) -> int:
    """Boots what the command line says and runs what it says; the program's exit status."""
    machine = InnerMachine(
        kernel=Kernel(options.kernel),
        iommu=InnerIommu(options.iommu),
        vfs=options.vfs,
        sockets=tuple(options.socket),
        memory_mib=options.memory,
        cpus=options.cpus,
        append=options.append,
    )
    started = time.monotonic()
    async with boot_inner_host(Bed.find(), machine, folder) as host:
        if machine.vfs:
            await host.enable_vfs(None if options.bind == "none" else options.bind)
        for address in machine.function_addresses if options.bind != "none" else ():
            await host.bind(address, options.bind)
        print(
            f"up after {time.monotonic() - started:.1f} s: {json.dumps(host.facts())}", flush=True
        )
        async with host.vfs_cabled():
            if options.shell is not None:
                result = await host.guest.execute(options.shell, options.seconds)
            elif options.pytest is not None:
                argv = (sys.executable, *PYTEST, *options.pytest)
                result = await host.execute(*argv, seconds=options.seconds)
            else:
                result = await host.execute(
                    sys.executable, *(options.program or ("-V",)), seconds=options.seconds
                )
        print(result.output, end="")
        print(f"exit status {result.code} after {time.monotonic() - started:.1f} s")
        return result.code


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.testbed.inner_host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", choices=[kernel.value for kernel in Kernel], default="own")
    parser.add_argument("--iommu", choices=[iommu.value for iommu in InnerIommu], default="intel")
    parser.add_argument("--vfs", type=int, default=2, help="of QEMU's SR-IOV device; 0: none")
    parser.add_argument("--socket", type=Path, action="append", default=[], help="vfio-user server")
    parser.add_argument("--bind", default="vfio-pci", help="driver of all functions, or none")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--append", default="", help="more of the kernel's command line")
    parser.add_argument("--seconds", type=float, default=300, help="limit of what runs inside")
    parser.add_argument("--folder", type=Path, help="keeps the logs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shell", help="a script for the guest's busybox")
    what.add_argument("--pytest", nargs=argparse.REMAINDER, help="pytest's arguments, to the end")
    what.add_argument("--program", nargs=argparse.REMAINDER, help="Python's arguments, to the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="inner-host-") as temporary:
        folder: Path = options.folder or Path(temporary)
        try:
            return trio.run(run_by_hand, options, folder)
        except (GuestFailed, InnerKernelMissing, TestbedMissing) as error:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-LOG_CHARACTERS:]}")
            print(f"error: {error}")
            return 1


if __name__ == "__main__":
    sys.exit(main())

"""What a guest is made of, as plain data, and the QEMU command line that it means.

The machine is q35 with nothing by default: no disk, no display, two serial ports (console and
agent) and QMP.  The kernel is started by its PVH note, or by a firmware from its bzImage.  `tcg`
is the only accelerator: a test is to do the same on every machine.
"""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

CONSOLE_LOG: Final = "console.log"


class Boot(enum.Enum):
    PVH = "pvh"
    SEABIOS = "seabios"
    OVMF = "ovmf"


class Iommu(enum.Enum):
    """The device's options; `iommu_platform` is up to the devices behind it."""

    INTEL = "intel-iommu,intremap=on,caching-mode=on"
    VIRTIO = "virtio-iommu-pci,addr=0x1e"


def vfio_user_pci(
    socket: Path, *, slot: int = 1, ident: str = "vf", timeout_ms: int = 60_000, **more: object
) -> list[str]:
    """A vfio-user device behind a root port of its own, on `slot` (1 to 31) of the chassis.

    `timeout_ms` is QEMU's wait for a reply (`x-msg-timeout`); `more` are further properties.
    """
    device = {
        "driver": "vfio-user-pci",
        "id": ident,
        "bus": f"port{slot}",
        "socket": {"type": "unix", "path": str(socket)},
        "x-msg-timeout": timeout_ms,
        **more,
    }
    port = f"pcie-root-port,id=port{slot},slot={slot},chassis={slot}"
    return ["-device", port, "-device", json.dumps(device)]


@attrs.frozen(kw_only=True)
class Machine:
    """One guest's configuration.

    `devices` are further QEMU arguments; `modules` load in this order, with what they depend on;
    `programs` are the bed's programs that the guest gets; `append` is added to the kernel's
    command line.  A guest that is not `restartable` ends when it would reboot.

    `kernel` is an ELF file that starts instead of the bed's kernel by its PVH note, `archives` are
    cpio files that are unpacked over the guest's initial file system.
    """

    devices: tuple[str, ...] = ()
    boot: Boot = Boot.PVH
    memory_mib: int = 512
    shared_memory: bool = True
    cpus: int = 1
    iommu: Iommu | None = None
    modules: tuple[str, ...] = ("virtio_net",)
    programs: tuple[str, ...] = ()
    append: str = ""
    restartable: bool = False
    kernel: Path | None = None
    archives: tuple[Path, ...] = ()

    @property
    def all_modules(self) -> tuple[str, ...]:
        """The IOMMU's driver comes first, so that no device is set up without it."""
        first = ("virtio_iommu",) if self.iommu is Iommu.VIRTIO else ()
        return first + self.modules

    def argv(self, bed: Bed, folder: Path, initrd: Path, agent_fd: int, qmp_fd: int) -> list[str]:
        """The whole command; `folder` gets the console's log and the firmware's variables."""
        argv = [
            *bed.qemu(),
            "-no-user-config",
            "-nodefaults",
            *("-display", "none"),
            *("-accel", "tcg,thread=multi"),
            *("-cpu", "max"),
            *("-smp", str(self.cpus)),
            *("-chardev", f"file,id=console,path={folder / CONSOLE_LOG}"),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,fd={agent_fd}"),
            *("-serial", "chardev:agent"),
            *("-chardev", f"socket,id=qmp,fd={qmp_fd}"),
            *("-object", "monitor-qmp,id=monitor,chardev=qmp"),
            *("-kernel", str(self._kernel(bed))),
            *("-initrd", str(initrd)),
            *("-append", " ".join(self._kernel_arguments())),
        ]
        if not self.restartable:
            argv.append("-no-reboot")
        if self.shared_memory:
            ram = f"memory-backend-memfd,id=ram,size={self.memory_mib}M,share=on"
            argv += ["-machine", "q35,memory-backend=ram", "-object", ram]
        else:
            argv += ["-machine", "q35", "-m", f"{self.memory_mib}M"]
        if self.boot is Boot.OVMF:
            code, template = bed.ovmf
            variables = folder / "ovmf-variables.fd"
            variables.write_bytes(template.read_bytes())
            for path, readonly in ((code, "on"), (variables, "off")):
                argv += ["-drive", f"if=pflash,format=raw,readonly={readonly},file={path}"]
        if self.iommu:
            argv += ["-device", self.iommu.value]
        return [*argv, *self.devices]

    def _kernel(self, bed: Bed) -> Path:
        if self.kernel:
            return self.kernel
        return bed.vmlinux if self.boot is Boot.PVH else bed.bzimage

    def _kernel_arguments(self) -> list[str]:
        arguments = ["console=ttyS0", "quiet", "mitigations=off", "tsc=reliable", "panic=-1"]
        # emulated on a busy host, the timer's interrupt can be late for the kernel's check
        arguments.append("no_timer_check")
        if self.iommu is Iommu.INTEL:
            arguments.append("intel_iommu=on")
        return [*arguments, *self.append.split()]

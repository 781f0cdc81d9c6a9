"""Would this guest arrive whole?  Everything that can be known before anything is touched.

Each check is a row of `CHECKS`: a function of both QEMUs' facts that yields what is wrong.  All of
them run, so that a user mends everything at once.  What QEMU itself finds at once and says well (a
device more or less, another machine type) is said here too, as here it costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio_server.vm.qemu import DRIVER, NEEDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_user_virtio_server.vm.control import ServedDevice
    from vfio_user_virtio_server.vm.qemu import Facts

OLDEST: Final = (10, 1)
"""The first QEMU with vfio-user-pci."""

HARMFUL: Final = {
    "postcopy-ram": "the guest would run before its memory is there, which the device needs",
    "x-colo": "the guest would run at both ends",
    "background-snapshot": "the guest would not be moved",
    "x-ignore-shared": "the memory would not be copied",
    "mapped-ram": "the stream would be a file",
}
"""Migration capabilities with which the device's guest cannot arrive whole."""

LACKING: Final = {
    "migration": (
        "a physical VF has it if the same server owns its PF (serve --pf, the PF on vfio-pci and "
        "with an administration virtqueue), another if it is not its client that migrates it"
    ),
    "dirty_log": "pages that it writes would be missing at the target",
}
"""What each ability that is needed takes, or is for."""


def compare(source: Facts, target: Facts, devices: Sequence[str]) -> list[str]:
    """What is wrong, in words; nothing if the guest can be moved with `devices`."""
    problems = [problem for check in CHECKS for problem in check(source, target)]
    for name in devices:
        problems += _device(source, target, name)
    return problems


def compare_served(source: ServedDevice, target: ServedDevice) -> Iterator[str]:
    """What keeps one device from going to the other server."""
    for where, device in (("source", source), ("target", target)):
        called = f"device {device.name} of the {where}'s server"
        if not device.connected:
            yield f"{called} has no client: is QEMU connected to another server?"
        for name in device.missing:
            yield f"{called} does not offer {name}: {LACKING[name]}"
        if device.busy:
            yield f"{called} is in use: {device.busy}"
        if device.state != "RUNNING":
            yield f"{called} is in migration state {device.state}; it has to be RUNNING"


def _versions(source: Facts, target: Facts) -> Iterator[str]:
    for where, facts in (("source", source), ("target", target)):
        if facts.version[:2] < OLDEST:
            yield f"the {where} is QEMU {_dotted(facts.version)}; 10.1 is the first that will do"
    if target.version[:2] < source.version[:2]:
        yield (
            f"the target is QEMU {_dotted(target.version)}, older than the source, "
            f"{_dotted(source.version)}"
        )


def _machines(source: Facts, target: Facts) -> Iterator[str]:
    if source.machine != target.machine:
        yield (
            f"the machine is {source.machine} at the source and {target.machine} at the target; "
            "name the same versioned one at both"
        )
    if source.cpus != target.cpus:
        yield f"processors: {_counted(source.cpus)} at the source, {_counted(target.cpus)} there"


def _states(source: Facts, target: Facts) -> Iterator[str]:
    if source.status != "running":
        yield (
            f"the source's guest is {source.status}; it has to be running "
            "(--take-back, if a migrate-vm that was killed has left it so)"
        )
    if source.migration not in ("none", "completed", "failed", "cancelled"):
        yield f"the source is being migrated already ({source.migration})"
    for reason in source.blockers:
        yield f"the source cannot be migrated: {reason}"
    if target.status != "inmigrate" or target.migration != "none":
        yield (
            f"the target is {target.status}, with a migration that is {target.migration}; "
            "start it with -S -incoming defer"
        )


def _memory(source: Facts, target: Facts) -> Iterator[str]:
    for where, facts in (("source", source), ("target", target)):
        for name, (_, shared) in facts.memory.items():
            if not shared:
                yield (
                    f"memory {name} of the {where} is not shared, so its server sees none of what "
                    "the guest writes; use memory-backend-memfd,share=on"
                )
    sizes = [sorted(size for size, _ in facts.memory.values()) for facts in (source, target)]
    if sizes[0] != sizes[1]:
        yield f"memory: {sizes[0]} bytes at the source, {sizes[1]} at the target"


def _capabilities(source: Facts, target: Facts) -> Iterator[str]:
    for where, facts in (("source", source), ("target", target)):
        for name in sorted(facts.capabilities & HARMFUL.keys()):
            yield f"turn the migration capability {name} of the {where} off: {HARMFUL[name]}"
    for name in NEEDED:
        if name not in source.offered & target.offered:
            yield f"one of the QEMUs lacks the migration capability {name}"
    for name in sorted((source.capabilities ^ target.capabilities) - HARMFUL.keys() - {*NEEDED}):
        yield f"the migration capability {name} is on at one end only"


def _peripherals(source: Facts, target: Facts) -> Iterator[str]:
    named = [
        {name: kind for name, kind in facts.peripherals.items() if not name.startswith("device[")}
        for facts in (source, target)
    ]
    for name in sorted(named[0].keys() | named[1].keys()):
        here, there = (side.get(name) for side in named)
        if here != there:
            yield f"device {name} is {here or 'not there'} at the source, {there or 'not'} there"
    anonymous = [
        sorted(kind for name, kind in facts.peripherals.items() if name.startswith("device["))
        for facts in (source, target)
    ]
    if anonymous[0] != anonymous[1]:
        yield "the devices without an id are not the same"
    for kind in sorted(set(source.peripherals.values())):
        if "iommu" in kind:
            yield (
                f"the guest has an IOMMU ({kind}): which memory a device has written cannot be "
                "told from addresses that the guest keeps changing"
            )
        if kind.startswith("vfio-") and kind != DRIVER:
            yield f"a {kind} is not moved by this command"


def _device(source: Facts, target: Facts, name: str) -> Iterator[str]:
    here, there = source.devices.get(name), target.devices.get(name)
    for where, device in (("source", here), ("target", there)):
        if device is None:
            yield f"the {where} has no {DRIVER} with id {name}"
    if here is not None and there is not None:
        if here.address != there.address:
            yield f"{name} has the address {here.address} at the source, {there.address} there"
        if here.bus != there.bus:
            yield f"{name} is on {here.bus} at the source, on {there.bus} at the target"


CHECKS: Final[tuple[Callable[[Facts, Facts], Iterator[str]], ...]] = (
    _versions,
    _machines,
    _states,
    _memory,
    _capabilities,
    _peripherals,
)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _counted(cpus: tuple[str, ...]) -> str:
    return ", ".join(f"{cpus.count(kind)} {kind}" for kind in sorted(set(cpus)))

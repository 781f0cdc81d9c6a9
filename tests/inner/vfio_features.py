"""Which device features the kernel's driver has for a PCI function: a program for an inner host.

`vfio_features.py ADDRESS…` opens each function, whichever driver of VFIO it is bound to, and prints
the numbers of the features of VFIO_DEVICE_FEATURE that can be read or written, as JSON.
"""

from __future__ import annotations

import errno
import fcntl
import json
import sys
from typing import Final

from vfio_user_virtio.backends.vfio.opening import open_function
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.backends.vfio.uapi import FEATURE, DeviceIoctl
from vfio_user_virtio.device import FeatureOperation

FEATURES: Final = range(16)


def features(address: str) -> list[int]:
    """Raises HostError where it cannot be opened."""
    opened = open_function(PciAddress.parse(address))
    try:
        return [number for number in FEATURES if _offered(opened.device.fd, number)]
    finally:
        opened.close()


def _offered(fd: int, number: int) -> bool:
    for operation in (FeatureOperation.GET, FeatureOperation.SET):
        flags = number | operation | FeatureOperation.PROBE
        try:
            fcntl.ioctl(fd, DeviceIoctl.FEATURE, FEATURE.pack(FEATURE.size, flags))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        else:
            return True
    return False


if __name__ == "__main__":
    print(json.dumps({address: features(address) for address in sys.argv[1:]}))

"""What tests may import: a guest without a kernel.

`GuestRam` is its memory, `VirtioPci` its PCI transport over a vfio-user client, `DriverQueue` its
side of a virtqueue, and `NetDriver` a virtio-net driver made of the three.
"""

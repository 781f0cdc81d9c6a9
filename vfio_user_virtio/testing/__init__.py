"""What tests may import: a guest without a kernel, and a device served to it without a daemon.

- `loopback.served`: any `Device` behind a real session on a socket pair, and a client of it
- `guest_ram.GuestRam`: sealed memory with an allocator, mapped into the device or served to it
- `driver_queue.DriverQueue` and `Ring`: the driver's side of a split virtqueue, and no rules at all
- `virtio_pci.VirtioPci`: virtio's PCI transport: structures, registers, queues, interrupts, resets
- `net_driver.NetDriver`: a virtio-net driver made of these, with `net_header`, `control_commands`
- `guest_move.MovableGuest`: the machine of such a driver, which is migrated with its memory
  (`movable_ram.MovableRam`) while the driver works
"""

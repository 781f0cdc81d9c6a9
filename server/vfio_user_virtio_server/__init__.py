"""The daemon and the command line of vfio-user-virtio."""

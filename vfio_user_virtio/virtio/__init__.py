"""virtio 1.4, device side, sans-I/O: features, registers, rings, and the network device's rules."""

"""What leads out of the switch: a TAP device, passt, a datagram or a stream socket; or nothing."""

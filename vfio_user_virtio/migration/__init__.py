"""Live migration of a device: the state machine, the stream, the accounting; sans-I/O."""

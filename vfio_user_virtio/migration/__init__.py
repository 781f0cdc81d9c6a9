"""Live migration of a device: the state machine, the stream and the accounting, which are sans-I/O,
and their translation into administration commands, which waits for the owner."""

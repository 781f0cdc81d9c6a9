"""How the examples that boot guests tell what happens: lines, logs, QEMU's trace, the wire."""

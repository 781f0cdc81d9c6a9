"""A running VM between two QEMUs: their monitors, PCI state through them, and the order of it."""

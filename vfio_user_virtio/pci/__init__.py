"""A PCI function as bytes: registers, configuration space, capabilities, MSI-X.  Sans-I/O."""

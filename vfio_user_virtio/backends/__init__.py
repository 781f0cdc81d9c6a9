"""Where a device really lives: `software` here, `vfio`.  No backend knows the wire."""

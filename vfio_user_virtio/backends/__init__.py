"""Where a device really lives: so far, in `software`.  No backend knows the wire."""

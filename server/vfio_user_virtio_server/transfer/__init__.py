"""A device's state, and guest pages, from server to server over any pipe."""

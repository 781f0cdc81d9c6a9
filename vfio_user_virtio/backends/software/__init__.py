"""The software model: an owner, its members, the switch between them, and its uplinks."""

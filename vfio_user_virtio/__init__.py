"""A virtio-net Virtual Function served over vfio-user, on a software model of it.

The packages, in the direction in which they may import each other (a later one may use an
earlier one, never the reverse; ``tests/test_architecture.py`` holds the rule):

``errors``, ``limits``, ``device`` · ``protocol``, ``pci``, ``virtio`` · ``memory``,
``migration`` · ``backends``, ``transport`` · the server.
"""

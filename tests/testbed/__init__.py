"""The test bed: stock QEMU and a Debian kernel in a cache folder, and guests driven by trio tests.

`provision` and `environment` run before the virtual environment exists and so use the standard
library only; everything else may use trio.
"""

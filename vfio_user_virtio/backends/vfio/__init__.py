"""The kernel's VFIO for user space: a physical function, its memory and its interrupts, driven from
here.
"""

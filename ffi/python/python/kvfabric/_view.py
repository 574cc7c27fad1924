"""Views of memory that a region owns."""

import ctypes


def view_of(region, address, length):
    """A writable view of the region's bytes, which keeps the region, and so the memory, alive."""
    array = (ctypes.c_ubyte * length).from_address(address)
    # A memoryview holds the array it was made of, and the array holds the region.
    array.region = region
    return memoryview(array).cast("B")

"""Keeps freed memory in the process on Linux CPUs, where MLX gives every array back to the C library at once.

There MLX has no cache of buffers: each array is a `malloc` and a `free`. The GNU C library maps and unmaps blocks of
more than 128 KB, or trims its heap behind them, so that the kernel clears the same pages again for every operation:
40,000 page faults in a third of a JiT-B/32 forward pass, a tenth of its processor time and more. GPUs and macOS have
caches of their own.
"""

import ctypes
import os
import sys

# parameters of mallopt (malloc.h) and their values: blocks up to 32 MB come from the heap, the largest that mallopt
# takes; half a gigabyte of it may lie free; it grows in steps of 64 MB; all threads share one, as only that one is
# a single piece
_OPTIONS = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 512 << 20), "M_TOP_PAD": (-2, 64 << 20),
            "M_ARENA_MAX": (-8, 1)}  # fmt: skip


def keep_freed_memory() -> bool:
    """Set the C library so; whether it was set. Someone's own MALLOC_... or GLIBC_TUNABLES settings stay as they are.

    Call it before threads exist: those that have a heap of their own by then keep it.
    """
    theirs = any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ)
    if not sys.platform.startswith("linux") or theirs or "MALLOC_ARENA_MAX" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(mallopt(number, value) == 1 for number, value in _OPTIONS.values())

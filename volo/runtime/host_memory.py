"""The host's memory, kept by the process between steps."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether the C library can.

    By default glibc returns blocks above 32 MiB to the system when they are freed. A network on the CPU frees its
    activations in every step and takes them again in the next, and the system fills each page with zeros before it
    hands it out: half of the time of a convolutional teacher. The process then stays as large as it has been at its
    largest. Nothing changes on C libraries without ``mallopt``.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: on Windows, where there is no main program to look in
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))

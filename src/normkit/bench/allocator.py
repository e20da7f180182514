"""The two things about memory that distort a timing on a CPU: fresh pages, and how much of it a step takes.

glibc gives large buffers back to the system as soon as they are freed, so that every call meets its output as pages
that have yet to be mapped: more than half of the time of a large tensor. Pinned, it keeps them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

ALLOCATORS = ("default", "pinned")

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # <malloc.h>


def pin() -> bool:
    """Keep freed memory in this process from now on; whether the C library could do it."""
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    accepted = [mallopt(option, value) == 1 for option, value in settings]
    return all(accepted)


def peak_megabytes(step: Callable[[], object]) -> float | None:
    """How far one step raises the resident memory of the process, in 10^6 bytes; ``None`` where Linux is absent.

    It counts what a kernel takes behind torch's back too. Freed memory goes back to the system first, or the step
    would find it there and raise nothing.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is None:
        return None
    step()
    trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the greatest resident size starts again from the present one
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before) * 1024 / 1e6
    except OSError:
        return None


def available_bytes() -> int | None:
    """Memory that can be taken without swapping; ``None`` where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def _status(key: str) -> int:
    """A line of /proc/self/status, in KiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1])


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # no C library to be found under this name, as on Windows
        return None

"""nk.tune_allocator: keep the memory of large tensors inside the process, instead of returning it after every step."""

from __future__ import annotations

import ctypes
import logging
import platform
import sys

_LOG = logging.getLogger(__name__)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's <malloc.h>
_LARGEST = 2**31 - 1  # mallopt takes an int


def tune_allocator() -> str:
    """Tell glibc to keep freed memory: no mmap for large blocks, no trimming of the heap. Returns what was done.

    By default glibc maps every large tensor afresh and unmaps it when it is freed, so that the operating system clears
    and maps its pages again in every step. On large tensors that costs torch's eager operators about half their time.

    It costs memory: the process keeps its peak, and what is freed is reused but not given back while it runs; blocks of
    very different sizes may leave gaps. It holds for the whole process and for every library in it, and there is no way
    back but a new process; that is why nothing in normkit calls this unasked. The same without code, for a process that
    is about to start: ``MALLOC_MMAP_THRESHOLD_=2147483647 MALLOC_TRIM_THRESHOLD_=2147483647``.

    Raises:
        RuntimeError: the C library is not glibc, or it refuses.

    >>> import normkit as nk
    >>> print(nk.tune_allocator())  # doctest: +SKIP
    glibc keeps freed memory from now on: no mmap below 2 GiB, no trimming

    Do not use it in a service that shares its machine: memory that was once needed stays taken.
    """
    library = platform.libc_ver()[0]
    if sys.platform != "linux" or library != "glibc":
        raise RuntimeError(
            f"tune_allocator: needs glibc on Linux; this is {library or 'another C library'} on {sys.platform}.\n"
            "  other allocators (jemalloc, tcmalloc) have their own settings; nothing was changed"
        )
    mallopt = ctypes.CDLL(None).mallopt
    for name, parameter in (("M_MMAP_THRESHOLD", _MMAP_THRESHOLD), ("M_TRIM_THRESHOLD", _TRIM_THRESHOLD)):
        if not mallopt(ctypes.c_int(parameter), ctypes.c_int(_LARGEST)):
            raise RuntimeError(
                f"tune_allocator: glibc refused {name}={_LARGEST}.\n"
                "  set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment before Python starts"
            )
    done = "glibc keeps freed memory from now on: no mmap below 2 GiB, no trimming"
    _LOG.info(done)
    return done

"""The machine that this process runs on: its processor, its memory, and the distributions installed on it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path


def free_memory() -> int:
    """Return the bytes of memory that processes can allocate without swapping.

    Raises:
        ModuleNotFoundError: psutil, which the extra ``build`` installs, is missing.
    """
    import psutil

    return int(psutil.virtual_memory().available)


def own_peak_memory() -> int:
    """Return the peak resident set of this process, in bytes."""
    # psutil has no peak on Linux. ru_maxrss of a process includes the memory of the process that forked it.
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(peak) * 1024
    return _max_rss("RUSAGE_SELF")


def peak_memory() -> int:
    """Return the larger of the peak resident sets of this process and of any child that it waited for, in bytes."""
    # psutil cannot see a child that has ended.
    return max(own_peak_memory(), _max_rss("RUSAGE_CHILDREN"))


def return_freed_memory() -> None:
    """Return memory that this process has freed to the system; glibc keeps what lies between other allocations."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def cpu_description() -> str:
    """Return the model of the processor and the number of logical cores."""
    # platform.processor() is empty or only the architecture on Linux, and psutil has no name.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the given distributions; those that are not installed are omitted."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _max_rss(who: str) -> int:
    import resource  # POSIX only

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(getattr(resource, who)).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

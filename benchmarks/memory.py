"""Peak resident memory of a stretch of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def begin_peak() -> float:
    """Forget the peak so far and give freed memory back; returns what is resident now, in MiB.

    Without it an earlier peak, or freed memory that the stretch takes up again, would hide what the stretch needs.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_mib("VmRSS")


def peak_mib() -> float:
    """Most that was resident since `begin_peak`, in MiB."""
    return _resident_mib("VmHWM")


def _resident_mib(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) / 1024

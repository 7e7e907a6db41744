"""What the machine gives: bandwidth of its memory, its processor's name, the energy it counts."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from pathlib import Path

_BUFFER_BYTES = 256 << 20  # beyond any cache of a laptop
_RAPL = Path("/sys/class/powercap")
_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_libc.memchr.restype = ctypes.c_void_p


def read_bandwidth(threads: int, repeats: int = 3) -> float:
    """Bytes a second that `threads` threads read from memory: the best of `repeats` searches for an absent byte.

    libc's search reads each byte once and writes none, with the widest loads of the processor.
    """
    buffers = [bytearray(_BUFFER_BYTES) for _ in range(threads)]
    held = [(ctypes.c_char * _BUFFER_BYTES).from_buffer(buffer) for buffer in buffers]
    for buffer in buffers:
        buffer[:] = b"\1" * _BUFFER_BYTES  # memory of its own for every page
    best = 0.0
    for _ in range(repeats):
        started = [threading.Thread(target=_libc.memchr, args=(h, 2, _BUFFER_BYTES)) for h in held]
        began = time.perf_counter()
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        best = max(best, threads * _BUFFER_BYTES / (time.perf_counter() - began))
    return best


def processor() -> str:
    """Its name as the kernel tells it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else "unknown processor"


def energy_counters() -> dict[Path, int]:
    """Microjoules of each processor package so far (RAPL); empty where the machine does not tell."""
    found = {}
    for zone in sorted(_RAPL.glob("intel-rapl:*")):
        if zone.name.count(":") == 1:  # a package; its parts are counted in it
            try:
                found[zone] = int((zone / "energy_uj").read_text())
            except OSError:  # readable for root alone on most machines
                continue
    return found


def joules_since(before: dict[Path, int]) -> float | None:
    """Energy since `before`, of all packages; None where the machine does not tell."""
    now = energy_counters()
    if not before or before.keys() != now.keys():
        return None
    total = 0
    for zone, start in before.items():
        gone = now[zone] - start
        total += gone if gone >= 0 else gone + int((zone / "max_energy_range_uj").read_text())
    return total / 1e6


def resident_bytes() -> int:
    """Resident memory of this process, mapped files included."""
    found = re.search(r"^VmRSS:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024

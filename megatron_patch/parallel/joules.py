"""What this process's GPU draws, by the driver's own counter of energy, which GPUs have since Volta.

NVML's (nvmlDeviceGetTotalEnergyConsumption), through `nvidia-ml-py`, the extra `energy`. Board power: the GPU and its
memory, not the node around them.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_patch.parallel import device


class EnergyCounter:
    """Joules from one reading to the next."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._gpu: Any = None
        if device.HAS_GPU:
            self._nvml, self._gpu = _open()
        self._last = self._read()

    def since_last(self) -> float:
        """Joules since the last call, or since this was made; infinite where nothing can be read."""
        before, self._last = self._last, self._read()
        return self._last - before if math.isfinite(self._last) and math.isfinite(before) else math.inf

    def _read(self) -> float:
        if self._nvml is None:
            return math.inf
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3
        except self._nvml.NVMLError:  # a GPU without the counter, or one that is lost, as training will find out itself
            return math.inf


def _open() -> tuple[Any, Any]:
    """The library and this process's GPU in it; nothing where either is missing."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{device.uuid()}".encode())
    except pynvml.NVMLError:
        return None, None

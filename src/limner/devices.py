"""How much memory a device has, and how much weights take of it."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def bytes_of(module: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def free_of(device: torch.device) -> float:
    """Bytes that this process can still have of a device: of the CPU, as if none were in use."""
    if device.type != "cuda":
        return memory_of(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def memory_of(device: torch.device) -> float:
    """Bytes, free or not: of the GPU, or of this machine or the part of it that this process may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    have = math.inf
    with suppress(ValueError, OSError, AttributeError):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(ValueError, OSError):  # "max", or no such thing here
            have = min(have, int(Path(limit).read_text()))
    return have

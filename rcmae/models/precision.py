"""Whether a device multiplies bf16 in hardware: what `engine.precision=auto` is decided by.

A device without such units computes bf16 all the same, by widening every number: on a CPU a step
takes about ten times as long as in fp32 (two cores of an AMD Zen 3, the quickstart's network).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

CUDA_SINCE = (8, 0)  # the first compute capability whose tensor cores take bf16
# of a CPU: what torch calls it -> its name
INSTRUCTIONS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "amx_tile": "AMX"}


class Bf16(NamedTuple):
    """What a device does with bf16."""

    units: bool  # it multiplies bf16 in hardware
    why: str  # the device and what it has, for people


def bf16_of(device: torch.device) -> Bf16:
    """What this device does with bf16."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        version = ".".join(map(str, capability))
        return Bf16(capability >= CUDA_SINCE, f"{name} has compute capability {version}")
    found = [name for key, name in INSTRUCTIONS.items() if key in cpu_instructions()]
    if found:
        return Bf16(True, f"the CPU has {found[0]}")
    return Bf16(False, "the CPU has neither AVX512-BF16 nor AMX")


@cache
def cpu_instructions() -> frozenset[str]:
    """The sets of instructions among INSTRUCTIONS that this CPU has."""
    # before torch 2.12 it told only some of them, under private names
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        told = capabilities()
        return frozenset(key for key in INSTRUCTIONS if told.get(key))
    asked = {key: getattr(torch.cpu, f"_is_{key}_supported", None) for key in INSTRUCTIONS}
    return frozenset(key for key, ask in asked.items() if ask is not None and ask())

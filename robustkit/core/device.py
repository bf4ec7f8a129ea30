"""A device by its name."""

from __future__ import annotations

from functools import cache

import torch

from robustkit.core.errors import UserError


def device_of(name: str | torch.device) -> torch.device:
    """The device, once it is known to work.

    Raises:
        UserError: this machine, or this build of torch, does not have it.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fault = f"cannot be used: {str(error).splitlines()[0]}"
        raise UserError(fault, place=f"device '{name}'", remedy="e.g. --device cpu") from error
    return device


@cache
def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has none (Apple's)."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and so faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return torch.cpu._is_avx512_bf16_supported()  # torch 2.11

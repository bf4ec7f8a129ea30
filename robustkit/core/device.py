"""A device by its name."""

from __future__ import annotations

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

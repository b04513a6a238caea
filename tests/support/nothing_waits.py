"""A mode that finds what would make the host wait for a device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NothingWaits(TorchDispatchMode):
    """Fails on what makes the host wait for a device, or gives a tensor whose size depends on data."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        devices = {value.device for value in args if isinstance(value, Tensor)}
        devices |= {torch.device(device) for device in [(kwargs or {}).get("device")] if device is not None}
        assert len(devices) <= 1, f"{name} copies between {devices}"
        return func(*args, **(kwargs or {}))

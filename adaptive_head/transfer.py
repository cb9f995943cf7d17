"""From the host to the device, without waiting."""

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device. On the CPU the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_over(array: np.ndarray, tensor: torch.Tensor) -> None:
    """Copy an array into a tensor of its shape, without allocating device memory."""
    source = torch.from_numpy(array)
    is_on_host = tensor.device.type == "cpu"
    tensor.copy_(source if is_on_host else source.pin_memory(), non_blocking=True)

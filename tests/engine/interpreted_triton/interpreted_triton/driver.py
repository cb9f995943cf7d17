from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


def _nothing(*_args, **_kwargs):
    return None


_PROPERTIES = {"max_shared_mem": 65536, "multiprocessor_count": 2, "warpSize": 32}

InterpretedDriver = type(
    "InterpretedDriver",
    (DriverBase,),
    dict.fromkeys(DriverBase.__abstractmethods__, _nothing)
    | {
        "__init__": _nothing,
        "is_active": staticmethod(lambda: True),
        "get_current_target": lambda self: GPUTarget("cpu", 0, 1),
        "get_active_torch_device": lambda self: torch.device("cpu"),
        "get_current_device": lambda self: 0,
        "get_current_stream": lambda self, device=0: 0,
        "utils": SimpleNamespace(get_device_properties=lambda device: _PROPERTIES),
    },
)

"""A temperature for every token, chosen by a small head on the model's last hidden state.

The layer, its file format and its learning-free siblings. Importing this package needs torch,
not vLLM; what runs inside vLLM is in `adaptive_head.vllm`.
"""

from adaptive_head.checkpoint import HeadError, HeadMetadata, LoadedHead, load_head, save_head
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.options import AdaptiveRequest, OptionError, Options, resolve_options
from adaptive_head.selector import Step, TemperatureSelector

__all__ = [
    "AdaptiveHead",
    "AdaptiveRequest",
    "HeadConfig",
    "HeadError",
    "HeadMetadata",
    "LoadedHead",
    "OptionError",
    "Options",
    "Step",
    "TemperatureSelector",
    "load_head",
    "resolve_options",
    "save_head",
]

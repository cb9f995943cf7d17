"""Triton's kernels run as Python in the process of the tests.

Triton decides so when it is first imported, and when a kernel is defined. The processes that tests
start may have a device, and decide for themselves.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: F401

import adaptive_head.vllm.kernels  # noqa: F401

del os.environ["TRITON_INTERPRET"]

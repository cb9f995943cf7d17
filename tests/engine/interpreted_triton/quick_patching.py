"""Importing this makes Triton's interpreter faster: it replaces functions of `triton.language`.

It does so at every launch of a kernel and every call of a function in one, and looks each time
which ones there are. That takes more time than most kernels.
"""

import inspect
from functools import cache

import triton.language as tl
import triton.runtime.interpreter as interpreter


@cache
def _find_builtins(namespace):
    members = inspect.getmembers(namespace)
    return [(name, member) for name, member in members if tl.core.is_builtin(member)]


def _patch_builtins(namespace, builder, scope):
    for name, member in _find_builtins(namespace):
        # Replaced already while a kernel calls a function.
        if getattr(namespace, name) is member:
            interpreter._patch_attr(namespace, name, member, builder, scope)


interpreter._patch_builtin = _patch_builtins

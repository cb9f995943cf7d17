"""Importing this makes Triton's interpreter faster: it replaces functions of `triton.language`.

By itself it replaces them at every launch of a kernel and every call of a function in one, and
takes that back after the launch. That takes more time than most kernels. Here they stay replaced,
since nothing in the process compiles a kernel.
"""

from dataclasses import replace

import triton.runtime.interpreter as interpreter

_patch_lang = interpreter._patch_lang
_find_dtype = interpreter._get_np_dtype
# Modules whose functions see replaced ones, by the identity of their globals.
_patched: set[int] = set()
# NumPy's types, by the names of Triton's.
_dtypes: dict[str, object] = {}


def _patch_once(function):
    module = id(function.__globals__)
    if module not in _patched:
        _patched.add(module)
        _patch_lang(function)
    # Nothing to restore.
    return interpreter._LangPatchScope()


def _get_dtype(dtype):
    if dtype.name not in _dtypes:
        _dtypes[dtype.name] = _find_dtype(dtype)
    return _dtypes[dtype.name]


interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _get_dtype
# Every integer addition and multiplication once more in 64 bits, to see whether it overflows.
builder = interpreter.interpreter_builder
builder.options = replace(builder.options, sanitize_overflow=False)

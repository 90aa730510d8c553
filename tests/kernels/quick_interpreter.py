"""Triton's interpreter without what it does again at each call; imported for that by what runs kernels under it.

What kernels compute stays the same. In a process that interprets, nothing is compiled, so the language may stay patched.
"""

import functools

import numpy as np
from triton.runtime import interpreter

_patch, _numpy_type = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
_patched = set()


def patch_once(fn):
    """For all functions of a module: each launch, and each call of a function by another, walked through the whole language."""
    if id(fn.__globals__) not in _patched:
        _patched.add(id(fn.__globals__))
        _patch(fn)
    return interpreter._LangPatchScope()  # nothing to restore


def numpy_type(dtype):
    """Pointers have no hash."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_type(scalar)


interpreter._patch_lang = patch_once
interpreter._get_np_dtype = numpy_type
# Whether sums and products of integers overflow is computed beside them, and then thrown away unless `debug` is set.
options = interpreter.interpreter_builder.options
if not options.debug:
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

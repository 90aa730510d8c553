"""The kernels of the dialect ops, one family per file. Importing this package does not import triton."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from gdnfuse import compat
from gdnfuse.errors import Refused

if TYPE_CHECKING:
    from gdnfuse.kernels.launch.implementation import Implementation

log = logging.getLogger(__name__)


def implementations() -> dict[str, Implementation]:
    """The kernel of each dialect op that has one, by the name of the op.

    The first call registers ``torch.ops.gdnfuse_triton``.

    Raises:
        Refused: triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise Refused("Triton is required for GPU kernels; it is not installed.")
    from gdnfuse.kernels import (
        add_rms_norm,
        attention_decode,
        attention_few_queries,
        attention_growing,
        causal_attention,
        causal_conv,
        causal_conv_record,
        causal_conv_update,
        chunk_delta_rule,
        delta_rule,
        delta_rule_commit,
        delta_rule_slots,
        delta_rule_verify,
        experts,
        fp8_linear,
        fused_linear,
        gated_rms_norm,
        mixer_decode,
        prompt_attention,
        route,
    )

    found = (
        add_rms_norm.implementation,
        attention_decode.implementation,
        attention_growing.implementation,
        attention_few_queries.implementation,
        causal_attention.implementation,
        causal_conv.implementation,
        causal_conv_record.implementation,
        causal_conv_update.implementation,
        chunk_delta_rule.chunk_delta_rule,
        chunk_delta_rule.fused_gating_chunk_delta_rule,
        delta_rule.fused_gating_delta_rule,
        delta_rule.packed_decode,
        delta_rule_commit.implementation,
        delta_rule_slots.implementation,
        delta_rule_verify.implementation,
        experts.experts,
        experts.routed_experts,
        fp8_linear.implementation,
        fused_linear.fused_linear,
        fused_linear.in_proj_conv,
        fused_linear.split_linear,
        gated_rms_norm.implementation,
        mixer_decode.implementation,
        prompt_attention.implementation,
        route.implementation,
    )
    return {kernel.name: kernel for kernel in found}


def compile_ahead(calls: list[tuple[Implementation, dict[str, Any]]]) -> None:
    """Start to compile, in threads, each kernel that calls with these fake arguments will launch."""
    if torch.cuda.is_available():
        for implementation, arguments in calls:
            _pending.extend(implementation.compile_ahead(arguments, _pool()))


@functools.cache
def read_triton() -> None:
    """Start a thread that makes the key of Triton's caches. For this all of Triton is read, half a gigabyte, once per process.

    Otherwise the first code that needs the key waits for it: Inductor for the key of its own cache, and our threads that compile
    kernels.
    """
    if key := compat.triton_key():
        _pool().submit(key)


def wait() -> None:
    """Wait until everything that `compile_ahead` started is compiled. Errors are raised again at the launch."""
    with suppress(IndexError):  # empty, which another thread may make it at any time
        while _pending:
            if error := _pending.pop().exception():
                log.debug("compiling ahead failed: %s", error)


_pending: list[Future[Any]] = []


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="gdnfuse")


def loaded() -> dict[str, int]:
    """For each of our kernels, how many machine codes this process has compiled or loaded. Empty before any launch."""
    return {name: made for name, kernel in _jitted() if (made := compat.machine_codes(kernel))}


def machine_codes() -> dict[str, dict[str, bytes]]:
    """The files of these machine codes by name, by their keys in Triton's cache."""
    return {key: files for _, kernel in _jitted() for key, files in compat.machine_code_files(kernel).items()}


def _jitted() -> Iterator[tuple[str, Any]]:
    """The kernels in our files, by name, once Triton is imported."""
    ours = [m for name, m in sys.modules.items() if name.startswith("gdnfuse.kernels.")]
    for module in ours if "triton.runtime.jit" in sys.modules else []:
        for name, kernel in vars(module).items():
            if getattr(kernel, "__module__", module.__name__) == module.__name__:
                yield name, kernel

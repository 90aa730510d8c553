"""Keys of torch's compile caches. They are the same in every process for our graphs, and change if inlined code changes.

Without this AOTAutograd keeps none of our graphs on disk. And a process that imports torch in another order than the one before
finds none of Inductor's.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule

from gdnfuse import compat, versions

CACHEABLE = "unsafe_marked_cacheable_functions"  # an option of Inductor: functions that may be in cached graphs, and their keys


def cacheable(gm: GraphModule, patches: dict[str, Any]) -> dict[str, Any]:
    """The option of Inductor that lets AOTAutograd cache a graph with inlined references.

    AOTAutograd does not cache graphs that call functions other than torch's, because its key only has their names. So their
    entries in this option have a digest of all code that a reference may call. The last entry adds what the key of torch 2.11
    lacks: which inputs have a fixed address.

    Args:
        gm: the rewritten graph.
        patches: options of Inductor that the user has set. All are kept.
    """
    known = compat.inductor_options()
    if known is None or CACHEABLE not in known:
        return {}
    targets = {n.target for n in gm.graph.nodes if n.op == "call_function"}
    inlined = [f"{t.__module__}.{t.__name__}" for t in targets if getattr(t, "__module__", "").startswith("gdnfuse.dialect.")]
    ours = dict.fromkeys(sorted(inlined), versions.of_sources("dialect", "formats"))
    placeholders = enumerate(gm.graph.find_nodes(op="placeholder"))
    fixed = [i for i, n in placeholders if "_dynamo_static_input_type" in n.meta.get("tensor_dict", ())]
    theirs = {**known[CACHEABLE], **patches.get(CACHEABLE, {})}
    return {CACHEABLE: {**theirs, **ours, "gdnfuse inputs of fixed address": str(fixed)}}


@contextmanager
def alike() -> Iterator[None]:
    """Make cache keys that do not depend on which module imported torch first.

    Keys are digests of pickles. A memory format is pickled as the name torch.contiguous_format. pickle looks for that name in all
    modules, and finds it in the first one with an attribute torch: the user's own module if it imports torch first.
    """
    before = copyreg.dispatch_table.get(torch.memory_format)
    copyreg.pickle(torch.memory_format, lambda format: str(format).removeprefix("torch."))
    try:
        yield
    finally:
        copyreg.dispatch_table.pop(torch.memory_format, None)
        if before is not None:
            copyreg.pickle(torch.memory_format, before)

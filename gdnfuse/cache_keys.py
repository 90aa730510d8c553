"""Keys of torch's compile caches: the same in every process for our graphs, and another where what they inline has changed.

Without this AOTAutograd keeps none of our graphs on disk, and a process that imports torch in another place than the one before
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

CACHEABLE = (
    "unsafe_marked_cacheable_functions"  # an option of Inductor's: names of functions that caches may know, with their keys
)


def cacheable(gm: GraphModule, patches: dict[str, Any]) -> dict[str, Any]:
    """The option of Inductor's by which AOTAutograd keeps a graph with inlined references.

    It keeps no graph that calls functions other than torch's, because its key has their names only. So their entries here have a
    digest of all that a reference may call. The last entry is what torch 2.11's key lacks: which inputs have a fixed address.

    Args:
        gm: the rewritten graph.
        patches: options of Inductor's that the user has set; nothing of them is lost.
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
    """Keys that are made meanwhile do not depend on who imported torch first.

    They are digests of pickles. A memory format says that its name is torch.contiguous_format, which pickle looks for in all
    modules, and finds in the first that has an attribute torch: the user's own, where that imports torch first.
    """
    before = copyreg.dispatch_table.get(torch.memory_format)
    copyreg.pickle(torch.memory_format, lambda format: str(format).removeprefix("torch."))
    try:
        yield
    finally:
        copyreg.dispatch_table.pop(torch.memory_format, None)
        if before is not None:
            copyreg.pickle(torch.memory_format, before)

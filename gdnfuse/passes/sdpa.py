"""torch's attention in a graph, for all rules that need it: its mask, scale, heads and what is around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gdnfuse.errors import Refused
from gdnfuse.rewrite.evaluate import hint
from gdnfuse.rewrite.graph import chain, op_name, peel, real_users, same, value
from gdnfuse.rewrite.rule import shown

BY_PLACE = ("attn_mask", "dropout_p", "is_causal")  # positional arguments after q, k and v
OPTIONS = {*BY_PLACE, "scale", "enable_gqa"}
# The most elements of keys in a proof. A symbolic length is SMALL in proofs. A graph for one fixed length of a growing cache
# serves only one token, which is not worth a long proof.
PROVED, SMALL = 2**22, 37


@dataclass(frozen=True)
class OneQuery:
    """What rules for attention with one query, or a few, know about it.

    Attributes:
        anchor: torch's attention.
        scale: factor on its scores.
        back: brings the op's [B, T, H·D] to the layout of the match's output.
    """

    anchor: Node
    scale: float
    back: Callable[[Any], Any]


def one_query(graph):
    """Attention with q of [B, heads, 1, D]."""
    for node in graph.nodes:
        if op_name(node) == "scaled_dot_product_attention" and len(node.args) >= 3:
            shape = value(node.args[0]).shape
            if len(shape) == 4 and same(shape[-2], 1):
                yield node


MOST_QUERIES, MOST_ON_A_CACHE = 8, 64


def few_queries(graph):
    """Attention with q of [B, heads, T, D] and T from 1 to 8, for all inputs."""
    for node in graph.nodes:
        if op_name(node) == "scaled_dot_product_attention" and len(node.args) >= 3:
            shape = value(node.args[0]).shape
            if len(shape) == 4 and (same(shape[-2], 1) or isinstance(shape[-2], int) and 1 < shape[-2] <= MOST_QUERIES):
                yield node


def queries_on_a_cache(graph):
    """Attention with more queries, up to 64, on a cache of fixed length that the graph writes new keys and values into."""
    for node in graph.nodes:
        if op_name(node) == "scaled_dot_product_attention" and len(node.args) >= 3:
            shape = value(node.args[0]).shape
            if (
                len(shape) == 4
                and isinstance(shape[-2], int)
                and MOST_QUERIES < shape[-2] <= MOST_ON_A_CACHE
                and on_a_cache(node)
            ):
                yield node


def on_a_cache(node):
    """Whether keys and values of attention are inputs of the graph that it writes new ones into."""
    held = [without_copies(x) for x in node.args[1:3]]
    return all(x.op == "placeholder" and any(op_name(u) == "index_copy_" for u in x.users) for x in held)


def without_copies(node):
    """Keys or values before they are repeated for the query heads that share them."""
    piece = peel(node)
    if op_name(piece) != "expand":
        return node
    return next((n for n in chain(piece.args[0]) if value(n).ndim == 4), piece.args[0])


def options_of(anchor):
    """The arguments of attention other than q, k and v, by name, whether they are positional or keywords."""
    return dict(zip(BY_PLACE, anchor.args[3:], strict=False)) | anchor.kwargs


def mask_of(anchor):
    return options_of(anchor).get("attn_mask")


def scale_of(anchor):
    scale = anchor.kwargs.get("scale")
    return value(anchor.args[0]).shape[-1] ** -0.5 if scale is None else scale


def gated(anchor):
    """The end of a layer's attention: the product with the sigmoid of a gate if there is one, else the last view of the heads."""
    readers = list(real_users(anchor))
    if len(readers) == 1 and op_name(readers[0]) == "mul":
        other = next((x for x in readers[0].all_input_nodes if peel(x) is not anchor), None)
        if other is not None and op_name(peel(other)) == "sigmoid" and same(value(other).numel(), value(anchor).numel()):
            return readers[0], peel(other).args[0]
    return anchor, None


def back_to(out, T, H, D):
    """How to bring the op's [B, T, H·D] to the layout of a node."""
    if value(out).ndim != 4:
        return lambda y: y
    if same(value(out).shape[1], T) and op_name(out) != "scaled_dot_product_attention":
        return lambda y: y.reshape(-1, T, H, D)
    return lambda y: y.reshape(-1, T, H, D).transpose(1, 2)


def require_plain(anchor, m):
    """Refuse attention with anything but a bool mask of [B or 1, 1, T, L], a scale and groups of queries."""
    require_options(anchor)
    if options_of(anchor).get("is_causal", False):
        raise Refused(
            "Attention of few queries must not have is_causal, which aligns the first query with the first key, found it set.",
            at=anchor,
        )
    if "mask" not in m.inputs:
        return
    (B, _, T, _), L, mask = value(anchor.args[0]).shape, value(anchor.args[1]).shape[-2], value(m.inputs["mask"])
    if mask.dtype != torch.bool or not any(_shaped(mask.shape, (n, 1, T, L), 3) for n in (B, 1)):
        found = f"{shown(mask.shape)} of {mask.dtype}"
        raise Refused(f"The mask must be {shown((B, 1, T, L))} or {shown((1, 1, T, L))} of bool, found {found}.", at=anchor)


def require_options(anchor):
    """Refuse options that are not torch's, dropout, and a scale that is not a number."""
    if unknown := options_of(anchor).keys() - OPTIONS:
        raise Refused(f"Attention must have no options but {', '.join(sorted(OPTIONS))}, found {', '.join(unknown)}.", at=anchor)
    require_numbers(anchor)


def require_numbers(anchor):
    """Refuse dropout, and a scale that is not a number."""
    options = options_of(anchor)
    if (dropout := options.get("dropout_p", 0.0)) != 0.0:
        raise Refused(f"Attention must have no dropout, found {dropout}.", at=anchor)
    if isinstance(scale := options.get("scale"), Node):
        raise Refused(f"The scale must be a number, found {scale}.", at=anchor)


def require_heads(anchor, m):
    """Refuse keys and values that are not [B, HKV, L, D] with H a multiple of HKV."""
    keys = value(m.inputs["keys"])
    B, H, _, D = value(anchor.args[0]).shape
    HKV = keys.shape[1] if keys.ndim == 4 else "HKV"
    for name in ("keys", "values"):
        wanted, found = (B, HKV, keys.shape[-2], D), value(m.inputs[name]).shape
        if not _shaped(found, wanted, 2):
            raise Refused(f"{name} must have the shape {shown(wanted)}, found {shown(found)}.", at=anchor)
    if not all(isinstance(n, int) for n in (H, HKV, D)) or H % HKV:
        raise Refused(f"Heads must be numbers, H a multiple of HKV, found H = {H}, HKV = {HKV} and D = {D}.", at=anchor)


def require_provable(anchor, m, most=None):
    """Refuse keys that are too long for a proof."""
    B, HKV, L, D = value(m.inputs["keys"]).shape
    L = L if isinstance(L, int) or m.small is None else m.small
    size, most = math.prod(map(hint, (B, HKV, L, D))), most or PROVED
    if size > most:
        raise Refused(f"The keys must have at most {most} elements to be proved, found {size}.", at=anchor)


def require_dtype_of_q(m, *names):
    """Refuse an operand or a result with another dtype than q."""
    dtype = value(m.inputs["q"]).dtype
    results = zip(("The result", "The keys", "The values"), m.outputs, strict=False)
    for name, node in [*((n, m.inputs[n]) for n in names if n in m.inputs), *results]:
        if (found := value(node).dtype) != dtype:
            raise Refused(f"{name} must have the dtype of q, {dtype}, found {found}.", at=node)


def _shaped(found, wanted, axis):
    """Whether two shapes are equal. On one axis, the length, different symbols are accepted: attention fails if they differ."""
    return len(found) == len(wanted) and all(
        same(a, b) or i == axis and not isinstance(a, int) and not isinstance(b, int) and hint(a) == hint(b)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True))
    )


SEEN_EVERY = 4  # positions


def random_mask(shape, generator):
    """A mask that hides about three of eight positions, but not those where a token may be written.

    A wrong hidden token would not be noticed.
    """
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[..., ::SEEN_EVERY] = True
    return mask


def attention_of(node: Node) -> tuple[dict[str, Any], str]:
    """The arguments of causal_attention for torch's attention, and a sentence on why it is not causal_attention.

    torch's flag aligns the first query with the first key.
    """
    (q, k, v), options = node.args[:3], options_of(node)
    T, L = (value(x).shape[-2] for x in (q, k))
    found = [
        "a mask" if options.get("attn_mask") is not None else "",
        "dropout" if options.get("dropout_p", 0.0) != 0.0 else "",
        "" if options.get("is_causal", False) is True else "that it is not causal",
        "" if same(T, L) else f"{T} queries and {L} keys",
    ]
    wanted = "Attention must be causal, of as many queries as keys, without a mask and dropout"
    reason = f"{wanted}, found {', '.join(filter(None, found))}." if any(found) else ""
    return {"q": q, "k": k, "v": v, "scale": options.get("scale")}, reason

"""flash: a prompt's attention without a mask becomes FlashAttention-2 (Dao 2023, arXiv:2307.08691) where torch takes cuDNN's.

cuDNN plans for the length of a prompt, and plans anew for every length that it has not met; FlashAttention-2 needs no plan.
Chosen on an H200 with heads of 256, by a script that was not kept: benchmarks/prefill.py times prompts of new and known lengths,
but its committed figures are older. Heads of up to 128 columns, for which cuDNN has a newer kernel, were not measured: they are
left.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gdnfuse.dialect import causal_attention
from gdnfuse.report import Record, Refused
from gdnfuse.rewrite.driver import infer, quiet_shapes, recorded
from gdnfuse.rewrite.graph import kept, op_name, same, same_shape, value
from gdnfuse.rewrite.rule import shown

WIDER_THAN, WIDEST = 128, 256  # columns per head
HOPPER = 9
OPTIONS = ("attn_mask", "dropout_p", "is_causal")  # by their place behind q, k and v


# Not a function of ours around it: AOTAutograd's cache on disk takes no graph with one.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default


def choose(gm: GraphModule, target: str | None) -> list[Record]:
    """Give FlashAttention-2 to every attention on a GPU that is still torch's and may take it. One record each, with why not.

    Args:
        gm: rewritten in place.
        target: device type to assume; None takes it from each attention's tensors.
    """
    records = []
    for node in list(gm.graph.nodes):
        last = op_name(node) == "gdnfuse.causal_attention"
        if not last and op_name(node) != "scaled_dot_product_attention" or len(node.args) < 3:
            continue
        if (target or value(node.args[0]).device.type) != "cuda":
            continue
        record = recorded("flash_attention", "lower", node, "attention(q, k, v)")
        options = dict(zip(OPTIONS, node.args[3:], strict=False)) | node.kwargs
        if last:
            options = {"is_causal": True, "enable_gqa": True, "scale": causal_attention.op.bind(node.args, node.kwargs)["scale"]}
        try:
            require_flash(*map(value, node.args[:3]), options, last)
            causal, scale = options.get("is_causal", False), options.get("scale")
            _replace(node, causal, scale)
            record.chosen = "flash attention"
        except Refused as e:
            record.chosen, record.reason = "library", e.reason
        records.append(record)
    return records


def _replace(node: Node, causal: bool, scale: float | None) -> None:
    """Put torch's own FlashAttention-2 in an attention's place. If causal, its queries are the last of the keys' tokens."""
    with node.graph.inserting_before(node):
        several = node.graph.call_function(FLASH, (*node.args[:3], 0.0, causal, False), {"scale": scale})
    with quiet_shapes(several.graph.owning_module):
        several.meta |= kept(node) | {"example_value": infer(several)}
    node.target, node.args, node.kwargs = operator.getitem, (several, 0), {}


def require_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], last: bool = False) -> None:
    """Raises Refused unless FlashAttention-2 takes it and is as good: no mask, no dropout, bfloat16 or float16, contiguous rows,
    the same sequences and heads, these wider than 128, on Hopper; if causal, as many queries as keys or the `last` of them."""
    if options.get("attn_mask") is not None:
        raise Refused("FlashAttention-2 takes no mask, found one.")
    if isinstance(dropout := options.get("dropout_p", 0.0), Node) or dropout != 0.0:
        raise Refused(f"Attention must have no dropout, found {dropout}.")
    if any(t.ndim != 4 for t in (q, k, v)) or {t.dtype for t in (q, k, v)} not in ({torch.bfloat16}, {torch.float16}):
        found = ", ".join(f"{t.ndim} axes of {str(t.dtype).removeprefix('torch.')}" for t in (q, k, v))
        raise Refused(f"FlashAttention-2 takes four axes of bfloat16 or of float16, found {found}.")
    D = q.shape[-1]
    if not isinstance(D, int) or not WIDER_THAN < D <= WIDEST or D % 8 or not same(v.shape[-1], D):
        found = ", ".join(str(t.shape[-1]) for t in (q, k, v))
        raise Refused(f"Heads must be a multiple of 8 wide, above {WIDER_THAN} and at most {WIDEST}, found {found}.")
    B, H, T, _ = q.shape
    HKV, L = k.shape[1:3]
    shared = options.get("enable_gqa", False) and isinstance(H, int) and isinstance(HKV, int) and H % HKV == 0
    if not all(same_shape(t.shape, (B, HKV, L, D)) for t in (k, v)) or not (same(H, HKV) or shared):
        found = ", ".join(shown(t.shape) for t in (q, k, v))
        raise Refused(f"Queries, keys and values must be of the same sequences and heads, found {found}.")
    if options.get("is_causal", False) and not last and not same(T, L):
        raise Refused(f"Causal attention must have as many queries as keys, found {T} and {L}.")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused(f"Rows must be contiguous, found the strides {', '.join(str(t.stride(-1)) for t in (q, k, v))}.")
    built = not torch.cuda.is_available() or torch.backends.cuda.is_flash_attention_available()
    if not built or not torch.backends.cuda.flash_sdp_enabled():
        raise Refused("FlashAttention-2 must be part of torch and enabled, found that it is not.")
    if not _on_hopper(q.device):
        raise Refused("Which attention is faster was measured on compute capability 9.0 alone, found another device.")


def _on_hopper(device: torch.device) -> bool:
    """Also where there is no GPU: a report is made for one."""
    if torch.version.hip is not None:
        return False
    return (
        not torch.cuda.is_available() or torch.cuda.get_device_capability(device if device.type == "cuda" else None)[0] == HOPPER
    )

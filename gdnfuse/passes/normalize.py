"""normalize: one spelling for casts, commuted operands, squares, buffers, in-place ops and dead ops.

Results are equal to the bit.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from gdnfuse import compat
from gdnfuse.passes import collectives
from gdnfuse.rewrite.edit import infer, returned
from gdnfuse.rewrite.graph import PURE, is_overload, is_tensor, op_name, remove_dead, same, same_shape, storage, value, writes

_CAST_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
_OPERANDS = {
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias"),
    "cat": ("tensors", "dim"),
    "scaled_dot_product_attention": ("query", "key", "value"),
}
_BY_KEYWORD = PURE | _OPERANDS.keys()  # ops whose operands may be keywords
_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    "clamp_": "clamp",
    "masked_fill_": "masked_fill",
}
_BUFFERS = ("zeros_like", "zeros", "empty", "empty_like")


def normalize(gm: GraphModule) -> None:
    """Rewrite `gm` in place into the spelling in which lift's patterns are written."""
    collectives.out_of_place(gm)
    _out_of_place(gm)
    written = {s: n for n in gm.graph.nodes for s in writes(n)}
    for node in list(gm.graph.nodes):
        if op_name(node) == "_log_api_usage_once":
            gm.graph.erase_node(node)
        elif is_tensor(node):
            _positional(node)
            _view(gm, node)
            _cast(gm, node)
            _square(gm, node)
            _commute(node)
            _full_slice(gm, node)
            _idle_dropout(gm, node)
            _outer(gm, node)
            _rejoined(gm, node, written)
    written = {s: n for n in gm.graph.nodes for s in writes(n)}
    for node in list(gm.graph.nodes):
        if op_name(node) in _BUFFERS:
            _buffer_to_stack(gm, node, written)
    remove_dead(gm.graph)
    gm.graph.lint()


def check(gm: GraphModule) -> None:
    """Check the result of the stage: no cast is spelled as a method of its own. Unknown ops are not checked.

    Raises:
        AssertionError: names the node that is wrong.
    """
    for node in gm.graph.nodes:
        assert not is_tensor(node) or op_name(node) not in _CAST_METHODS, f"{node} is a cast spelled {op_name(node)}"


def _become(gm: GraphModule, node: Node, target, args, method=False) -> Node:
    """Replace a node by another spelling of the same value. The example value is kept."""
    with gm.graph.inserting_before(node):
        make = gm.graph.call_method if method else gm.graph.call_function
        new = make(target, tuple(args))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def _positional(node: Node) -> None:
    """Move operands from keywords to the positions from which patterns read them."""
    if node.op == "call_function" and not is_overload(node.target) and op_name(node) in _BY_KEYWORD:
        kwargs, args = dict(node.kwargs), list(node.args)
        names = _OPERANDS.get(op_name(node), ("input",))
        while len(args) < len(names) and names[len(args)] in kwargs:
            args.append(kwargs.pop(names[len(args)]))
        if len(args) != len(node.args):
            node.args, node.kwargs = tuple(args), kwargs


def _view(gm: GraphModule, node: Node) -> None:
    """Turn a view of sizes into a reshape. A view must not copy, but packing may make its operand a slice, for which it must."""
    if op_name(node) in ("view_as", "reshape_as") and all(isinstance(size, int) and size > 0 for size in value(node).shape[1:]):
        # The node that only gives the sizes need not be computed.
        _become(gm, node, "reshape", (node.args[0], (-1, *map(int, value(node).shape[1:]))), method=True)
        return
    if node.target == "view" and node.op == "call_method" and not any(isinstance(a, torch.dtype) for a in node.args):
        if "dtype" not in node.kwargs:
            node.target = "reshape"
    if node.target == "view_as":
        node.target = "reshape_as"
    # The first size stays open, so that proofs can use fewer sequences than the model has.
    if node.target in ("reshape", torch.reshape) and not node.kwargs and value(node).ndim > 1:
        sizes = value(node).shape
        if all(isinstance(size, int) and size > 0 for size in sizes):
            node.args = (node.args[0], (-1, *map(int, sizes[1:])))


def _outer(gm: GraphModule, node: Node) -> None:
    """Turn a product of a column and a row into an elementwise product, which needs no launch of its own.

    The angles of rotary embeddings are such a product.
    """
    if op_name(node) != "matmul" or len(node.args) != 2 or node.kwargs:
        return
    a, b = node.args
    if not all(is_tensor(x) and value(x).ndim >= 2 and value(x).dtype == value(node).dtype for x in (a, b)):
        return
    if value(a).shape[-1:] == value(b).shape[-2:-1] == (1,):
        _become(gm, node, torch.mul, (a, b))


def _cast(gm: GraphModule, node: Node) -> None:
    name = op_name(node)
    x = node.args[0] if node.args else None
    if not is_tensor(x):
        return
    if name in _CAST_METHODS or name == "type_as":
        dtype, plain = value(node).dtype, True
    elif name == "to":
        dtype = value(node).dtype
        given = [*node.args[1:], *node.kwargs]
        flags = any(isinstance(a, bool) for a in given) or not node.kwargs.keys() <= {"dtype", "device"}
        plain = value(x).device == value(node).device and not flags
    else:
        return
    if plain and dtype == value(x).dtype:
        node.replace_all_uses_with(x)
        gm.graph.erase_node(node)
    elif plain and not (node.target == "to" and node.args[1:] == (dtype,)):
        _become(gm, node, "to", (x, dtype), method=True)


def _square(gm: GraphModule, node: Node) -> None:
    if compat.is_erased(node) or node.kwargs:
        return
    if (op_name(node) == "pow" and len(node.args) == 2 and node.args[1] == 2) or op_name(node) == "square":
        _become(gm, node, operator.mul, (node.args[0], node.args[0]))


def _commute(node: Node) -> None:
    if compat.is_erased(node) or node.kwargs:
        return
    if op_name(node) in ("add", "mul") and len(node.args) == 2 and not isinstance(node.args[0], Node):
        node.args = node.args[::-1]


def _full_slice(gm: GraphModule, node: Node) -> None:
    if compat.is_erased(node) or op_name(node) != "getitem" or not is_tensor(node.args[0]):
        return
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if all(i is Ellipsis or i == slice(None) for i in index):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


def _idle_dropout(gm: GraphModule, node: Node) -> None:
    """Remove dropout at inference, which returns its argument. Every adapter has one on its input."""
    if compat.is_erased(node) or node.target is not torch.nn.functional.dropout or not node.args:
        return
    if (node.args[2] if len(node.args) > 2 else node.kwargs.get("training")) is False:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


def _rejoined(gm: GraphModule, node: Node, written: dict[int, Node]) -> None:
    """Replace a cat of neighbouring columns of one row by a slice of the row, if sharing memory changes nothing."""
    if compat.is_erased(node) or op_name(node) != "cat" or node.kwargs or len(node.args) < 2:
        return
    pieces, axis = node.args
    if axis not in (-1, value(node).ndim - 1) or not all(
        op_name(p) == "narrow" and len(p.args) == 4 and not p.kwargs for p in pieces
    ):
        return
    row, _, start, _ = pieces[0].args
    end = start
    for piece in pieces:
        if piece.args[0] is not row or piece.args[1] != -1 or piece.args[2] != end:
            return
        end += piece.args[3]
    if storage(node) in written or storage(row) in written or returned(node):
        return
    new = _become(gm, node, "narrow", (row, -1, start, end - start), method=True)
    new.meta["example_value"] = infer(new)


def _out_of_place(gm: GraphModule) -> None:
    """Replace x /= y by x / y if the graph makes the memory of x and nobody could notice."""
    found = [n for n in gm.graph.nodes if n.target in _IN_PLACE and n.op.startswith("call_") and is_tensor(n)]
    order = {n: i for i, n in enumerate(gm.graph.nodes)} if found else {}
    homes: dict[int | None, list[Node]] = {}
    for n in order:
        homes.setdefault(storage(n), []).append(n)
    for node in found:
        x = node.args[0]
        home = storage(x)
        here = [n for n in homes[home] if not compat.is_erased(n)]
        later = {n: [u for u in n.users if order[u] > order[node]] for n in here if order[n] < order[node]}
        views = any(readers for n, readers in later.items() if n is not x)
        written = any(home in writes(u) and u.target not in _IN_PLACE for n in here for u in n.users if u is not node)
        # The memory of a node is unknown if the node is older than its arguments.
        if storage(node) != home or views or written or not all(n.op.startswith("call_") for n in here):
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node(node.op, _IN_PLACE[node.target], node.args, node.kwargs)
        new.meta.update(node.meta)
        new.meta["example_value"] = infer(new)
        if value(new).dtype != value(node).dtype or not same_shape(value(new).shape, value(node).shape):
            gm.graph.erase_node(new)  # in place it is cast or broadcast to x
            continue
        order[new] = order[node]
        homes[storage(new)] = [new]
        for reader in later[x]:
            reader.replace_input_with(x, new)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        for view in [n for n in here if not compat.is_erased(n) and order[n] > order[new]]:
            view.meta["example_value"] = infer(view)
            homes[home].remove(view)
            homes[storage(new)].append(view)


def _buffer_to_stack(gm: GraphModule, buffer: Node, written: dict[int, Node]) -> None:
    """A fresh buffer whose every slice along one axis is assigned once before it is read is the stack of the slices."""
    assigned = [u for u in buffer.users if op_name(u) == "setitem" and u.args[0] is buffer]
    reads = [u for u in buffer.users if u not in assigned]
    shape = value(buffer).shape
    slices: dict[int, Node] = {}
    axis = None
    for w in assigned:
        index = w.args[1] if isinstance(w.args[1], tuple) else (w.args[1],)
        where = [i for i, x in enumerate(index) if isinstance(x, int)]
        if len(where) != 1 or any(x != slice(None) for i, x in enumerate(index) if i != where[0]) or axis not in (None, where[0]):
            return
        axis = where[0]
        piece, at = w.args[2], index[axis]
        if not is_tensor(piece) or at in slices or not same_shape(value(piece).shape, (*shape[:axis], *shape[axis + 1 :])):
            return
        if storage(piece) in written:
            return
        slices[at] = piece
    if axis is None or not same(shape[axis], len(slices)) or sorted(slices) != list(range(len(slices))) or not reads:
        return
    if max(assigned) > min(reads):
        return
    last = max(assigned)
    pieces = []
    with gm.graph.inserting_before(last.next):
        for at in range(len(slices)):
            piece = slices[at]
            if value(piece).dtype != value(buffer).dtype:
                piece = gm.graph.call_method("to", (piece, value(buffer).dtype))
                piece.meta.update(last.meta)
                piece.meta["example_value"] = infer(piece)
            pieces.append(piece)
        stack = gm.graph.call_function(torch.stack, (pieces, axis))
    stack.meta.update(buffer.meta)
    stack.meta["example_value"] = infer(stack)
    for r in reads:
        r.replace_input_with(buffer, stack)
    for w in assigned:
        gm.graph.erase_node(w)
    gm.graph.erase_node(buffer)

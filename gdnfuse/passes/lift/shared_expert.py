"""experts(x) + [σ(x·sᵀ)·] (silu(x·Gᵀ)·x·Uᵀ)·Dᵀ  →  gdnfuse.experts with a shared expert, for few rows

For many rows its linears are packed and computed by cuBLAS, and the sum is left to the compiler.
"""

from __future__ import annotations

from gdnfuse.errors import Refused
from gdnfuse.passes.experts import Facts, as_rows, bind, experts_call, experts_match, op_of_experts, rows_of, sum_of
from gdnfuse.passes.quantized import bind as bind_weight
from gdnfuse.passes.quantized import is_quantized
from gdnfuse.passes.rows import few_rows
from gdnfuse.rewrite.graph import op_name, peel, same_shape, value
from gdnfuse.rewrite.pattern import Alt, Op, Var
from gdnfuse.rewrite.rule import Rule, require_one_reader

x = Var("x")
swiglu = Op("mul", Op("silu", Op("linear", x, Var("gate"), bind="g")), Op("linear", x, Var("up"), bind="u"))
expert = Op("linear", swiglu, Var("down"), bind="d")
PATTERN = Alt(Op("mul", Op("sigmoid", Op("linear", x, Var("expert_gate"), bind="s")), expert), expert)


class LiftSharedExpert(Rule[Facts]):
    name, stage, equation = "shared_expert", "lift", "experts(x) [+ σ(s·x)·] D·(silu(G·x)·U·x) = experts(x, shared=(G, U, D, s))"

    def anchors(self, graph):
        """Experts of few rows that are added to a linear or to a product."""
        for node in graph.nodes:
            if op_of_experts(node) is not None and few_rows(node) and bind(node)["shared_down"] is None:
                found = sum_of(node)
                if found is not None and op_name(peel(found[1])) in ("linear", "mul"):
                    yield node

    def match(self, anchor):
        root, other = sum_of(anchor)
        env = PATTERN.match(other)
        bound = bind(anchor)
        as_rows(other, value(anchor), "A shared expert's result")
        if peel(env["x"]) is not peel(bound["x"]):
            found = f"{peel(env['x'])} and {peel(bound['x'])}"
            raise Refused(f"A shared expert must read the rows that the others read, found {found}.", at=peel(other))
        require_one_reader(anchor, root)
        for name in ("g", "u", "d", "s"):
            linear = env.get(name)
            if linear is not None and any(b is not None for b in (*linear.args[2:], *linear.kwargs.values())):
                raise Refused("A shared expert must have no bias, found one.", at=linear)
        weights = {f"shared_{name}": env.get(name) for name in ("gate", "up", "down", "expert_gate")}
        return experts_match(root, op_of_experts(anchor), bound | weights | {"x": rows_of(bound["x"])})

    def check(self, m):
        H, S = value(m.inputs["gate_up"]).shape[2], value(m.inputs["shared_down"]).shape[1]
        wanted = {"shared_gate": (S, H), "shared_up": (S, H), "shared_down": (H, S), "shared_expert_gate": (1, H)}
        for name, shape in wanted.items():
            node = m.inputs.get(name)
            if node is not None and not same_shape(value(node).shape, shape):
                raise Refused(f"{name} must be {list(shape)}, found {list(value(node).shape)}.", at=node)
            like = m.inputs["gate_up"] if name != "shared_expert_gate" else None
            if node is not None and _stored(node) != _stored(like):
                raise Refused(f"{name} must be {_stored(like)}, as kernels read it, found {_stored(node)}.", at=node)
            if node is not None and value(node).dtype != value(m.inputs["x"]).dtype:
                raise Refused(f"{name} must be {value(m.inputs['x']).dtype}, found {value(node).dtype}.", at=node)

    def rewrite(self, m, t):
        return experts_call(m, t)


def _stored(weight):
    """How a weight is stored, in words."""
    return f"a weight in {bind_weight(weight)['format']}" if is_quantized(weight) else "a plain weight"


RULE = LiftSharedExpert()

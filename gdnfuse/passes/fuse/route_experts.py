"""experts that route chose  →  routed_experts, for one row. Its experts can start before the choice is complete."""

from __future__ import annotations

from gdnfuse.dialect import experts, op_of, route, routed_experts
from gdnfuse.errors import Refused
from gdnfuse.passes.experts import Facts, bind, experts_call, experts_match, op_of_experts, rows_of
from gdnfuse.passes.rows import one_row
from gdnfuse.rewrite.graph import op_name, peel, value
from gdnfuse.rewrite.rule import Rule, require_one_reader


class FuseRouteExperts(Rule[Facts]):
    name, stage, equation = "route_experts", "fuse", "experts(x, route(x, R)) = routed_experts(x, R)"

    def anchors(self, graph):
        """Experts of one row that route chose."""
        return [n for n in graph.nodes if op_of_experts(n) is experts.op and one_row(n) and _router(n) is not None]

    def match(self, anchor):
        router, bound = _router(anchor), bind(anchor)
        chosen = {i: n for n in router.users for i in (0, 1) if n.args[1] == i}
        # The node itself, because after a cast or a view it is no longer route's result.
        if bound["indices"] is not chosen.get(1) or bound["routing_weights"] is not chosen.get(0):
            raise Refused(f"Experts must read the result of route directly, found {bound['routing_weights']}.", at=anchor)
        for node in chosen.values():
            require_one_reader(node, anchor)
        routing = route.op.bind(router.args, router.kwargs)
        if peel(routing["x"]) is not peel(bound["x"]):
            found = f"{peel(routing['x'])} and {peel(bound['x'])}"
            raise Refused(f"A router must read the row that its experts read, found {found}.", at=router)
        if value(routing["weight"]).shape[0] != value(bound["gate_up"]).shape[0]:
            found = f"{value(routing['weight']).shape[0]} of {value(bound['gate_up']).shape[0]}"
            raise Refused(f"A router must have a row per expert, found {found}.", at=router)
        options = {name: routing[name] for name in ("top_k", "normalize", "wide_logits", "wide_weights")}
        arguments = {name: bound[name] for name in routed_experts.op.arg_names if name in bound}
        more = {"x": rows_of(bound["x"]), "router": routing["weight"]}
        return experts_match(anchor, routed_experts.op, arguments | more | options)

    def rewrite(self, m, t):
        return experts_call(m, t)


def _router(node):
    indices = peel(bind(node)["indices"])
    made = indices.args[0] if op_name(indices) == "getitem" else None
    return made if made is not None and op_of(getattr(made, "target", None)) is route.op else None


RULE = FuseRouteExperts()

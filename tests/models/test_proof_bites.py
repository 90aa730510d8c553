"""Edited copies of the model's own code: each keeps its own result, and is refused with a sentence.

These are about matching, so nothing is captured; what capture makes of edited functions is in tests/test_capture.py.
"""

import inspect
import textwrap

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

import gdnfuse
from gdnfuse import Status
from tests.models import zoo
from tests.sweeps import some

RULE, CONV, GDN = "torch_recurrent_gated_delta_rule", "causal_conv1d_update", "Qwen3_5GatedDeltaNet.forward"
NORM = "Qwen3_5RMSNormGated.forward"
# what is edited: old text, new text, the rule that must decline
EDITS = {
    "other eps for q": (
        RULE,
        "query = l2norm(query, dim=-1, eps=1e-6)",
        "query = l2norm(query, dim=-1, eps=1e-4)",
        "l2norm_delta_rule",
    ),
    "no l2norm": (RULE, "if use_qk_l2norm_in_kernel:", "if False:", "packed_decode"),
    "exp2 for exp": (RULE, ".exp()[..., None, None]", ".exp2()[..., None, None]", "delta_rule"),
    "a factor on delta": (RULE, "delta = (v_t - kv_mem) * beta_t", "delta = 0.5 * ((v_t - kv_mem) * beta_t)", "delta_rule"),
    "a factor on the decay": (
        RULE,
        "decay_t = decay[:, :, i].exp()",
        "decay_t = (1.01 * decay[:, :, i]).exp()",
        "gating_delta_rule",
    ),
    "subtraction flipped": (RULE, "(v_t - kv_mem)", "(kv_mem - v_t)", "delta_rule"),
    "flipped axis of equal size": (
        RULE,
        "kv_mem = (last_recurrent_state * k_t.unsqueeze(-1)).sum(dim=-2)",
        "kv_mem = (last_recurrent_state * k_t.unsqueeze(-2)).sum(dim=-1)",
        "delta_rule",
    ),
    "read before the update": (
        RULE,
        "core_attn_out[:, :, i] = (last_recurrent_state * q_t",
        "core_attn_out[:, :, i] = (initial_state * q_t",
        "delta_rule",
    ),
    "key scaled instead of query": (
        RULE,
        "query = query / (query.shape[-1] ** 0.5)",
        "key = key / (key.shape[-1] ** 0.5)",
        "l2norm_delta_rule",
    ),
    "outer product transposed": (
        RULE,
        "k_t.unsqueeze(-1) * delta.unsqueeze(-2)",
        "k_t.unsqueeze(-2) * delta.unsqueeze(-1)",
        "delta_rule",
    ),
    "softplus with beta": (
        GDN,
        "F.softplus(a.float() + self.dt_bias)",
        "F.softplus(a.float() + self.dt_bias, beta=2.0)",
        "gating",
    ),
    "softplus with a threshold": (
        GDN,
        "F.softplus(a.float() + self.dt_bias)",
        "F.softplus(a.float() + self.dt_bias, threshold=1.0)",
        "gating",
    ),
    "dt_bias subtracted": (GDN, "a.float() + self.dt_bias", "a.float() - self.dt_bias", "gating"),
    "tanh for sigmoid": (GDN, "beta = b.sigmoid()", "beta = b.tanh()", "gating_delta_rule"),
    "query and key swapped": (GDN, "query, key, value = torch.split(", "key, query, value = torch.split(", "packed_decode"),
    "conv keeps the oldest columns": (
        CONV,
        "hidden_states_new[:, :, -state_len:]",
        "hidden_states_new[:, :, :state_len]",
        "causal_conv_update",
    ),
    "conv reads the first window": (CONV, "out = out[:, :, -seq_len:]", "out = out[:, :, :seq_len]", "causal_conv_update"),
    "norm over the other axis": (NORM, ".mean(-1, keepdim=True)", ".mean(-2, keepdim=True)", "gated_rms_norm"),
    "gate without silu": (
        NORM,
        "ACT2FN[self.activation](gate.to(torch.float32))",
        "torch.tanh(gate.to(torch.float32))",
        "gated_rms_norm",
    ),
}


def edited(where, old, new):
    """The function `where` names with `old` replaced by `new`, compiled in the model's own module."""
    owner, _, method = where.rpartition(".")
    owner = getattr(modeling, owner) if owner else modeling
    function = inspect.unwrap(getattr(owner, method or where))
    text = textwrap.dedent(inspect.getsource(function))
    text = text[text.index("def ") :]
    assert text.count(old) >= 1, f"{old!r} is not in {where} of this transformers"
    scope = {}
    exec(compile(text.replace(old, new), f"<edited {where}>", "exec"), modeling.__dict__, scope)
    return owner, method or where, scope[method or where]


# Of each function, and of each kind of mistake; tests/fuzz edits graphs at random.
KEPT = [
    "other eps for q", "exp2 for exp", "flipped axis of equal size", "read before the update", "key scaled instead of query",
    "softplus with a threshold", "dt_bias subtracted", "query and key swapped", "conv keeps the oldest columns",
    "norm over the other axis",
]  # fmt: skip


@pytest.mark.parametrize("name", some(EDITS, *KEPT))
def test_edited_code_is_refused_and_keeps_its_own_result(name, monkeypatch):
    where, old, new, rule = EDITS[name]
    monkeypatch.setattr(*edited(where, old, new))
    model = zoo.causal_lm(**zoo.SMALL)
    tokens = zoo.tokens_for(2, 3)
    run = torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "capture": False})
    a, mask = zoo.prefill(model, 2, "static")
    e, _ = zoo.prefill(model, 2, "static")
    wanted = zoo.decode(model, e, mask, tokens)
    found = zoo.decode(run, a, mask, tokens)
    assert zoo.relative(found, wanted) < 1e-5
    for kind in ("recurrent", "conv"):
        for x, y in zip(zoo.states(a)[kind], zoo.states(e)[kind], strict=True):
            assert zoo.relative(x, y) < 1e-5
    (report,) = gdnfuse.reports()
    assert report.fused_layers == 0
    assert len(report.layers) == 1
    for layer in report.layers:
        declined = [r for r in layer.records if r.rule == rule and r.status is not Status.FIRED]
        assert declined and all(r.reason.endswith(".") and len(r.reason) > 20 for r in declined), layer.records
        assert rule in layer.why_not


@pytest.mark.parametrize("capture", [False, True])
def test_the_unedited_code_is_fused(capture):
    """The control: the same drive without an edit fires, so the refusals above are the edits' doing."""
    model = zoo.causal_lm(**zoo.SMALL)
    options = {"inner": "eager", "strict": True, "capture": capture}
    run = torch.compile(model, backend="gdnfuse", fullgraph=True, options=options)
    a, mask = zoo.prefill(model, 2, "static")
    zoo.decode(run, a, mask, zoo.tokens_for(2, 2))
    assert gdnfuse.reports()[0].fused_layers == 1

"""The chunked rule written out for a fixed length: in transformers' spellings, in others, and with mistakes that are refused."""

import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

import gdnfuse
from gdnfuse import Status
from gdnfuse.dialect import chunk_delta_rule as dialect
from gdnfuse.passes.lift import chunk_delta_rule, delta_rule, l2norm
from gdnfuse.rewrite.graph import op_name
from tests.models import zoo
from tests.rewrite.captured import Captured

SOURCE = textwrap.dedent(inspect.getsource(modeling.torch_chunk_gated_delta_rule))
SOURCE = SOURCE[SOURCE.index("def ") :]
SOLVE, LOOP = "solve", "loop"
GVA_INSIDE = "repeat_interleave" in SOURCE


def edited(*edits, spelling=SOLVE):
    """transformers' own function with the solver of a spelling, and some text replaced."""
    code = SOURCE.replace("is_torchdynamo_exporting()", str(spelling == LOOP))
    assert code != SOURCE
    for old, new in edits:
        assert old in code, old
        code = code.replace(old, new)
    names = dict(vars(modeling))
    exec(code, names)
    return names["torch_chunk_gated_delta_rule"]


def inputs(T, B=2, H=None, HV=2, K=4, V=6):
    torch.manual_seed(0)
    H = H or HV
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, HV, V)
    return q, k * 0.3, v, -torch.rand(B, T, HV), torch.rand(B, T, HV), torch.randn(B, HV, K, V)


def unused(rule):
    return lambda q, k, v, g, beta, state: rule(q, k, v, g, beta)[0]


def fresh(rule):
    return lambda q, k, v, g, beta, state: rule(q, k, v, g, beta, output_final_state=True)


def continued(rule):
    return lambda q, k, v, g, beta, state: rule(q, k, v, g, beta, initial_state=state, output_final_state=True)


def cached(rule):
    """The state is the cache's, and goes back to it."""

    def f(q, k, v, g, beta, state):
        o, last = rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        state.copy_(last)
        return o

    return f


def first(rule):
    """The cache is created by the call."""

    def f(q, k, v, g, beta, state):
        o, last = rule(q, k, v, g, beta, output_final_state=True)
        new = torch.zeros_like(last)
        new.copy_(last)
        return o, new

    return f


USES = [unused, fresh, continued, cached, first]


def lifted(f, args, dynamic=None):
    graph = Captured(f, *args, dynamic=dynamic).normalize().apply(chunk_delta_rule.RULE, delta_rule.RULE)
    return graph.close()


def fires(f, args, with_state, dynamic=None):
    graph = lifted(f, args, dynamic)
    assert graph.record.status is Status.FIRED and graph.record.proof_error < 1e-9, graph.record
    ops = graph.ops()
    assert ops.count("gdnfuse.chunk_delta_rule") == 1
    assert not {"matmul", "cumsum", "exp", "linalg_solve_triangular", "setitem"} & {*ops}
    (op,) = [n for n in graph.gm.graph.nodes if op_name(n) == "gdnfuse.chunk_delta_rule"]
    assert (op.args[5] is not None) == with_state
    return graph


def declines(f, args):
    graph = Captured(f, *args).normalize()
    before = str(graph.gm.graph)
    record = graph.apply(chunk_delta_rule.RULE).equal().record
    assert record.status in (Status.REFUSED, Status.UNMATCHED) and str(graph.gm.graph) == before
    assert record.reason.endswith(".") and ("found" in record.reason or "proof failed" in record.reason)
    return record


CASES = [(130, SOLVE, use) for use in USES] + [(1, SOLVE, unused), (1, SOLVE, cached), (64, SOLVE, continued)]
CASES += [(5, SOLVE, cached), (65, SOLVE, fresh)]
CASES += [(5, LOOP, cached)]
CASES += [
    pytest.param(*case, marks=pytest.mark.sweep) for case in ((64, LOOP, unused), (65, LOOP, continued), (130, LOOP, first))
]


@pytest.mark.parametrize(("T", "spelling", "use"), CASES)
def test_transformers_own(T, spelling, use):
    graph = fires(use(edited(spelling=spelling)), inputs(T), use in (continued, cached))
    assert graph.ops().count("copy_") == (use in (cached, first))


@pytest.mark.parametrize("use", [fresh, cached], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sizes", [{"B": 1, "HV": 1}, {"HV": 5, "K": 5, "V": 5}, {"B": 4, "HV": 4, "K": 4, "V": 4}])
def test_sizes_that_shapes_do_not_tell_apart(sizes, use):
    fires(use(edited()), inputs(5, **sizes), use is cached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype):
    """The output keeps the model's dtype, the state float32."""
    args = [x.to(dtype) for x in inputs(70)[:3]] + [*inputs(70)[3:]]
    graph = Captured(cached(edited()), *args).normalize().apply(chunk_delta_rule.RULE)
    assert graph.record.status is Status.FIRED, graph.record
    graph.compare(lambda found, wanted: torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2))


def test_an_output_wider_than_v_is_not_rounded_to_v():
    rule = edited((".to(initial_dtype, memory_format=torch.contiguous_format)", ""))
    fires(fresh(rule), [x.bfloat16() for x in inputs(70)], False)


def test_a_state_in_half_precision():
    args = [*inputs(5)[:5], inputs(5)[5].bfloat16()]
    graph = Captured(cached(edited()), *args).normalize().apply(chunk_delta_rule.RULE)
    assert graph.record.status is Status.FIRED, graph.record
    graph.compare(lambda found, wanted: torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2))


def test_a_batch_known_at_run_time_only():
    args = inputs(70, B=3)
    for x in args:
        torch._dynamo.mark_dynamic(x, 0)
    fires(cached(edited()), args, True)


@pytest.mark.parametrize("spelling", [SOLVE, LOOP])
def test_grouped_heads_and_l2norm_stay_outside(spelling):
    """Key heads repeated before the rule or by it, q and k normalised by it."""
    rule = edited(spelling=spelling)

    def f(q, k, v, g, beta, state):
        if not GVA_INSIDE:
            q, k = q.repeat_interleave(2, 2), k.repeat_interleave(2, 2)
        o, last = rule(q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        state.copy_(last)
        return o

    graph = Captured(f, *inputs(70, H=2, HV=4)).normalize().apply(l2norm.RULE, chunk_delta_rule.RULE, delta_rule.RULE).close()
    assert [r.status for r in graph.outcome.records] == [Status.FIRED] * 3, graph.outcome.records
    ops = graph.ops()
    assert ops.count("repeat_interleave") == ops.count("gdnfuse.l2norm") == 2 and "matmul" not in ops and "setitem" not in ops


def test_layers_of_one_structure_are_proved_once_and_cheaply():
    rule = cached(edited())

    def f(*args):
        return rule(*args[:6]), rule(*args[:5], args[6])

    args = [*inputs(515, HV=4, K=16, V=16), torch.randn(2, 4, 16, 16)]
    graph = Captured(f, *args).normalize().apply(chunk_delta_rule.RULE).close()
    assert [r.status for r in graph.outcome.records] == [Status.FIRED] * 2
    assert graph.outcome.proofs == 1 and graph.outcome.proof_seconds < 2


# The same maths by other hands.


def earlier(q, k, v, g, beta, state):
    """As the first models wrote it: forward substitution, masks in place, the decays taken chunk by chunk."""
    T, chunk = q.shape[1], 64
    q, k, v, beta, g = (x.transpose(1, 2).contiguous().float() for x in (q, k, v, beta, g))
    pad = (chunk - T % chunk) % chunk
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    beta, g = F.pad(beta, (0, pad)), F.pad(g, (0, pad))
    q = q * q.shape[-1] ** -0.5
    vb, kb = v * beta.unsqueeze(-1), k * beta.unsqueeze(-1)
    q, k, v, kb, vb = (x.reshape(x.shape[0], x.shape[1], -1, chunk, x.shape[-1]) for x in (q, k, v, kb, vb))
    g = g.reshape(g.shape[0], g.shape[1], -1, chunk)
    mask = torch.triu(torch.ones(chunk, chunk, dtype=torch.bool), diagonal=0)
    g = g.cumsum(dim=-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp().float().tril()
    attn = -((kb @ k.transpose(-1, -2)) * decay).masked_fill(mask, 0)
    for i in range(1, chunk):
        row = attn[..., i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * attn[..., :i, :i].clone()).sum(-2)
    attn = attn + torch.eye(chunk, dtype=attn.dtype)
    u, w = attn @ vb, attn @ (kb * g.exp().unsqueeze(-1))
    s = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1]).to(u) if state is None else state.to(u)
    out = torch.zeros_like(u)
    mask = torch.triu(torch.ones(chunk, chunk, dtype=torch.bool), diagonal=1)
    for i in range(q.shape[2]):
        attn = (q[:, :, i] @ k[:, :, i].transpose(-1, -2) * decay[:, :, i]).masked_fill_(mask, 0)
        new = u[:, :, i] - w[:, :, i] @ s
        out[:, :, i] = (q[:, :, i] * g[:, :, i, :, None].exp()) @ s + attn @ new
        last = (k[:, :, i] * (g[:, :, i, -1, None] - g[:, :, i]).exp()[..., None]).transpose(-1, -2)
        s = s * g[:, :, i, -1, None, None].exp() + last @ new
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :T].transpose(1, 2).contiguous().to(q.dtype), s


def handwritten(query, key, values, log_decay, rate, memory):
    """Other names, another order: time first until it is padded, β on the right, where for masks, chunks joined along time."""
    size, length = 64, query.shape[1]
    extra = -length % size
    query, key, values = (F.pad(x, (0, 0, 0, 0, 0, extra)).transpose(1, 2) for x in (query / 2, key, values))
    log_decay, rate = (F.pad(x, (0, 0, 0, extra)).transpose(1, 2) for x in (log_decay, rate))
    query, key, values = (x.unflatten(2, (-1, size)) for x in (query, key, values))
    log_decay, rate = (x.unflatten(2, (-1, size)) for x in (log_decay, rate))
    total = torch.cumsum(log_decay, -1)
    causal = torch.ones(size, size).tril().bool()
    between = torch.where(causal, total[..., :, None] - total[..., None, :], -torch.inf).exp()
    system = between * ((rate[..., None] * key) @ key.mT)
    u = torch.linalg.solve_triangular(system, rate[..., None] * values, upper=False, unitriangular=True)
    w = torch.linalg.solve_triangular(system, (total.exp()[..., None] * rate[..., None]) * key, upper=False, unitriangular=True)
    pieces = []
    for n in range(u.shape[2]):
        fix = u[:, :, n] - torch.matmul(w[:, :, n], memory)
        read = between[:, :, n] * (query[:, :, n] @ key[:, :, n].mT)
        pieces.append(read @ fix + (total[:, :, n].exp()[..., None] * query[:, :, n]) @ memory)
        kept = (total[:, :, n, -1:] - total[:, :, n]).exp()[..., None] * key[:, :, n]
        memory = kept.mT @ fix + total[:, :, n, -1].exp()[..., None, None] * memory
    return torch.cat(pieces, 2).transpose(1, 2)[:, :length], memory


@pytest.mark.parametrize(("T", "with_state"), [pytest.param(5, False, marks=pytest.mark.sweep), (70, True)])
def test_an_earlier_spelling(T, with_state):
    fires(lambda q, k, v, g, beta, state: earlier(q, k, v, g, beta, state if with_state else None), inputs(T), with_state)


@pytest.mark.parametrize("T", [5, 130])
def test_code_that_is_not_transformers(T):
    q, k, v, g, beta, state = inputs(T)
    o, last, _ = dialect.reference(q, k, v, g, beta, state, 0.5)
    found = handwritten(q, k, v, g, beta, state)
    torch.testing.assert_close(found, (o, last), rtol=1e-4, atol=1e-4)
    fires(handwritten, (q, k, v, g, beta, state), True)


# Mistakes that keep every shape. What is edited in transformers' code: old text, new text.
INTER, UPDATE = "query[:, :, i] @ last_recurrent_state", "key[:, :, i].transpose(-1, -2) @ v_new"
MISTAKES = {
    "no decay where queries read the state": ("query = query * cum_decay.exp().unsqueeze(-1)", "pass"),
    "decay of the chunk from its first token": ("chunk_decay = cum_decay[..., -1]", "chunk_decay = cum_decay[..., 0]"),
    "no decay of keys": ("key = key * (cum_decay[..., -1:] - cum_decay).exp().unsqueeze(-1)", "pass"),
    "keys decayed from the start": ("(cum_decay[..., -1:] - cum_decay).exp()", "cum_decay.exp()"),
    "a token does not see itself": (".triu(1)", ".triu(0)"),
    "a token sees the next": (".triu(1)", ".triu(2)"),
    "queries scaled within chunks alone": ("(query @ key.transpose(-1, -2)) *", "(query @ key.transpose(-1, -2)) * 0.5 *"),
    "state transposed": (INTER, "query[:, :, i] @ last_recurrent_state.transpose(-1, -2)"),
    "beta on keys alone": ("v_beta = value * beta.unsqueeze(-1)", "v_beta = value"),
    "beta on values alone": ("k_beta = key * beta.unsqueeze(-1)", "k_beta = key"),
    "the diagonal of the system is solved for": ("upper=False, unitriangular=True", "upper=False, unitriangular=False"),
    "the system transposed": ("upper=False, unitriangular=True", "upper=True, unitriangular=True"),
    "u for w": ("k_cumdecay[:, :, i] @ last", "new_values[:, :, i] @ last"),
    "v not corrected": ("intra_chunk_attn[:, :, i] @ v_new", "intra_chunk_attn[:, :, i] @ new_values[:, :, i]"),
    "exp2 for exp": ("chunk_decay = cum_decay[..., -1].exp()", "chunk_decay = cum_decay[..., -1].exp2()"),
    "a factor on the state": (UPDATE, UPDATE + " * 1.0001"),
    "padding before the tokens": ("core_attn_out[:, :, :sequence_length]", "core_attn_out[:, :, pad_size:]"),
    "decays cut off": ("chunk_decay = cum_decay[..., -1]", "chunk_decay = cum_decay[..., -1].clamp(min=-10.0)"),
    "keys cut off": ("v_beta = value * beta", "key = key.clamp(-2.0, 2.0); v_beta = value * beta"),
    "a state of another chunk": (INTER, "query[:, :, i] @ (last_recurrent_state if i != 1 else initial_state)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake):
    declines(continued(edited(MISTAKES[mistake])), inputs(70, B=3, HV=3, K=6, V=6))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("range(1, chunk_size)", "range(3, chunk_size)", marks=pytest.mark.sweep),
        pytest.param("ut_system.tril(-1)", "ut_system.tril(0)", marks=pytest.mark.sweep),
        ("row + (row", "row - (row"),
        ("ut_system[..., i, :i] = row", "ut_system[..., i, :i] += row"),
    ],
)
def test_a_mistake_in_forward_substitution_is_refused(old, new):
    declines(continued(edited((old, new), spelling=LOOP)), inputs(5))


def test_what_the_rule_makes_inside_may_be_read_nowhere_else():
    leak = ("return core_attn_out, last_recurrent_state", "return core_attn_out, new_values")

    def leaking(spelling):
        return continued(edited(leak, spelling=spelling))

    record = declines(leaking(LOOP), inputs(5))
    assert record.status is Status.REFUSED and "must be read in the motif" in record.reason
    # What is not written in place may be read by others, and is computed for them as before.
    graph = lifted(leaking(SOLVE), inputs(5))
    assert graph.record.status is Status.FIRED and "linalg_solve_triangular" in graph.ops()


def test_a_state_that_is_used_elsewhere_is_refused():
    rule = edited()

    def read_after(*args):
        return cached(rule)(*args), args[5].sum()

    def read_between(q, k, v, g, beta, state):
        o, last = rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        seen = state * 1
        state.copy_(last)
        return o, seen

    def written_before(*args):
        args[5].mul_(0.5)
        return cached(rule)(*args)

    def written_as_a_part(*args):
        out = continued(rule)(*args)
        args[5][0].copy_(out[1][0])
        return out[0]

    for f in (read_after, read_between, written_before, written_as_a_part):
        record = declines(f, inputs(5))
        assert record.status is Status.REFUSED and ("state" in record.reason or "written in place" in record.reason), record


def test_an_operand_written_in_place_is_refused():
    rule = edited()

    def f(q, k, v, g, beta, state):
        o = fresh(rule)(q, k, v, g, beta, state)
        k.zero_()
        return o

    assert "written in place" in declines(f, inputs(5)).reason


def test_records_say_what_was_expected():
    def decays(g):
        c = g.cumsum(-1)
        return (c[..., :, None] - c[..., None, :]).exp()

    record = declines(decays, (torch.randn(2, 3, 4, 5),))
    assert record.status is Status.UNMATCHED and record.expected and record.got


# Whole models, with the rule traced into the graph.


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(None, torch.float32, marks=pytest.mark.sweep),
        ("dynamic", torch.float32),
        pytest.param("static", torch.bfloat16, marks=pytest.mark.sweep),
    ],
)
@torch.no_grad()
def test_every_layer_of_a_prompt_is_lifted_without_capture(kind, dtype):
    """Without a cache, into a new one, and into one that holds a prompt already."""
    model = zoo.causal_lm(**zoo.SMALL).to(dtype)
    options = {"inner": "eager", "capture": False}
    run = torch.compile(model, backend="gdnfuse", fullgraph=True, dynamic=False, options=options)
    caches = [zoo.new_cache(model, kind, 256) if kind else None for _ in range(2)]
    close = 1e-5 if dtype == torch.float32 else 5e-2
    # In some versions transformers itself breaks the graph of a second prompt.
    lengths = (70, 66) if kind and not (kind == "static" and zoo.FILLED_STATIC_CACHE_BREAKS) else (70,)
    for length in lengths:
        ids, _ = zoo.prompt(2, length, seed=length)
        calls = zip((run, model), caches, strict=True)
        logits = [f(input_ids=ids, **{zoo.CACHE: c}, use_cache=bool(kind)).logits for f, c in calls]
        assert zoo.relative(*logits) < close
    if kind:
        assert zoo.relative(*(zoo.flat_states(c, "recurrent") for c in caches)) < close
    assert len(gdnfuse.reports()) == len(lengths)
    for report in gdnfuse.reports():
        assert report.rewritten and report.phase == "prefill" and len(report.layers) == 1
        for layer in report.layers:
            (record,) = [r for r in layer.records if r.stage == "lift" and r.rule == "chunk_delta_rule"]
            assert record.status is Status.FIRED, record
            assert not {"matmul", "cumsum", "linalg_solve_triangular"} & {*layer.ops_after}
            assert not [r for r in layer.records if r.rule == "delta_rule"]


@torch.no_grad()
def test_a_mistake_in_a_model_is_reported_and_keeps_its_result(monkeypatch):
    wrong = edited(("chunk_decay = cum_decay[..., -1].exp()", "chunk_decay = (0.9 * cum_decay[..., -1].exp())"))
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", wrong)
    model = zoo.causal_lm(**zoo.SMALL)
    ids, _ = zoo.prompt(2, 130)
    run = torch.compile(model, backend="gdnfuse", fullgraph=True, dynamic=False, options={"inner": "eager", "capture": False})
    assert zoo.relative(run(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits) < 1e-5
    (report,) = gdnfuse.reports()
    for layer in report.layers:
        (record,) = [r for r in layer.records if r.rule == "chunk_delta_rule" and r.stage == "lift"]
        assert record.status is Status.REFUSED and "float64 proof failed" in record.reason and record.reason in layer.why_not

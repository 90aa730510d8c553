"""What the report knows of a graph: blocks, kernels, bytes, the limit, and the line of the model's code behind a refusal."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gdnfuse
from gdnfuse import models
from gdnfuse.cli import _parser
from gdnfuse.dialect import OPS
from gdnfuse.passes import fuse, lift, survey
from gdnfuse.report.records import COLUMNS, Comparison, GraphReport, LayerReport, Record, Status, document, marks
from gdnfuse.report.text import Style, pair, ranges, render, size
from tests.models import zoo
from tests.pages import REPORT, blocks, documented, fields


def surveyed(module, *args):
    """The survey of a module's graph, by operation and in all."""
    found = []

    def backend(gm, inputs):
        survey.mark_blocks(gm)
        found.append(survey.take(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=backend)(*args)
    (only,) = found
    return {c.operation.name: c.operation for c in only.calls}, only


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 8)
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, ids, state, row):
        x = self.table(ids)
        y = self.linear(x)
        same = y.to(torch.float32)
        view = same.view(2, 4, 4).transpose(1, 2)
        wide = view[:, :, :1].expand(2, 4, 4)
        product = view * wide
        state.copy_(product)
        rows = state.index_copy(0, row, product[:1])
        state.index_copy_(0, row, product[:1])
        return rows


def test_bytes_are_those_of_tensors_read_and_written_once():
    arguments = torch.tensor([3, 5]), torch.zeros(2, 4, 4), torch.tensor([1])
    by_name, whole = surveyed(Stateful(), *arguments)
    moved = {o.op: o.bytes for o in by_name.values() if o.kernels}
    assert moved == {
        "embedding": 2 * 8 + 2 * 8 * 4 + 2 * 8 * 4,  # indices, two rows of the table, the result
        "linear": (2 * 8 + 8 * 16 + 2 * 16) * 4,
        "mul": (32 + 8 + 32) * 4,  # the expanded axis counts once
        "copy_": (32 + 32) * 4,
        "index_copy": 32 * 4 + 8 + 16 * 4 + 32 * 4,
        "index_copy_": 8 + 16 * 4 + 16 * 4,  # the rest of the state stays
    }
    assert {o.op for o in by_name.values() if not o.kernels} == {"to", "view", "transpose", "getitem", "expand"}
    inputs = {"ids": 16, "rows of the table": 64, "weight": 8 * 16 * 4, "state read": 128, "state written": 128, "row": 8}
    assert whole.limit_bytes == sum(inputs.values())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer, self.second_norm, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.second_norm(x))


def test_norms_belong_to_the_block_behind_them_and_sums_to_the_one_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Layer(), Layer()))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers = model[0], nn.ModuleList(model[1])

        def forward(self, x):
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            return x * 2

    _, whole = surveyed(Model(), torch.zeros(1, 4))
    assert [(c.block, c.operation.op) for c in whole.calls] == [
        ("", "linear"),
        *((f"layers.{i}.{block}", op) for i in (0, 1) for block in ("mixer", "mlp") for op in ("layer_norm", "linear", "add")),
        ("", "mul"),
    ]


def test_blocks_add_up_to_the_graph_and_equal_ones_share_their_operations(decode_report):
    kinds = [(b.index, b.kind) for b in decode_report.blocks]
    assert kinds == [(None, "outside the layers")] + [
        (i, kind) for i in range(3) for kind in ("full attention" if i == 2 else "linear attention", "MLP")
    ]
    for name in ("launches_before", "launches_after", "bytes_before", "bytes_after"):
        assert sum(getattr(b, name) for b in decode_report.blocks) == getattr(decode_report, name) > 0
    for b in decode_report.blocks:
        for structure, kernels in ((b.before, b.launches_before), (b.after, b.launches_after)):
            operations = decode_report.structures[structure]
            assert sum(o.kernels for o in operations) == kernels
            assert all(given < i for i, o in enumerate(operations) for given in o.inputs if isinstance(given, int))
    linear = [b for b in decode_report.blocks if b.kind == "linear attention"]
    assert len({(b.before, b.after) for b in linear}) == 1 and linear[0].launches_before >= 30 and linear[0].launches_after == 3
    assert len({(b.before, b.after) for b in decode_report.blocks if b.kind == "MLP"}) == 1
    assert [o.op for o in decode_report.structures[linear[0].after] if o.kernels] == [
        "in_proj_conv",
        "packed_decode",
        "fused_linear",
    ]


def test_marks_say_what_was_done_in_each_block(decode_report):
    marked = {b.kind: set(b.marks) for b in decode_report.blocks}
    assert marked == {
        "outside the layers": {"norm"},
        "linear attention": {"packed", "conv", "gates", "rule", "gated norm", "mixer", "norm", "residual"},
        "full attention": {"packed", "attention", "norm", "residual"},
        "MLP": {"packed", "norm", "SwiGLU", "residual"},
    }
    assert all(set(b.marks.values()) == {"fired"} and b.fused == "fused" for b in decode_report.blocks)


def test_marks_of_what_declined():
    def record(rule, status):
        return Record(rule, "fuse", status, "node")

    found = [record("rms_norm", Status.FIRED), record("norm_linear", Status.REFUSED), record("swiglu_linear", Status.UNMATCHED)]
    found += [record("new_rule", Status.FIRED), record("gating", Status.SHADOWED)]
    assert marks(found) == {"norm": "both", "SwiGLU": "declined", "new_rule": "fired"}


def test_every_rule_and_what_is_captured_has_one_column():
    listed = [rule for rules in COLUMNS.values() for rule in rules]
    assert len(listed) == len(set(listed))
    assert (
        {rule.name for rule in (*lift.RULES, *fuse.RULES)}
        <= set(listed)
        <= {r.name for r in (*lift.RULES, *fuse.RULES)} | OPS.keys()
    )


def test_the_limit_is_weights_states_and_caches_once(decode_report):
    model = zoo.causal_lm()
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    embedded = model.model.embed_tokens.weight[0].numel()
    cfg = model.config
    channels = 2 * cfg.linear_num_key_heads * cfg.linear_key_head_dim + cfg.linear_num_value_heads * cfg.linear_value_head_dim
    heads = cfg.linear_num_value_heads * cfg.linear_key_head_dim * cfg.linear_value_head_dim
    states = 2 * 2 * (channels * cfg.linear_conv_kernel_dim + heads)
    row = 2 * cfg.num_key_value_heads * cfg.head_dim  # of keys and of values
    cache = row * (8 + 1) + row
    small = 8 + 2 * 8 + model.model.rotary_emb.inv_freq.nbytes  # the token, the cache's position, the rotary frequencies
    assert decode_report.limit_bytes == 4 * (weights + embedded + states + cache) + small
    assert decode_report.limit_bytes <= decode_report.bytes_after


@pytest.mark.parametrize("batch", [1, 4])
def test_experts_count_as_many_as_rows_are_expected_to_need(batch):
    """A block of experts, its columns, kernels and bytes; batch 4 needs 1 − (1 − 2/8)⁴ of the experts."""
    model = zoo.moe(num_experts=8, num_experts_per_tok=2, **zoo.SMALL).to("meta")
    (report,) = models.trace(model, batch=batch, prompt=8, target="cuda")
    block, other = [b for b in report.blocks if b.kind == "MoE"]
    assert (block.before, block.after) == (other.before, other.after)
    assert block.marks == dict.fromkeys(("router", "experts", "norm", *["residual"][: batch == 1]), "fired")
    ops = {o.op: o for o in report.structures[block.after] if o.kernels}
    assert list(ops) == (["routed_experts"] if batch == 1 else ["add_rms_norm", "route", "experts"])
    assert block.launches_before > 20 and block.launches_after == (3 if batch == 1 else 6)
    parts = dict(model.model.layers[0].mlp.named_parameters())
    share = 2 / 8 if batch == 1 else 1 - (6 / 8) ** 4
    experts = sum(round(p.nbytes * share) for name, p in parts.items() if "experts." in name)
    beside = sum(p.nbytes for name, p in parts.items() if "experts." not in name and (batch == 1 or name != "gate.weight"))
    rows = batch * 64 * 4
    chosen = 0 if batch == 1 else batch * 2 * (4 + 8)  # weights and indices
    norm = 64 * 4 if batch == 1 else 0
    moved = experts + beside + chosen + norm + (3 if batch == 1 else 2) * rows  # the row, in two views, and the result
    assert ops["routed_experts" if batch == 1 else "experts"].bytes == moved
    unneeded = 2 * sum(p.nbytes - round(p.nbytes * share) for name, p in parts.items() if "experts." in name)
    everything = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    assert 0 < report.limit_bytes - (everything - unneeded) < batch * 40_000  # states, caches and the rows of the table


class Gate(nn.Module):
    """Almost a gate: the decay lacks its sign."""

    def __init__(self):
        super().__init__()
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, a):
        return helper(self.inner(a), self)


def helper(a, gate):
    step = F.softplus(a + gate.dt_bias)
    return step * gate.A_log.exp()


class Gates(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Gate(), Gate()])

    def forward(self, a):
        for layer in self.layers:
            a = layer(a)
        return a


def compiled_report(module, *args, **options):
    with torch.no_grad():
        torch.compile(module, backend="gdnfuse", options={"inner": "eager", **options})(*args)
    return gdnfuse.reports()[-1]


def line_of(function, text):
    lines, start = inspect.getsourcelines(function)
    (at,) = [i for i, line in enumerate(lines) if text in line]
    return start + at, lines[at].strip()


def test_what_is_not_matched_names_its_line_and_the_nearest_node():
    report = compiled_report(Gates(), torch.zeros(2, 4))
    (refusal,) = report.refusals
    assert (refusal.rule, refusal.status, refusal.count) == ("gating", Status.UNMATCHED, 2)
    assert refusal.blocks == ["layers.0", "layers.1"] and [b.kind for b in report.blocks] == ["linear attention"] * 2
    assert refusal.expected and refusal.got and refusal.at in refusal.sentence and "A_log" in refusal.equation
    assert Path(refusal.source.file).name == "test_records.py"
    assert (refusal.source.line, refusal.source.code) == line_of(helper, "step = ")
    assert refusal.source.place.endswith(f"test_records.py:{refusal.source.line}")
    text = render(report)
    assert "gating unmatched, 2 times" in text and f"test_records.py:{refusal.source.line}\n   | step = F.softplus(" in text


class Right(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, a, b):
        first = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        second = -self.A_log.exp() * F.softplus(b + self.dt_bias)
        return first, second


def test_a_line_is_no_part_of_a_structure():
    report = compiled_report(Right(), torch.randn(2, 4), torch.randn(2, 4))
    first, second = (r for r in report.all_records if r.rule == "gating" and r.stage == "lift")
    assert second.source.line == first.source.line + 1 and first.status is second.status is Status.FIRED
    assert second.proof_cached


def test_lines_are_those_of_the_model_not_of_what_it_calls(decode_report):
    places = {(Path(r.source.file).name, r.source.function) for r in decode_report.all_records}
    assert {name for name, _ in places} == {"modeling_qwen3_5.py"} and ("modeling_qwen3_5.py", "forward") in places


def test_a_refusal_has_the_line_of_its_node():
    report = compiled_report(Right(), torch.randn(2, 4), torch.randn(2, 4), fuel=0)
    first, second = report.refusals
    assert first.status is Status.REFUSED and "fuel" in first.sentence
    lines = [line_of(Right.forward, f"{name} =")[0] for name in ("first", "second")]
    assert [first.source.line, second.source.line] == lines


def test_every_model_is_traced_with_its_own_sizes():
    config = zoo.causal_lm(**zoo.SMALL).config
    (first,), (equal,), (wide,) = (models.trace(models.meta_model(config), target="cpu", batch=batch) for batch in (1, 1, 2))
    assert first.launches_after == equal.launches_after and wide.bytes_after > first.bytes_after
    results = [o.result for structure in wide.structures for o in structure]
    assert all(size.strip().isdecimal() for r in results for sizes in re.findall(r"\[(.+?)\]", r) for size in sizes.split(","))


def test_text_falls_back_to_characters_that_can_be_printed(decode_report):
    assert "0–1" in render(decode_report) and "✓" in render(decode_report)
    plain = render(decode_report, Style(encoding="ascii"))
    assert plain.isascii() and "0-1" in plain and "+ done, x refused" in plain
    assert "\x1b" not in render(decode_report) and "\x1b[32m✓" in render(decode_report, Style(color=True))
    widths = [[len(line) for line in text.splitlines()] for text in (plain, render(decode_report))]
    assert widths[0] == widths[1]


def test_text_of_layers_that_are_not_fused():
    refused = Record("causal_conv_update", "lift", Status.REFUSED, "copy_", reason="The window must be 4 wide, found 3.")
    layers = [LayerReport(f"model.layers.{i}.linear_attn", note="Found no conv.", records=[refused]) for i in (0, 1, 2, 4)]
    out = render(GraphReport(0, phase="decode", layers=layers, inner="eager"))
    assert "Not fused: model.layers.*.linear_attn (0–2, 4). Found no conv." in out
    assert "causal_conv_update refused, 4 times" in out and "The window must be 4 wide" in out


def test_text_of_a_graph_without_gdn():
    assert "no GDN layer" in render(GraphReport(0, inner="eager"))


def test_numbers_and_ranges():
    assert [size(n) for n in (0, 999, 1000, 123456, 2.5e9, 3e15)] == ["0 B", "999 B", "1 kB", "123 kB", "2.5 GB", "3e+03 TB"]
    assert pair(2000, 1500) == "2 → 1.5 kB" and pair(2000, 2) == "2 kB → 2 B"
    assert ranges([4, 0, 2, 1, 6, 7]) == ["0–2", "4", "6–7"]


def test_the_docs_list_exactly_the_fields_of_the_json(decode_report):
    gates = compiled_report(Gates(), torch.zeros(2, 4))
    compared = dataclasses.replace(decode_report, comparisons=[Comparison("output 0", 0.0, 0.0, True)])
    wanted = documented(REPORT)
    about = dict.fromkeys(wanted["document.about"], "")
    data = json.loads(json.dumps(document([gates, compared], about)))
    found = {
        path.removeprefix("document.graphs[].") if path.count(".") > 1 else path: names
        for path, names in fields(data, "document").items()
    }
    found = {re.sub(r"^(layers\[\]\.)?records", "records", path): names for path, names in found.items()}
    found = {"source" if path.endswith("source") else path: names for path, names in found.items()}
    assert {path: sorted(names) for path, names in found.items()} == {p: sorted(names) for p, names in wanted.items()}
    assert data["schema"] in REPORT.read_text()


def test_the_commands_of_the_docs_parse():
    (block,) = blocks(REPORT, "console")
    for line in block.splitlines():
        _parser().parse_args(shlex.split(line, comments=True)[1:])


def test_a_survey_that_fails_costs_no_fusion(monkeypatch):
    monkeypatch.setattr(survey, "take", lambda gm: 1 / 0)
    report = compiled_report(Right(), torch.randn(2, 4), torch.randn(2, 4))
    assert report.rewritten and [r.status for r in report.all_records if r.stage == "lift"] == [Status.FIRED] * 2
    assert report.blocks == [] and report.summary() in render(report)

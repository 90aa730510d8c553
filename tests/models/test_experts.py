"""Mixtures of experts as transformers has them: each block is a router and experts, whatever it is loaded with, and as eager is.

Where fewer experts are chosen than there are, a rounding may choose others, and no error says how well they were computed. So in
half precision a block is compared on the same rows, with the float64 result of the experts that eager chose.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import gdnfuse
from gdnfuse.dialect import experts as meaning
from tests.models import zoo
from tests.models.test_families import family_of

SIZES = {"num_experts": 8, "num_experts_per_tok": 2}
FEW = {1: ["routed_experts"]}  # what a block becomes for one row, and for several
SEVERAL = ["route", "experts"]


def compiled(module, **options):
    return torch.compile(module, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True, **options})


def moe_blocks():
    return [(report, b) for report in gdnfuse.reports() for b in report.blocks if b.kind == "MoE"]


def ops(report, block):
    return [o.op for o in report.structures[block.after] if o.kernels and o.op not in ("rms_norm", "add_rms_norm", "add")]


@pytest.mark.parametrize(
    ("name", "sizes", "batch", "padded"),
    [
        ("qwen3_5_moe", SIZES, 1, False),
        pytest.param("qwen3_5_moe", SIZES, 5, True, marks=pytest.mark.sweep),
        ("qwen3_next", SIZES | {"norm_topk_prob": False}, 2, True),
        pytest.param(
            "qwen3_next",
            {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 16},
            1,
            False,
            marks=pytest.mark.sweep,
        ),
        pytest.param("lara_mini", SIZES, 1, False, marks=pytest.mark.sweep),
        pytest.param("lara_mini", SIZES, 33, False, marks=pytest.mark.sweep),  # of two sequences it is in test_families
    ],
)
@torch.no_grad()
def test_prompts_and_steps(name, sizes, batch, padded):
    family = family_of(name)
    model = family.build(**sizes, **({} if name == "lara_mini" else zoo.SMALL))
    ours, results, caches = copy.deepcopy(model), [], []
    pointers = {name: p.data_ptr() for name, p in ours.named_parameters() if ".experts." in name}
    for owner, call in ((ours, compiled(ours)), (model, model)):
        cache = zoo.new_cache(owner, "static", 40)
        ids, mask = zoo.prompt(batch, 20, padded=padded)
        prompt = call(input_ids=ids, attention_mask=mask, **zoo.held(cache)).logits
        steps = zoo.decode(call, cache, mask, zoo.tokens_for(batch, 3))
        prompt = prompt if mask is None else prompt[mask.bool()]
        results.append(torch.cat([x.flatten() for x in (prompt, steps)]))
        caches.append(cache)
    assert zoo.relative(*results) < 1e-5
    for kind in ("recurrent", "conv"):
        assert zoo.relative(*(zoo.flat_states(c, kind) for c in caches)) < 1e-5
    for report, block in moe_blocks():
        assert block.fused == "fused", block.marks
        assert {"router", "experts"} <= block.marks.keys()
        if report.phase == "decode" and batch <= 32:
            assert ops(report, block) == FEW.get(batch, SEVERAL)
    # Experts' weights lie where they lay, each in memory of its own.
    for name, p in ours.named_parameters():
        if ".experts." in name:
            assert p.data_ptr() == pointers[name] and p.untyped_storage().nbytes() == p.nbytes


class Layer(nn.Module):
    """A block with the norm before it and the sum behind it, as a decoder layer has them."""

    def __init__(self, model):
        super().__init__()
        layer = model.model.layers[0]
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, h):
        return h + self.mlp(self.post_attention_layernorm(h))

    def with_choice_of(self, h):
        """In float64, but with the experts and weights that eager chooses; and these."""
        x = self.post_attention_layernorm(h).view(-1, h.shape[-1])
        _, weights, indices = self.mlp.gate(x)
        wide, x = copy.deepcopy(self.mlp).double(), x.double()
        y = meaning.reference(x, indices, weights.double(), wide.experts.gate_up_proj, wide.experts.down_proj)
        shared = wide.shared_expert(x)
        if hasattr(wide, "shared_expert_gate"):
            shared = F.sigmoid(wide.shared_expert_gate(x)) * shared
        return h.double() + (y + shared).view(h.shape), indices


def ties(router):
    """Experts in pairs: the logits of each pair are equal for every row."""
    router[1::2] = router[::2]


def one_for_all(router):
    """Every row chooses expert 3 first."""
    router.mul_(0.1)
    router[3] = 1.0


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCKS = [
    ("qwen3_5_moe", SIZES, "fp32", 1, ties), ("qwen3_5_moe", SIZES, "bf16", 5, ties), ("qwen3_5_moe", SIZES, "fp16", 2, None),
    ("qwen3_5_moe", SIZES, "bf16", 33, one_for_all), ("qwen3_next", SIZES | {"num_experts_per_tok": 1}, "bf16", 1, one_for_all),
    ("qwen3_next", {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 16}, "bf16", 5, None),
    ("lara_mini", SIZES, "bf16", 1, ties), ("lara_mini", SIZES, "fp16", 5, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sizes", "dtype", "rows", "edit"), BLOCKS)
@torch.no_grad()
def test_blocks_are_no_less_accurate_than_eager(name, sizes, dtype, rows, edit):
    kinds = {} if name == "lara_mini" else {"layer_types": zoo.TEXT["layer_types"]}
    layer = Layer(family_of(name).build(**sizes, **kinds, num_hidden_layers=3)).to(DTYPES[dtype])
    if edit is not None:
        edit(layer.mlp.gate.weight)
    ours = copy.deepcopy(layer)
    run, errors = compiled(ours), {"ours": [], "eager": []}
    # Several draws in one figure: the error of a single one is a draw.
    for seed in range(8):
        h = torch.randn(rows, 1, 64, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])
        if edit is one_for_all:
            h = h.abs()
        wanted, indices = layer.with_choice_of(h)
        if edit is one_for_all:
            assert (indices[:, 0] == 3).all()
        for side, call in (("ours", run), ("eager", layer)):
            errors[side].append((call(h).double() - wanted).norm() / wanted.norm())
    floor = 1e-6 if dtype == "fp32" else 0.0
    assert sum(errors["ours"]) <= 1.1 * sum(errors["eager"]) + floor
    (report,) = gdnfuse.reports()
    fired = {r.rule for r in report.all_records if r.status == "fired" and r.stage in ("lift", "fuse")}
    wanted = {"route"} | ({"shared_expert"} if rows <= 32 else set())
    assert fired >= wanted | ({"route_experts", "norm_experts", "residual_experts"} if rows == 1 else set())


@pytest.mark.parametrize(
    "implementation", ["eager", "deepgemm", *(pytest.param(i, marks=pytest.mark.sweep) for i in ("batched_mm", "sonicmoe"))]
)
@torch.no_grad()
def test_whatever_they_were_loaded_with(implementation):
    """grouped_mm is the default; the last two need GPUs that are not here, so what they would give is the loop's."""
    model = zoo.moe(**SIZES, **zoo.SMALL)
    ours = copy.deepcopy(model)
    zoo.text_config(ours)._experts_implementation = implementation
    zoo.text_config(model)._experts_implementation = "eager"
    results = []
    for call in (compiled(ours), model):
        cache, _ = zoo.prefill(model, 1, "static")
        results.append(zoo.decode(call, cache, None, zoo.tokens_for(1, 2)))
    assert zoo.relative(*results) < 1e-5
    assert [ops(*found) for found in moe_blocks()] == [FEW[1]] * 2


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
@torch.no_grad()
def test_models_without_a_gated_delta_rule(name):
    """No rule asks for a model's name."""
    sizes = {"num_local_experts": 8, "intermediate_size": 32} if name == "Mixtral" else {"num_experts": 8, "head_dim": 16}
    sizes |= {"moe_intermediate_size": 32} if name != "Mixtral" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts_per_tok=2, initializer_range=0.1, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    results = []
    for call in (compiled(model, strict=False), model):
        cache, _ = zoo.prefill(model, 1, "static")
        results.append(zoo.decode(call, cache, None, zoo.tokens_for(1, 2)))
    assert zoo.relative(*results) < 1e-5
    (report,) = gdnfuse.reports()
    assert " (other): no GDN layer found, " in report.summary() and "unchanged" not in report.summary()
    assert [ops(*found) for found in moe_blocks()] == [FEW[1]] * 2


@torch.no_grad()
def test_the_choice_is_eagers_to_the_bit():
    """In bfloat16 many logits are equal; a token that went to other experts than eager's would be another token."""
    layer = Layer(zoo.moe(num_experts=64, num_experts_per_tok=4, num_hidden_layers=3)).bfloat16()
    layer.mlp.gate.weight.copy_((layer.mlp.gate.weight * 4).round() / 4)
    x = (torch.randn(64, 64) * 2).round().bfloat16() / 2
    logits = F.linear(x, layer.mlp.gate.weight).sort(-1, descending=True).values
    assert (logits[:, 3] == logits[:, 4]).any()
    _, weights, indices = layer.mlp.gate(x)
    found = compiled(lambda x: layer.mlp.gate(x)[1:], strict=False)
    # Alone a router is no graph of ours; with its experts it is.
    assert torch.equal(found(x)[1], indices) and torch.equal(found(x)[0], weights)
    gdnfuse.clear_reports()

    def block(x):
        _, weights, indices = layer.mlp.gate(x)
        return layer.mlp.experts(x, indices, weights), weights, indices

    _, found_weights, found_indices = compiled(block, strict=False)(x)
    (report,) = gdnfuse.reports()
    assert any(r.rule == "route" and r.status == "fired" for r in report.records)
    assert torch.equal(found_indices, indices) and torch.equal(found_weights, weights)


@torch.no_grad()
def test_an_adapter_on_attention_leaves_experts_fused():
    model = zoo.moe(**SIZES, **zoo.SMALL)
    attention = model.model.layers[1].self_attn

    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(64, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    attention.q_proj, attention.v_proj = LoRA(attention.q_proj), LoRA(attention.v_proj)
    model.requires_grad_(False)
    cache, _ = zoo.prefill(model, 1, "static")
    other = copy.deepcopy(cache)
    found = zoo.decode(compiled(model), cache, None, zoo.tokens_for(1, 2))
    assert zoo.relative(found, zoo.decode(model, other, None, zoo.tokens_for(1, 2))) < 1e-5
    assert [ops(*found) for found in moe_blocks()] == [FEW[1]] * 2

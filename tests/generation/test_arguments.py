"""Calls that no answer could be right for are refused with a sentence before anything runs, and cost nothing of the next call."""

import copy

import pytest
import torch

import gdnfuse
from tests.models import zoo
from tests.sweeps import some

BOUNDS = torch.tensor([0, 6, 13], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}
ANEW = torch.cat([torch.arange(6), torch.arange(7)])[None]
APART = {**PACKED, "use_cache": False, "position_ids": ANEW}
MIXED = {
    "a cache": {**PACKED, "position_ids": ANEW},
    "no position_ids": {**PACKED, "use_cache": False},
    "an attention_mask": {**APART, "attention_mask": torch.ones(1, 13, dtype=torch.long)},
}


@pytest.fixture(scope="module")
def model():
    model = zoo.causal_lm(**zoo.SMALL)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(params=["gdnfuse.compile", "backend"])
def run(request, model):
    if request.param == "backend":
        return torch.compile(copy.deepcopy(model), backend="gdnfuse", options={"inner": "eager"})
    return gdnfuse.compile(copy.deepcopy(model), inner="eager")


IDS, _ = zoo.prompt(1, 13)


@torch.no_grad()
def test_packed_sequences_are_kept_apart_or_refused(run, model):
    """Stock transformers raises at all of them without a kernel library, and with one mixes them in attention without a word."""
    for found, kwargs in MIXED.items():
        with pytest.raises(Exception, match="(?s)Sequences packed with cu_seq_lens_q must .*use_cache=False and no") as error:
            run(IDS, **kwargs)
        if not hasattr(run, "_orig_mod"):
            assert isinstance(error.value, gdnfuse.GdnfuseError) and str(error.value).endswith(f"; found {found}.")
        assert not gdnfuse.reports()
    apart = torch.cat([model(ids, use_cache=False).logits for ids in (IDS[:, :6], IDS[:, 6:])], 1)
    assert zoo.relative(run(IDS, **APART).logits, apart) < 1e-5
    assert gdnfuse.reports()[-1].fused_layers == 1


@torch.no_grad()
def test_packed_sequences_of_attention_written_out(model):
    written_out = copy.deepcopy(model)
    written_out.set_attn_implementation("eager")
    run = torch.compile(written_out, backend="gdnfuse", options={"inner": "eager"})
    with pytest.raises(Exception, match="Sequences packed with cu_seq_lens_q must be kept apart by attention too"):
        run(IDS, **MIXED["a cache"])
    apart = torch.cat([model(ids, use_cache=False).logits for ids in (IDS[:, :6], IDS[:, 6:])], 1)
    assert zoo.relative(run(IDS, **APART).logits, apart) < 1e-5


@pytest.mark.parametrize("run", some(["gdnfuse.compile", "backend"], "backend"), indirect=True)
@torch.no_grad()
def test_a_mask_of_ones_own_may_keep_packed_sequences_apart(run, model):
    """[1, 1, T, T], of rows and columns: whose it is what it hides."""
    of = torch.repeat_interleave(torch.arange(2), torch.tensor([6, 7]))
    mask = (of[:, None] == of) & torch.ones(13, 13, dtype=torch.bool).tril()
    apart = torch.cat([model(ids, use_cache=False).logits for ids in (IDS[:, :6], IDS[:, 6:])], 1)
    found = run(IDS, **{**APART, "attention_mask": {"full_attention": mask[None, None], "linear_attention": None}}).logits
    assert zoo.relative(found, apart) < 1e-5


EMPTY = {"no token": IDS[:, :0], "no row": IDS[:0], "no row of a step": IDS[:0, :1]}


@torch.no_grad()
def test_a_call_without_rows_or_tokens_is_eagers_error(run, model):
    """Dynamo's has eager's in it, where the backend is not even asked."""
    for what, ids in EMPTY.items():
        cache = zoo.new_cache(model, "static")
        with pytest.raises(RuntimeError) as eager:
            model(ids, **zoo.held(zoo.new_cache(model, "static")))
        with pytest.raises(RuntimeError) as error:
            run(ids, **zoo.held(cache))
        if hasattr(run, "_orig_mod"):
            assert str(eager.value)[:40] in str(error.value), what
        else:
            wanted = f"A call must have at least one row and one token, found input_ids of the shape {list(ids.shape)}."
            assert isinstance(error.value, gdnfuse.GdnfuseError) and str(error.value) == wanted
        assert not cache.is_initialized and not gdnfuse.reports()
    assert zoo.relative(run(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits) < 1e-5


def test_generate_and_embeddings_without_rows_or_tokens():
    model = zoo.causal_lm(**zoo.SMALL)
    gdnfuse.compile(model, inner="eager")
    with pytest.raises(gdnfuse.GdnfuseError, match=r"found input_ids of the shape \[0, 13\]\."):
        model.generate(IDS[:0], max_new_tokens=2, pad_token_id=0)
    with pytest.raises(gdnfuse.GdnfuseError, match=r"found inputs_embeds of the shape \[2, 0, 64\]\."):
        model(inputs_embeds=torch.randn(2, 0, 64))

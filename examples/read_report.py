"""The report is data: which layers are fused, what each rule did, and why a layer was left alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from small_model import small_model
from transformers import StaticCache

import gdnfuse


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> list[gdnfuse.GraphReport]:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    model = small_model()
    cache = StaticCache(config=model.config, max_cache_len=32)
    prompt = torch.randint(0, model.config.vocab_size, (1, 8))
    token = model(prompt, None, None, cache).logits[:, -1:].argmax(-1)
    gdnfuse.clear_reports()
    torch.compile(model, backend="gdnfuse", options={"inner": "eager"})(token, None, None, cache)

    for report in gdnfuse.reports():
        print(report.summary())
        for layer in report.layers:
            print(f"  {layer.path}: {' → '.join(layer.ops_after) if layer.fused else layer.why_not}")
            for record in layer.records:
                proof = "traced as one op" if record.proof_error is None else f"proved to {record.proof_error:.0e}"
                outcome = record.reason or record.chosen or proof
                print(f"    {record.stage:5} {record.rule:20} {record.status}: {outcome}")
    return gdnfuse.reports()


if __name__ == "__main__":
    main()

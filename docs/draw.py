"""Draw one Gated DeltaNet layer after each stage of the compiler: docs/decode.svg and docs/prefill.svg.

    python docs/draw.py

A box is an operation that computes, in the order of the graph; views are left out. Blue ones are gdnfuse's. The decode step is
drawn without capture, so that it shows the original code of the rule and the convolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gdnfuse.dialect import OPS
from gdnfuse.models import load_config, meta_model, trace
from gdnfuse.report.records import Operation

STAGES = {"normalize": "the original", "lift": "after lift", "fuse": "after fuse", "lower": "after lower"}
WIDTH, HEIGHT, GAP, TOP, MARGIN = 224, 17, 4, 30, 12
STYLE = """
text { font: 11px ui-monospace, monospace; fill: #24292f } .head { font-weight: bold }
rect { fill: #eef1f4; stroke: #c3cad2 } .ours rect { fill: #d3e5fb; stroke: #6ea8e8 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } rect { fill: #22272e; stroke: #444c56 } .ours rect { fill: #143d6b; stroke: #316dca }
}
"""


def operations(phase: str) -> dict[str, list[Operation]]:
    """What the first layer of Qwen3.5-4B computes, at batch 1, by stage."""
    config = load_config("4b").get_text_config(decoder=True)
    config.num_hidden_layers, config.layer_types = 2, ["linear_attention", "full_attention"]
    model, found = meta_model(config), {}
    for stage in list(STAGES)[1:]:
        options = {"target": "cuda", "inner": "eager", "stop_after": stage, "capture": phase == "prefill"}
        (report,) = trace(model, phase=phase, **options)
        block = next(b for b in report.blocks if b.kind == "linear attention")
        found.setdefault("normalize", report.structures[block.before])
        found[stage] = report.structures[block.after]
    return {stage: [op for op in ops if op.kernels] for stage, ops in found.items()}


def drawing(phase: str) -> str:
    columns = operations(phase)
    rows = max(map(len, columns.values()))
    width, height = len(columns) * WIDTH + 2 * MARGIN, TOP + rows * (HEIGHT + GAP) + 2 * MARGIN
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">']
    parts.append(f"<title>A Gated DeltaNet layer of Qwen3.5-4B, {phase}, stage by stage</title><style>{STYLE}</style>")
    for i, (stage, ops) in enumerate(columns.items()):
        x = MARGIN + i * WIDTH
        parts.append(f'<text class="head" x="{x}" y="{MARGIN + 12}">{STAGES[stage]}: {len(ops)}</text>')
        for j, op in enumerate(ops):
            y = TOP + MARGIN + j * (HEIGHT + GAP)
            name = f"{op.op} ({op.kernels} kernels)" if stage == "lower" and op.kernels > 1 else op.op
            parts.append(f'<g class="{"ours" if op.op in OPS else "torch"}">')
            parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH - 14}" height="{HEIGHT}" rx="3"/>')
            parts.append(f'<text x="{x + 6}" y="{y + 12}">{escape(name)}</text></g>')
    return "\n".join([*parts, "</svg>\n"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    args = parser.parse_args(argv)
    for phase in ("decode", "prefill"):
        (args.out / f"{phase}.svg").write_text(drawing(phase))


if __name__ == "__main__":
    main()

"""A layer written by hand. gdnfuse matches what it computes, not its names. Results are compared with the uncompiled layer."""

import argparse

import torch
from handwritten_layer import WIDTH, Memory

import gdnfuse


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    layer, tokens = Memory(), torch.randn(args.tokens, args.batch, WIDTH)
    step = torch.compile(layer, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True})

    ours, eager = layer.empty(args.batch), layer.empty(args.batch)
    for x in tokens:
        torch.testing.assert_close(step(x, *ours), layer(x, *eager), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)

    report = gdnfuse.reports()[-1]
    print(report.summary())
    print(f"{report.layers[0].path}: {' → '.join(report.layers[0].ops_after)}")
    print(f"outputs and both states are eager's after {args.tokens} tokens")
    return report


if __name__ == "__main__":
    main()

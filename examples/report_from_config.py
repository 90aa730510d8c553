"""What would be fused in a model, from its config alone: no weights, no GPU.

The same as `gdnfuse report CONFIG --batch 8`, in Python. The model has no memory and is traced for a GPU that need not be there.
"""

import argparse

from gdnfuse.models import load_config, meta_model, trace


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="0.8b", help="preset, config.json, model folder or hub id")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args(argv)
    reports = trace(meta_model(load_config(args.config)), batch=args.batch, target="cuda", inner="eager")
    for report in reports:
        print(report.summary())
        for layer in report.layers:
            print(f"  {layer.path}: {'fused' if layer.fused else layer.why_not}")
    return reports


if __name__ == "__main__":
    main()

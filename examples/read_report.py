"""The report as data: which layers are fused, what each rule did, and why a layer was not fused."""

from pretrained import arguments, load

import gdnfuse


def main(argv=None):
    args = arguments(__doc__, argv, tokens=2)
    model, tokenizer = load(args.model)
    gdnfuse.compile(model, inner=args.inner)
    prompt = tokenizer("The delta rule", return_tensors="pt").to(model.device)
    model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False)

    for report in gdnfuse.reports():
        print(report.summary())
        for layer in report.layers:
            print(f"  {layer.path}: {' → '.join(layer.ops_after) if layer.fused else layer.why_not}")
            for record in layer.records:
                proof = "traced as one op" if record.proof_error is None else f"proved to {record.proof_error:.0e}"
                print(f"    {record.stage:5} {record.rule:20} {record.status}: {record.reason or record.chosen or proof}")
    return gdnfuse.reports()


if __name__ == "__main__":
    main()

"""Prompts of different lengths in one batch, padded on the left, and the same prompts one by one."""

from pretrained import arguments, load

import gdnfuse

PROMPTS = ["Delta", "A longer one", "The longest of all"]


def main(argv=None):
    args = arguments(__doc__, argv, tokens=16)
    model, tokenizer = load(args.model)
    gdnfuse.compile(model, inner=args.inner)
    asked = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False, "cache_implementation": "static"}

    def generate(prompts):
        batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        tokens = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **asked)
        return tokens[:, batch.input_ids.shape[1] :]

    together, alone = generate(PROMPTS), [generate([prompt])[0] for prompt in PROMPTS]
    for prompt, row, single in zip(PROMPTS, together, alone, strict=True):
        print(
            f"{prompt!r}: {tokenizer.decode(row)!r}, alone {'the same' if row.equal(single) else repr(tokenizer.decode(single))}"
        )
    for report in gdnfuse.reports():
        print(report.summary())
    return together, alone


if __name__ == "__main__":
    main()

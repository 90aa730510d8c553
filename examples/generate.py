"""Compile a model in place and call `generate()`. Nothing else changes."""

from pretrained import arguments, load

import gdnfuse


def main(argv=None):
    args = arguments(__doc__, argv)
    model, tokenizer = load(args.model)
    gdnfuse.compile(model, inner=args.inner)

    prompt = tokenizer("The delta rule", return_tensors="pt").to(model.device)
    asked = {"max_new_tokens": args.tokens, "do_sample": False, "cache_implementation": "static"}
    tokens = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, **asked)

    print(tokenizer.decode(tokens[0]))
    print(gdnfuse.reports()[-1].summary())
    return tokens


if __name__ == "__main__":
    main()

"""Speculative decoding: tokens that occurred in the prompt before are drafted, and one step checks several."""

from pretrained import arguments, load

import gdnfuse


def main(argv=None):
    args = arguments(__doc__, argv, tokens=48)
    model, tokenizer = load(args.model)
    prompt = tokenizer("The delta rule. The delta rule. The delta", return_tensors="pt").input_ids.to(model.device)
    asked = {"max_new_tokens": args.tokens, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(prompt, **asked)

    gdnfuse.compile(model, inner=args.inner, speculate=gdnfuse.PromptLookup(4))
    tokens = model.generate(prompt, **asked)

    print(tokenizer.decode(tokens[0]))
    print(model.generate.acceptance)
    print("the same tokens:", tokens.equal(plain))
    return tokens, plain


if __name__ == "__main__":
    main()

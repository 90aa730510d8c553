"""Three questions about one document. The document is computed once, and each prompt uses what is known of it."""

from pretrained import arguments, load

import gdnfuse

QUESTIONS = ["Who wrote it?", "What is it about, in one sentence?", "Is it true?"]


def main(argv=None, document="All that is known of the delta rule. " * 40):
    args = arguments(__doc__, argv, tokens=4)
    model, tokenizer = load(args.model)
    store = gdnfuse.PrefixStore(model, every=512, max_bytes=1 << 30)
    gdnfuse.compile(model, prefixes=store, inner=args.inner)

    taken = []
    for question in QUESTIONS:
        before = store.stats().tokens_taken
        prompt = tokenizer(document + question, return_tensors="pt").input_ids.to(model.device)
        model.generate(prompt, max_new_tokens=args.tokens, do_sample=False)
        taken.append(store.stats().tokens_taken - before)
        print(f"{taken[-1]} of the {prompt.shape[1]} tokens of the prompt were known")
    return taken


if __name__ == "__main__":
    main()

"""A decode loop of your own: an eager prompt into a StaticCache, then one compiled graph for every token."""

import torch
from pretrained import arguments, load
from transformers import StaticCache

import gdnfuse


@torch.no_grad()
def main(argv=None):
    args = arguments(__doc__, argv)
    model, tokenizer = load(args.model)
    prompt = tokenizer("The delta rule", return_tensors="pt").input_ids.to(model.device)

    # torch takes either `mode` or options. With options, CUDA graphs are an option of Inductor.
    inductor = {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
    options = {"inner": args.inner, "inductor": inductor, "strict": True}
    step = torch.compile(model, backend="gdnfuse", options=options, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + args.tokens)
    # The prompt runs eagerly. It creates the states, and a CUDA graph can write only states that exist before it.
    # The cache comes after mask and positions. Its keyword is cache= since transformers 5.24, past_key_values= before.
    tokens = [model(prompt, None, None, cache).logits[:, -1:].argmax(-1)]
    for _ in range(args.tokens - 1):
        torch.compiler.cudagraph_mark_step_begin()
        tokens.append(step(tokens[-1], None, None, cache).logits[:, -1:].argmax(-1))

    print(tokenizer.decode(torch.cat(tokens, 1)[0]))
    print(gdnfuse.reports()[-1].summary())
    return torch.cat(tokens, 1)


if __name__ == "__main__":
    main()

"""An adapter of peft with a compiled model: active, disabled, merged into the weights, and unmerged again.

Merging writes the weights in place. The packed weight that the kernels read is the same memory, so nothing is packed again.
"""

import peft
import torch
from pretrained import arguments, load

import gdnfuse


@torch.no_grad()
def main(argv=None):
    args = arguments(__doc__, argv, tokens=16)
    model, tokenizer = load(args.model)
    lora = peft.LoraConfig(target_modules=["out_proj"], init_lora_weights=False)  # not zero, as after training
    model = gdnfuse.compile(peft.get_peft_model(model, lora), inner=args.inner)
    prompt = tokenizer("The delta rule", return_tensors="pt").to(model.device)

    def generate(name):
        tokens = model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False)[0, prompt.input_ids.shape[1] :]
        print(f"{name:>9}: {tokenizer.decode(tokens)!r}")
        return tokens

    tokens = {"active": generate("active")}
    with model.disable_adapter():
        tokens["off"] = generate("off")
    model.merge_adapter()
    tokens["merged"] = generate("merged")
    model.unmerge_adapter()
    tokens["unmerged"] = generate("unmerged")
    print(gdnfuse.reports()[-1].summary())
    return tokens


if __name__ == "__main__":
    main()

"""Routing that roundings do not change: how logits of a mixture of experts with random weights are compared.

A router of random weights has its last choice and the first that it does not make so near to each other that a rounding swaps
them, in some of forty layers for each token. Logits are then those of other experts, and their error says nothing.

So while logits are compared, the token chooses its experts. Tokens fall into classes. Each class has a column of the embedding
that is its own, which no layer writes, and for each class and layer some experts are drawn whose router weighs that column: by so
much that all their logits are far above all others', and that they differ among each other as before. All sides and the oracle
then make the same choices, and everything else of a layer is compared as it is, the weights of the chosen experts included.

What is timed are the random routers again: they are put back, in place, before.
"""

from __future__ import annotations

import weakref

import torch

CLASSES, TOKENS = 64, 64  # at most; and those from which sizes are read off
TIMES = 20.0  # the root mean square of what layers write, in a class's column
FAR = 12.0  # standard deviations of a router's logits, by which chosen ones are above others
WRITES = ("o_proj", "out_proj", "down_proj")  # whose output is added to what all layers share
_own: weakref.WeakKeyDictionary[torch.nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()  # weights of routers


def hold(model: torch.nn.Module) -> None:
    """Steer a model's routers by its tokens, in place. A model without experts stays as it is."""
    config = model.config.get_text_config(decoder=True)
    if not (experts := getattr(config, "num_experts", None)):
        return
    routers = [m for m in model.modules() if hasattr(m, "top_k") and getattr(m, "weight", torch.empty(0)).ndim == 2]
    embedding = model.get_input_embeddings().weight
    classes = min(CLASSES, config.hidden_size // 4)
    of_token = torch.arange(len(embedding), device=embedding.device) % classes
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(embedding), (1, TOKENS), generator=generator).to(embedding.device)
    written = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    column = TIMES * max(float(x.float().square().mean().sqrt()) for x in written)
    embedding[:, :classes] = 0
    embedding[torch.arange(len(embedding), device=embedding.device), of_token] = column
    for name, p in model.named_parameters():
        if any(part in WRITES for part in name.split(".")) and p.ndim > 1:
            p[..., :classes, :] = 0  # [out, in], or [experts, out, in]
    _own.update((router, router.weight.clone()) for router in routers)
    seen: list[torch.Tensor] = []
    hooks = [r.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).float())) for r in routers]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for router, x in zip(routers, seen, strict=True):
        w = router.weight
        w[:, :classes] = 0
        spread = float((x @ w.float().T).std())
        strength = float(x[torch.arange(TOKENS, device=x.device), of_token[ids[0]]].mean())
        for one in range(classes):
            w[torch.randperm(experts, generator=generator)[: router.top_k].to(w.device), one] = FAR * spread / strength


def put_back(model: torch.nn.Module) -> None:
    """Give the routers that `hold` has steered their own weights, in place."""
    for module in model.modules():
        if module in _own:
            module.weight.copy_(_own.pop(module))

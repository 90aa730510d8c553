"""A Gated DeltaNet layer that shares no code with transformers: gdnfuse matches what is computed, not what it is called.

One matrix makes the gates, q, k and v of one key head after the other, and the output's gate, which is a sigmoid. The conv has
neither bias nor activation, and its window no column to spare. Keys are divided by their length, and little has its usual order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F

import gdnfuse

WIDTH, HEADS, GROUP, KEY, VALUE, TAPS = 64, 2, 2, 16, 32, 4  # each of HEADS keys serves GROUP values
VALUES = HEADS * GROUP


class Memory(torch.nn.Module):
    """One token, x [B, WIDTH] → [B, WIDTH]; window [B, channels, TAPS − 1] and memory [B, VALUES, KEY, VALUE] are moved on."""

    def __init__(self):
        super().__init__()
        of = lambda *shape: torch.nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)  # noqa: E731
        self.head = (KEY, KEY, GROUP * VALUE)
        self.channels = HEADS * sum(self.head)
        self.inner = of(2 * VALUES + self.channels + VALUES * VALUE, WIDTH)
        self.taps, self.pace, self.bias = of(self.channels, 1, TAPS), of(VALUES), of(VALUES)
        self.loud, self.outer = of(VALUE), of(WIDTH, VALUES * VALUE)

    def forward(self, x, window, memory):
        rate, pace, mixed, gate = F.linear(x, self.inner).split([VALUES, VALUES, self.channels, VALUES * VALUE], -1)
        q, k, v = mixed.unflatten(-1, (HEADS, -1)).split(self.head, -1)
        seen = torch.cat((window, torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), -1).unsqueeze(-1)), -1)
        window.copy_(seen[..., 1:])
        q, k, v = F.conv1d(seen, self.taps, groups=self.channels).squeeze(-1).split([HEADS * n for n in self.head], -1)
        q, k = (t.view(-1, HEADS, KEY).repeat_interleave(GROUP, 1) for t in (q, k))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-5).sqrt() for t in (q, k))
        decay = torch.exp(-F.softplus(self.bias + pace) * self.pace.exp())

        faded = decay[..., None, None] * memory
        error = v.view(-1, VALUES, VALUE) - (k[..., None] * faded).sum(-2)
        learned = faded + k[..., None] * (error * torch.sigmoid(rate)[..., None]).unsqueeze(-2)
        memory.copy_(learned)
        read = (learned * q[..., None]).sum(-2)

        loud = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-5) * self.loud
        return F.linear((loud * torch.sigmoid(gate.view_as(loud))).flatten(1), self.outer)

    def empty(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(batch, self.channels, TAPS - 1), torch.zeros(batch, VALUES, KEY, VALUE)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> gdnfuse.GraphReport:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    layer = Memory()
    tokens = torch.randn(args.tokens, args.batch, WIDTH)
    gdnfuse.clear_reports()
    step = torch.compile(layer, backend="gdnfuse", fullgraph=True, options={"inner": "eager", "strict": True})

    ours, eager = layer.empty(args.batch), layer.empty(args.batch)
    for x in tokens:
        torch.testing.assert_close(step(x, *ours), layer(x, *eager), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    (report,) = gdnfuse.reports()
    print(report.summary())
    print(f"{report.layers[0].path}: {' → '.join(report.layers[0].ops_after)}")
    print(f"outputs and both states are eager's after {args.tokens} tokens")
    return report


if __name__ == "__main__":
    main()

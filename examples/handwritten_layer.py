"""A Gated DeltaNet layer that shares no code with transformers, one token at a time.

One matrix computes the gates, then q, k and v of one key head after the other, and the output's gate, which is a sigmoid. The
conv has neither bias nor activation. Keys are divided by their length, and few things are in their usual order.
"""

import torch
import torch.nn.functional as F

WIDTH, HEADS, GROUP, KEY, VALUE, TAPS = 64, 2, 2, 16, 32, 4  # each of HEADS keys serves GROUP values
VALUES, HEAD = HEADS * GROUP, (KEY, KEY, GROUP * VALUE)
CHANNELS = HEADS * sum(HEAD)


class Memory(torch.nn.Module):
    """x [B, WIDTH] → [B, WIDTH]. Updates window [B, CHANNELS, TAPS − 1] and memory [B, VALUES, KEY, VALUE]."""

    def __init__(self):
        super().__init__()
        of = lambda *shape: torch.nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)  # noqa: E731
        self.inner, self.outer = of(2 * VALUES + CHANNELS + VALUES * VALUE, WIDTH), of(WIDTH, VALUES * VALUE)
        self.taps, self.pace, self.bias, self.loud = of(CHANNELS, 1, TAPS), of(VALUES), of(VALUES), of(VALUE)

    def forward(self, x, window, memory):
        rate, pace, mixed, gate = F.linear(x, self.inner).split([VALUES, VALUES, CHANNELS, VALUES * VALUE], -1)
        q, k, v = mixed.unflatten(-1, (HEADS, -1)).split(HEAD, -1)
        seen = torch.cat((window, torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), -1).unsqueeze(-1)), -1)
        window.copy_(seen[..., 1:])
        q, k, v = F.conv1d(seen, self.taps, groups=CHANNELS).squeeze(-1).split([HEADS * n for n in HEAD], -1)
        q, k = (t.view(-1, HEADS, KEY).repeat_interleave(GROUP, 1) for t in (q, k))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-5).sqrt() for t in (q, k))
        faded = torch.exp(-F.softplus(self.bias + pace) * self.pace.exp())[..., None, None] * memory
        error = v.view(-1, VALUES, VALUE) - (k[..., None] * faded).sum(-2)
        memory.copy_(learned := faded + k[..., None] * (error * torch.sigmoid(rate)[..., None]).unsqueeze(-2))
        loud = (read := (learned * q[..., None]).sum(-2)) * torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-5) * self.loud
        return F.linear((loud * torch.sigmoid(gate.view_as(loud))).flatten(1), self.outer)

    def empty(self, batch):
        return torch.zeros(batch, CHANNELS, TAPS - 1), torch.zeros(batch, VALUES, KEY, VALUE)

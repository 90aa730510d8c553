"""Prompt lookup on a device: what followed the last tokens of a row where they occurred before.

It finds what `PromptLookup` finds on the host (Saxena 2023, prompt lookup decoding), without the host. So the next step can be
launched while the host does not know yet which tokens the last one gave.
"""

from __future__ import annotations

import torch


class History:
    """The tokens of one row.

    Args:
        ids: [1, L], the tokens so far.
        room: the most tokens that the row gets, those that are taken back again included.
        ngram: how many last tokens to look for, at most.
    """

    def __init__(self, ids: torch.Tensor, room: int, ngram: int):
        self.ngram = ngram
        # Before the first token are some that no token equals.
        self.tokens = ids.new_full((ngram + room,), -1)
        self.tokens[ngram : ngram + ids.shape[1]] = ids[0]
        self.count = torch.full((1,), ids.shape[1], device=ids.device)
        self.places = torch.arange(room, device=ids.device)

    def add(self, tokens: torch.Tensor, kept: torch.Tensor) -> None:
        """Append the first `kept` [1] of tokens [1, T]."""
        at = self.count + (torch.arange(tokens.shape[1], device=tokens.device) + self.ngram)
        self.tokens.index_copy_(0, at, tokens[0])
        self.count = self.count + kept

    def after(self, n: int) -> torch.Tensor:
        """The n tokens [1, n] that followed the longest of the last n-grams that occurred before, at its last occurrence.

        If they reach the end of the row, the row is assumed to repeat. If none occurred, it is the last token again and again.
        """
        m, room = self.ngram, len(self.places)
        # windows[i] are the m tokens before place i.
        windows = self.tokens.unfold(0, m, 1)[:room]
        last = self.tokens[self.count + torch.arange(m, device=self.count.device)]
        alike = (windows == last).flip(1).cumprod(1).sum(1)
        best = torch.where(self.places < self.count, alike * room + self.places, 0).max()
        at = torch.where(best >= room, best % room, self.count - 1)
        period = self.count - at
        return self.tokens[at + torch.arange(n, device=at.device) % period + m][None]

"""How several ranks compute one row: each has a part of its tokens, and in attention a part of its heads.

Before attention the ranks exchange parts of tokens for parts of heads, and back behind it (Jacobs et al. 2023, "DeepSpeed Ulysses",
arXiv:2309.14509). Everything else of a layer sees tokens one by one, so that what a rank keeps of a row is its part only. The
gradient of a weight is the sum over all ranks, as ever: ZeRO need not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sft_dist.errors import ModelError

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""Of [sharers, ...] the n-th part goes to the n-th sharer; what comes back is their parts for this one. It has a gradient."""


@dataclass(frozen=True, slots=True)
class Shared:
    """This rank's share of the rows that it computes with others: the `index`-th of `count` equal parts.

    >>> Shared(1, 2, lambda parts: parts).part(torch.tensor([[5, 6, 7, 8]]))
    tensor([[7, 8]])
    """

    index: int
    count: int
    exchange: Exchange

    def part(self, of_rows: torch.Tensor) -> torch.Tensor:
        """This rank's columns of [rows, length]."""
        length = of_rows.shape[1] // self.count
        return of_rows[:, self.index * length : (self.index + 1) * length]

    def whole_rows(self, part: torch.Tensor) -> torch.Tensor:
        """[rows, heads, length / count, width] of this rank's tokens -> [rows, heads / count, length, width] of its heads.

        Raises ModelError where the heads cannot be divided.
        """
        rows, heads, length, width = part.shape
        if heads % self.count:
            raise ModelError(
                f"train.sequence_parallel: {heads} attention heads cannot be divided among {self.count} ranks"
            )
        by_sharer = part.reshape(rows, self.count, heads // self.count, length, width).transpose(0, 1)
        there = self.exchange(by_sharer.contiguous())
        return there.permute(1, 2, 0, 3, 4).reshape(rows, heads // self.count, length * self.count, width)

    def own_tokens(self, whole: torch.Tensor) -> torch.Tensor:
        """[rows, length, heads / count, width] of this rank's heads -> [rows, length / count, heads, width] of its tokens."""
        rows, length, heads, width = whole.shape
        by_sharer = whole.reshape(rows, self.count, length // self.count, heads, width).transpose(0, 1)
        there = self.exchange(by_sharer.contiguous())
        return there.permute(1, 2, 0, 3, 4).reshape(rows, length // self.count, heads * self.count, width)


def enough_heads(of_keys: torch.Tensor, heads: int, count: int) -> torch.Tensor:
    """Keys or values, [rows, heads, length, width], as often as it takes for `count` ranks to have equally many of them."""
    have = of_keys.shape[1]
    times = math.lcm(have, count) // have
    return (
        of_keys
        if times == 1
        else of_keys.repeat_interleave(times if heads % (have * times) == 0 else heads // have, dim=1)
    )

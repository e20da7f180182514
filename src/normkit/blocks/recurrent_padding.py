"""Sequences of different lengths, padded at the end: from every way to say so to lengths, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Ends:
    """Where the sequences of a batch end; ``lengths``: (n,) on the CPU, or ``None``: all after the last step."""

    def __init__(self, x: Tensor, lengths: Tensor | None) -> None:
        self.lengths = lengths
        self.counts = None if lengths is None else (torch.arange(len(x))[:, None] < lengths).to(x.device)
        """(steps, n) of bool, whether a step counts: all at once, because every copy to a GPU is waited for."""
        self.shortest = len(x) if lengths is None else int(lengths.min())
        self.longest = len(x) if lengths is None else int(lengths.max())

    def going(self, step: int) -> Tensor | None:
        """(n,) of bool, who has not ended before a step; ``None``: nobody has."""
        return None if self.counts is None or step < self.shortest else self.counts[step]


def lengths_of(name: str, lengths: Tensor | Sequence[int] | None, mask: Tensor | None, steps: int) -> Tensor | None:
    """The lengths, (n,) int64 on the CPU; ``mask``: (steps, n), True where a step counts. ``None``: all steps count."""
    if lengths is not None and mask is not None:
        raise ValueError(f"{name}: lengths= and mask= say the same thing; give one of them")
    if mask is not None:
        lengths = mask.sum(0).cpu()
        if mask.dtype != torch.bool or not mask.cpu().equal(torch.arange(steps)[:, None] < lengths):
            raise ValueError(
                f"{name}: mask is of {mask.dtype}, or has gaps; a recurrent layer takes padding at the end only.\n"
                "  give a mask of bool that is True up to the length of each sequence, or lengths="
            )
    if lengths is None:
        return None
    found = torch.as_tensor(lengths, device="cpu").long()
    if found.dim() != 1 or int(found.min()) < 1 or int(found.max()) > steps:
        raise ValueError(f"{name}: lengths are {found.tolist()}; each is from 1 to the {steps} steps of the input")
    return found


def padded(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """(steps, n, c) in the order of the packed sequence, and the lengths."""
    return pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))


def packed_like(packed: PackedSequence, y: Tensor, lengths: Tensor) -> PackedSequence:
    """(steps, n, c), in the order of ``packed``, as a packed sequence with its indices."""
    data = pack_padded_sequence(y, lengths).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def reversed_in_time(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(steps, n, c) with every sequence from its own end to its start; the padding stays behind it."""
    if lengths is None:
        return x.flip(0)
    steps, own = torch.arange(x.shape[0])[:, None], lengths[None]
    order = torch.where(steps < own, own - 1 - steps, steps).to(x.device)
    return x.gather(0, order[..., None].expand_as(x))

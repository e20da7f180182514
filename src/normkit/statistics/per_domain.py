"""PerDomain: statistics of their own for every source of data, named by a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from normkit.statistics.buffers import Kept
from normkit.statistics.table import ByRow, Table

_current: int | None = None


@contextlib.contextmanager
def domain(index: int) -> Iterator[None]:
    """Every layer with ``statistics=PerDomain(...)`` that runs inside the ``with`` uses the statistics of this domain.

    Of nested ones the innermost counts. The setting is one per process, not per thread. Where activations are
    checkpointed, open it inside the function that is checkpointed, or run the backward pass inside it as well: the
    layers run there a second time.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(1, momentum=1.0, statistics=nk.statistics.PerDomain(2))
    >>> with nk.domain(1):
    ...     y = bn(torch.tensor([[4.0], [6.0]]))
    >>> bn.statistics_state.mean.tolist()
    [[0.0], [5.0]]

    Raises:
        TypeError: an index that is no integer.
        ValueError: a negative one. That it is one of the layer's domains is checked when the layer runs.
    """
    global _current
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"domain: {index!r} is no integer.\n  give the index of the domain, from 0 on")
    if index < 0:
        raise ValueError(f"domain: the index is {index}; domains are counted from 0 on")
    before, _current = _current, index
    try:
        yield
    finally:
        _current = before


@dataclass(frozen=True)
class PerDomain(ByRow):
    """Normalise by the mini-batch, which is of one domain; every domain keeps running statistics of its own.

    For several forward passes per step over data of different distributions: real and generated images in a
    discriminator, the two sides of a siamese network, clean and adversarial examples, several data sets. Which domain a
    batch is from is said by :func:`normkit.domain` around the call, in evaluation too. Weight and bias are shared.
    The layer's own running statistics go on over all domains; they serve a domain that no batch has reached yet.

    Args:
        num_domains: how many.

    Raises:
        ValueError: a number below 1; a call outside ``normkit.domain``, or with an index that is out of range; a layer
            that keeps no running statistics.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(2, statistics=nk.statistics.PerDomain(2))
    >>> with nk.domain(0):
    ...     real = bn(torch.randn(8, 2))
    >>> with nk.domain(1):
    ...     fake = bn(torch.randn(8, 2) * 3 + 5)
    >>> bn.statistics_state.batches.tolist(), bn.num_batches_tracked.item()
    ([1, 1], 2)

    When not to use it: where the domain is not known in evaluation; where domains are many and each has little data.

    Source: Chang, You, Seo, Kwak & Han 2019, arXiv:1906.03950 (who keep weight and bias per domain as well); Xie et al.
    2020, arXiv:1911.09665, for adversarial examples.
    """

    num_domains: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_domains, int) or self.num_domains < 1:
            raise ValueError(f"PerDomain: num_domains={self.num_domains!r}; it is a number of domains, 1 or more")

    def state(self, layer: Any) -> Table:
        return Table(layer, self.num_domains)

    def kept(self, layer: Any, step: int | None) -> Kept | None:
        super().kept(layer, step)  # refuses a step
        if _current is None:
            raise ValueError(
                f"{type(layer).__name__}: statistics={self!r}, and nobody said which domain this batch is from.\n"
                "  call the model inside `with normkit.domain(i):`; where activations are checkpointed, open it inside "
                "the function that is checkpointed, which runs again in the backward pass"
            )
        if _current >= self.num_domains:
            raise ValueError(
                f"{type(layer).__name__}: domain {_current} of {self.num_domains}.\n"
                f"  choose it from 0 to {self.num_domains - 1}, or build the layer with a greater num_domains"
            )
        return layer.statistics_state.kept(layer, _current)

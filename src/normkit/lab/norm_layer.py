"""NormLayer: what a model builder gets as `norm_layer`, and how the lab finds the norms again inside a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import normkit
from normkit.blocks import token_norms

_MARK = "made_by_norm_layer"


@dataclass(frozen=True)
class NormLayer:
    """A picklable callable `norm_layer(num_features)` that builds the norm of one arm.

    dim: 1 for features (n, c), 2 for images (n, c, h, w), 3 for volumes; a model that mixes them passes `dim=` itself.
    running: share of each batch in the running statistics of a batch norm; None: the layer's own.
    """

    spec: str
    dim: int = 1
    running: float | None = None

    def __call__(self, num_features: int, *, dim: int | None = None, **options: Any) -> nn.Module:
        if self.running is not None:
            options = {"momentum": self.running} | options
        if is_token_norm(self.spec) and (dim or self.dim) == 1:
            norm = token_norms.token_norm(self.spec, num_features, **options)
        else:
            norm = normkit.create(self.spec, num_features, dim=dim or self.dim, **options)
        setattr(norm, _MARK, True)
        return norm

    def of(self, spec: str) -> NormLayer | None:
        """The same for another norm that an arm asks for beside its own; None for "none"."""
        same_kind = spec.partition(":")[0] == self.spec.partition(":")[0]
        return None if spec == "none" else replace(self, spec=spec, running=self.running if same_kind else None)


def is_token_norm(spec: str) -> bool:
    """Whether it names a norm of tokens that only `normkit.blocks` knows: `rep`, `progressive:400`."""
    return spec.partition(":")[0].lower() in (token_norms.REP, token_norms.PROGRESSIVE)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `norm_layer` built, by name: the norms of an arm, or the identities in their place."""
    return {name: module for name, module in model.named_modules() if getattr(module, _MARK, False)}

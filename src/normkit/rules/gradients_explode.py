"""Gradients that grow, or fade, by a constant factor per layer."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

GROWTH = 1.3
"""On the squared norm, per layer towards the input."""
RATIO = 1e3
"""Between the first and the last weight matrix."""


def find(evidence: Evidence) -> Iterator[Finding]:
    growth, ratio = evidence.number("gradient_growth"), evidence.number("gradient_ratio")
    if growth is None or ratio is None or not ratio > 0:
        return
    norms = [module for module in evidence.modules("kind") if evidence.word("kind", module) == "batch_norm"]
    if ratio > RATIO and growth > GROWTH:
        without = bool(norms) and evidence.number("skips") == 0
        because = (
            f"; {len(norms)} batch norms without skips do that: about 1.47 per layer at batch 128, 2.8 at batch 4"
            if without
            else ""
        )
        yield Finding(
            RULE.name,
            "warning",
            f"the squared gradient grows by {growth:.3g} per layer towards the input: the first layer gets "
            f"{ratio:.2g} times the gradient of the last{because}",
            (),
            "gradient_growth",
            growth,
            GROWTH,
            f"and a ratio above {RATIO:g}; Yang et al. 2019",
            prescriptions=(
                Prescription(
                    "skip connections",
                    "",
                    "with skips the growth is about 1.07 per layer",
                    "retrain",
                    by_hand="x = x + block(x)  # nk.blocks has residual blocks; larger batches help a little",
                    arms="batch+residual:none,batch",
                ),
            ),
            check="nk.diagnose(model, batch, loss_fn, select='gradients_explode')",
        )
    elif ratio < 1 / RATIO:
        yield Finding(
            RULE.name,
            "warning",
            f"the first layer gets {ratio:.2g} of the gradient of the last: it learns next to nothing",
            (),
            "gradient_ratio",
            ratio,
            1 / RATIO,
            "three orders of magnitude",
            prescriptions=(
                Prescription(
                    "a norm before each activation",
                    "",
                    "slopes then stay away from 0",
                    "retrain",
                    by_hand="# layer: torch.nn.Linear(..., bias=False), nk.create('batch', width, dim=1), activation",
                    arms="none,batch",
                ),
            ),
            check="nk.diagnose(model, batch, loss_fn, select='gradients_explode')",
        )


RULE = Rule(
    "gradients_explode",
    frozenset({"gradient_growth", "gradient_ratio"}),
    "Gradients of the first and the last weight matrix that differ by a factor of more than 1000.",
    "Batch norm makes the forward pass stable and the backward pass of a deep network without skips explode, whatever "
    "the initialisation. Saturated activations do the opposite.",
    "Layers of very different sizes; an optimizer like Adam that divides by the size of the gradient hides much of it.",
    (
        "Yang et al. 2019, arXiv:1902.08129",
        "docs/quantities.md, theory probes: measured here",
        "Meterez et al. 2024, arXiv:2310.02012",
    ),
    find,
)

"""Activations that grow or shrink from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding, Severity
from normkit.vocabulary.prescription import Prescription

FACTOR = 100.0


def find(evidence: Evidence) -> Iterator[Finding]:
    sizes = [(module, size) for module, size in evidence.numbers("activation_std") if not evidence.word("kind", module)]
    broken = [module for module, size in sizes if not size < float("inf")]
    if broken:
        yield _finding("error", f"the activations of {broken[0]} are not finite", broken, float("inf"))
        return
    sizes = [(module, size) for module, size in sizes if size > 0]
    if len(sizes) < 3:
        return
    (first, start), (last, end) = sizes[0], sizes[-1]
    factor = max(end / start, start / end)
    if factor > FACTOR:
        way = "grow" if end > start else "shrink"
        yield _finding(
            "warning",
            f"activations {way} with depth: their deviation is {start:.2g} at {first} and {end:.2g} at {last}",
            [first, last],
            factor,
        )


def _finding(severity: Severity, claim: str, places: list[str], factor: float) -> Finding:
    return Finding(
        RULE.name,
        severity,
        claim,
        tuple(places),
        "activation_std",
        factor,
        FACTOR,
        "a factor between first and last activation; docs/doctor.md has healthy models",
        prescriptions=(
            Prescription(
                "a norm in every layer, or weights that keep the scale",
                places[-1],
                "what grows by the same factor in each layer is gone after a few",
                "retrain",
                by_hand="# layer: torch.nn.Linear(..., bias=False), nk.create('batch', width, dim=1), torch.nn.ReLU()\n"
                "torch.nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')  # without norms",
                arms="none,batch",
            ),
        ),
        check="nk.diagnose(model, batch, select='signal_lost_with_depth')",
    )


RULE = Rule(
    "signal_lost_with_depth",
    frozenset({"activation_std"}),
    "The deviation of activations differs by a factor of more than 100 between the first and the last.",
    "Weights that multiply the signal by a constant factor per layer lose it after a few tens of layers, in one "
    "direction or the other; the gradient goes the same way back.",
    "Residual networks without norms grow with the root of depth by design; an output layer of another scale.",
    ("He et al. 2015, arXiv:1502.01852", "timm: extract_spp_stats (signal propagation plots), arXiv:2101.08692"),
    find,
)

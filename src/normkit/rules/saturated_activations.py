"""Sigmoids and tanhs at the ends of their range."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

SHARE = 0.5


def find(evidence: Evidence) -> Iterator[Finding]:
    full = {module: share for module, share in evidence.numbers("saturated_share") if share > SHARE}
    if not full:
        return
    worst = max(full, key=lambda module: full[module])
    places = (worst, *(module for module in full if module != worst))
    yield Finding(
        RULE.name,
        "warning",
        f"{several(len(full), 'activation', 'is', 'are')} saturated: {full[worst]:.0%} of the values are at an end of "
        f"the range ({where(places)}), where the slope is 0",
        places,
        "saturated_share",
        full[worst],
        SHARE,
        "half of the values",
        prescriptions=(
            Prescription(
                "a norm before the activation",
                worst,
                "its input then has deviation 1",
                "retrain",
                by_hand="torch.nn.Sequential(torch.nn.Linear(..., bias=False), nk.BatchNorm1d(width), torch.nn.Tanh())",
                arms="none,batch",
            ),
        ),
        check="nk.diagnose(model, batch, select='saturated_activations')",
    )


RULE = Rule(
    "saturated_activations",
    frozenset({"saturated_share"}),
    "A sigmoid or tanh with more than half of its values within 1.5 % of an end.",
    "There the derivative is almost 0, and all layers before learn slowly. This is what batch norm was made for.",
    "Gates of recurrent networks and of squeeze-and-excite blocks, and a sigmoid at the output, may be decided.",
    ("Ioffe & Szegedy 2015, arXiv:1502.03167, figure 1", "Karpathy, lecture 4: activations and gradients"),
    find,
)

"""A bias that the norm behind it takes out again."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    places = [
        module
        for module in evidence.modules("bias_before")
        if not evidence.number("frozen", module) and evidence.number("in_training", module) != 0
    ]
    if not places:
        return
    layers = [evidence.word("bias_before", module) for module in places]
    yield Finding(
        RULE.name,
        "note",
        f"{len(layers)} bias{' is' if len(layers) == 1 else 'es are'} "
        f"taken out again by the norm behind ({where(layers)})",
        tuple(layers),
        "bias_before",
        float(len(layers)),
        0.0,
        "the mean that is subtracted contains the bias",
        prescriptions=(
            Prescription(
                "the layer is built without a bias",
                layers[0],
                "it has no effect in training and its gradient is 0",
                "retrain",
                by_hand="torch.nn.Conv2d(..., bias=False)  # or Linear",
            ),
        ),
        check="the gradient of the bias is rounding noise",
    )


RULE = Rule(
    "bias_before_norm",
    frozenset({"bias_before"}),
    "A convolution or linear layer with a bias directly before a batch or instance norm.",
    "The norm subtracts the mean of each channel and with it the bias: a parameter, its gradient and its optimizer "
    "state for nothing.",
    "It costs a little memory and nothing else.",
    ("Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2",),
    find,
)

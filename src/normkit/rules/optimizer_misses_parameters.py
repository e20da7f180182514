"""Parameters that get gradients and that no optimizer moves; parameters in the optimizer that nobody uses."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    missing = evidence.names("missing_in_optimizer")
    strange = evidence.number("strange_in_optimizer") or 0.0
    if not missing:
        return
    also = f", and holds {several(int(strange), 'parameter')} that the model does not have" if strange else ""
    yield Finding(
        RULE.name,
        "error" if strange else "warning",
        f"the optimizer does not move {several(len(missing), 'parameter')} ({where(missing)}){also}",
        missing,
        "missing_in_optimizer",
        float(len(missing)),
        0.0,
        "every parameter that gets a gradient is trained or frozen",
        prescriptions=(
            Prescription(
                "the optimizer is built after the model was changed",
                "",
                "an optimizer keeps the parameters that it was built with",
                "retrain",
                by_hand="# after all surgery, which also takes optimizer=; what stands still: requires_grad_(False)\n"
                "optimizer = torch.optim.AdamW(nk.param_groups(model))",
            ),
        ),
        check="nk.diagnose(model, optimizer=optimizer, select='optimizer_misses_parameters')",
    )


RULE = Rule(
    "optimizer_misses_parameters",
    frozenset({"missing_in_optimizer"}),
    "The optimizer was built from other parameters than the model now has.",
    "Layers that were replaced after the optimizer was built keep their first values for good: the new norms never "
    "learn, while the optimizer goes on updating tensors that nobody reads.",
    "Several optimizers that share a model (GANs), or a part that is meant to stand still without requires_grad=False; "
    "without foreign parameters in the optimizer this is a warning only.",
    ("https://github.com/pytorch/opacus/issues/432",),
    find,
)

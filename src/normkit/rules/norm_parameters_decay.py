"""Scale and shift of norms under weight decay."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription


def find(evidence: Evidence) -> Iterator[Finding]:
    decayed = {name: decay for name, decay in evidence.numbers("norm_parameter_decay") if decay > 0}
    if not decayed:
        return
    most = max(decayed.values())
    yield Finding(
        RULE.name,
        "note",
        f"{several(len(decayed), 'parameter')} of norms {'is' if len(decayed) == 1 else 'are'} pulled towards 0 by a "
        f"weight decay of {most:g} ({where([*decayed])})",
        tuple(decayed),
        "norm_parameter_decay",
        most,
        0.0,
        "practice of timm, transformers and torchvision's references",
        prescriptions=(
            Prescription(
                "weight decay leaves norms and biases alone",
                "",
                "0 is no neutral value for a scale",
                "retrain",
                by_hand=f"optimizer = torch.optim.AdamW(nk.param_groups(model, weight_decay={most:g}), lr=...)",
            ),
        ),
        check="nk.diagnose(model, optimizer=optimizer, select='norm_parameters_decay')",
    )


RULE = Rule(
    "norm_parameters_decay",
    frozenset({"norm_parameter_decay"}),
    "Weight decay acts on weight or bias of a norm.",
    "Decay pulls the scale towards 0 and so shrinks what the layer hands on; where a layer without a norm of its own "
    "follows, that is another network and no regularisation.",
    "Many good recipes decay everything and lose little; a scale that the next norm takes out again does not care.",
    (
        "https://github.com/huggingface/pytorch-image-models/blob/main/timm/optim/_param_groups.py",
        "van Laarhoven 2017, arXiv:1706.05350",
    ),
    find,
)

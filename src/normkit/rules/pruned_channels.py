"""Channels that a scale of almost 0 has switched off."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

SHARE = 0.1


def find(evidence: Evidence) -> Iterator[Finding]:
    trained = {
        module: share
        for module, share in evidence.numbers("scale_zero_share")
        if share > SHARE and not (share == 1 and evidence.number("ends_branch", module))
    }
    if not trained:
        return
    worst = max(trained, key=lambda module: trained[module])
    places = (worst, *(module for module in trained if module != worst))
    yield Finding(
        RULE.name,
        "warning" if trained[worst] == 1 else "note",
        f"{several(len(trained), 'norm', 'has', 'have')} switched channels off: {trained[worst]:.0%} of the scales are "
        f"below a thousandth ({where(places)})",
        places,
        "scale_zero_share",
        trained[worst],
        SHARE,
        "Liu et al. 2017, arXiv:1708.06519",
        prescriptions=(
            Prescription(
                "the scales do not decay",
                "",
                "decay has nothing to hold it where the next layer makes up for the scale",
                "retrain",
                by_hand="optimizer = torch.optim.AdamW(nk.param_groups(model), lr=...)",
            ),
        ),
        check="[(n, p.abs().min()) for n, p in model.named_parameters() if p.dim() == 1]",
    )


RULE = Rule(
    "pruned_channels",
    frozenset({"scale_zero_share"}),
    "A norm with more than a tenth of its scales below 0.001.",
    "A channel with scale 0 passes its bias on and nothing else. Decay on the scale, or a penalty, prunes the network "
    "whether one wants it or not; what is off could be cut out for speed.",
    "The last norm of a residual branch starts at 0 on purpose (all of its scales; not reported). Pruning by the "
    "scale.",
    ("Liu et al. 2017, arXiv:1708.06519",),
    find,
)

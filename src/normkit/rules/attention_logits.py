"""Attention whose logits are so large that its softmax has decided."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

LOGIT = 100.0


def find(evidence: Evidence) -> Iterator[Finding]:
    large = {module: logit for module, logit in evidence.numbers("attention_logit") if logit > LOGIT}
    if not large:
        return
    worst = max(large, key=lambda module: large[module])
    places = (worst, *(module for module in large if module != worst))
    yield Finding(
        RULE.name,
        "warning",
        f"attention logits reach {large[worst]:.3g} in {several(len(large), 'layer')} ({where(places)}): the "
        "softmax is "
        "one-hot and passes no gradient",
        places,
        "attention_logit",
        large[worst],
        LOGIT,
        "the bound that Kimi K2 clips at, arXiv:2507.20534",
        prescriptions=(
            Prescription(
                "queries and keys are normalised (QK-norm)",
                worst,
                "their product is then bounded by the root of the width",
                "retrain",
                by_hand="query, key = nk.RMSNorm(head_width)(query), nk.RMSNorm(head_width)(key)  # before their "
                "product",
                arms="layer,layer+qk:rms",
            ),
        ),
        check="nk.diagnose(model, batch, select='attention_logits')",
    )


RULE = Rule(
    "attention_logits",
    frozenset({"attention_logit"}),
    "A greatest attention logit above 100.",
    "Query and key grow during training at large learning rates. Then attention looks at one position, its gradient "
    "vanishes, and a little later the loss diverges; in float16 the logits overflow.",
    "Attention that is meant to be hard; additive masks are below 0 and do not count.",
    ("Wortsman et al. 2023, arXiv:2309.14322", "Dehghani et al. 2023, arXiv:2302.05442", "Kimi K2, arXiv:2507.20534"),
    find,
)

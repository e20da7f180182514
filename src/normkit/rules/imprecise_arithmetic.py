"""Norms whose arithmetic in half precision, or under autocast, gives something else than float32 does."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.rules.rule import Rule
from normkit.rules.wording import several, where
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription

LIMIT = 0.02
"""Five units in the last place of bfloat16: what a scale and a shift in that type add is one or two."""
LOST = 0.5
"""Half of what comes out is wrong: a square or a sum has overflowed."""


def find(evidence: Evidence) -> Iterator[Finding]:
    off = {module: error for module, error in evidence.numbers("arithmetic_error") if error > LIMIT}
    if not off:
        return
    worst = max(off, key=lambda module: off[module])
    places = (worst, *(module for module in off if module != worst))
    much = f"{off[worst]:.2g} of it" if off[worst] < float("inf") else "all of it: it overflows"
    kind = evidence.word("kind", worst)
    yield Finding(
        RULE.name,
        "error" if off[worst] > LOST else "warning",
        f"the arithmetic of {several(len(off), 'norm')} is too coarse ({where(places)}{f': {kind}' if kind else ''}): "
        f"what comes out differs from what the same layer gives in float32 by {much}",
        places,
        "arithmetic_error",
        off[worst],
        LIMIT,
        "five units in the last place of bfloat16",
        prescriptions=(
            Prescription(
                "the norm computes in float32, whatever type comes in",
                worst,
                "mean and variance are sums of many values, and a square of a float16 above 255 is infinite",
                "retrain",
                by_hand="def forward(self, x):  # in the class of the norm\n"
                "    with torch.autocast(x.device.type, enabled=False):\n"
                "        y = self.normalised(x.float())\n"
                "    return y.to(x.dtype)",
            ),
            Prescription(
                "a norm of normkit's in its place",
                worst,
                "it computes statistics in float32 for every type; torch's do where parameters are float32",
                "retrain",
                by_hand=f"model.set_submodule({worst!r}, nk.create('layer', width))  # or 'rms', 'batch' ...\n"
                f"# or keep torch's and its parameters: model.get_submodule({worst!r}).float()",
            ),
        ),
        check="nk.diagnose(model, batch, select='imprecise_arithmetic')",
    )


RULE = Rule(
    "imprecise_arithmetic",
    frozenset({"arithmetic_error"}),
    "A norm in half precision, or under autocast, whose output is more than 2 % away from that of the same layer in "
    "float32.",
    "Norms that are written by hand compute in the type that comes in: a mean of bfloat16 has three digits, so what is "
    "left of off-centre values after it is subtracted is noise, and squares overflow in float16 and become a variance "
    "of infinity. Autocast keeps the operators that it knows in float32, and a norm made of others is not among them. "
    "torch's batch norm computes its mean in the type of its parameters, so one that was cast as a whole is found too.",
    "None that is known: the layer is run twice on the same input, and the rounding of what it gives does not count.",
    (
        "https://github.com/pytorch/pytorch/issues/66707",
        "https://github.com/huggingface/diffusers/pull/13316",
    ),
    find,
)

"""What an arm is called in a sentence: "batch+dropout:0.2" is "batch norm with dropout 0.2"."""

from __future__ import annotations

from typing import Any

NORMS = {
    "none": "no normalization",
    "batch": "batch norm",
    "layer": "layer norm",
    "rms": "RMS norm",
    "group": "group norm",
    "instance": "instance norm",
    "dyt": "DyT",
    "derf": "Derf",
    "switchable": "switchable norm",
    "power": "PowerNorm",
    "frn": "filter response norm",
    "grn": "global response norm",
    "evonormb0": "EvoNorm B0",
    "evonorms0": "EvoNorm S0",
    "rep": "RepBN",
    "progressive": "PRepBN",
}
POLICIES = {
    "ghost": "ghost batch norm",
    "renorm": "batch renorm",
    "movingaverage": "moving-average batch norm",
    "synchronized": "synchronised batch norm",
    "virtual": "virtual batch norm",
}
STATISTICS = {"shared": "shared statistics", "per_step": "statistics per step"}
RESIDUALS = {
    "none": "without skips",
    "skipinit": "SkipInit",
    "fixup": "Fixup",
    "normalizer-free": "normalizer-free",
}
NETWORKS = {"generator": "the generator", "discriminator": "the discriminator", "both": "both networks"}
ALIASES = {
    "filterresponse": "frn",
    "globalresponse": "grn",
    "bn": "batch",
    "ln": "layer",
    "gn": "group",
    "in": "instance",
    "identity": "none",
}
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam", "adamw": "AdamW"}


def label(arm: str) -> str:
    """The arm in words; a name that is no composition of known parts (a user's own) stays as it is."""
    norm, *options = arm.split("+")
    norm, *phases = norm.split("->")
    words = _norm(norm)
    if not words:
        return arm
    words = " → ".join([words, *phases])  # as the phases are written: group:8@50% lr/10
    additions = []
    for option in options:
        key, _, value = option.partition(":")
        if option in OPTIMIZERS:
            additions.append(OPTIMIZERS[option])
        elif key == "dropout" and value:
            additions.append(f"dropout {value}")
        elif key == "init" and value:
            additions.append(f"initial gain {value}")
        elif key == "placement" and value in ("before", "after"):
            words += f" {value} the activation"
        elif key == "processes" and value:
            words += f" over {value} processes"
        elif key == "residual" and value in RESIDUALS:
            words = _residual(words, value)
        elif key == "ffn" and _norm(value):
            words = _inside(words, _norm(value))
        elif key == "qk" and _norm(value):
            additions.append(f"{_norm(value)} on queries and keys")
        elif key == "side" and value in NETWORKS:
            words += f" in {NETWORKS[value]}"
        elif key == "spectral" and value in NETWORKS:
            words = _spectral(words, NETWORKS[value])
        elif key == "statistics" and value == "mixed":
            additions.append("mixed statistics")
        elif key == "scale" and value:
            words += f" at scale {value}"
        elif key == "statistics" and value in STATISTICS:
            additions.append(STATISTICS[value])
        elif key == "where" and value == "input":
            words += " on the input"
        elif key == "clip" and value:
            additions.append(f"adaptive clipping at {value}")
        elif key == "running" and value:
            additions.append(f"running share {value}")
        else:
            return arm
    return f"{words} with {' and '.join(additions)}" if additions else words


def _residual(words: str, value: str) -> str:
    if value == "none":
        return f"{words} {RESIDUALS[value]}"
    return RESIDUALS[value] if words == NORMS["none"] else f"{words} and {RESIDUALS[value]}"


def _inside(words: str, norm: str) -> str:
    if words == norm:
        return f"{words}, inside the feed-forward part too"
    return f"{words} and {norm} inside the feed-forward part"


def _share(length: str) -> str:
    """A part of the run, or a number of batches."""
    return length.replace("%", " %") if length.endswith("%") else f"{length} batches"


def _spectral(words: str, where: str) -> str:
    own = f"spectral norm in {where}"
    return own if words == NORMS["none"] else f"{words} and {own}"


def _norm(norm: str) -> str:
    """The norm with its argument or policy in words; "" where there are none."""
    kind, _, rest = norm.partition(":")
    kind = _kind(kind)
    if not rest:
        return NORMS.get(kind, "")
    if kind in ("group", "evonorms0"):
        return f"{NORMS[kind]} ({rest} groups)"
    if kind == "frn":
        return f"{NORMS[kind]} and {rest.upper() if rest == 'tlu' else rest}"
    if kind == "power":
        shared = rest.endswith("%")
        return f"{NORMS[kind]} ({f'warm-up {_share(rest)}' if shared else f'{rest} batches of warm-up'})"
    if kind == "progressive":
        length, _, warm_up = rest.partition(":")
        return f"{NORMS[kind]} ({f'after {_share(warm_up)}, ' if warm_up else ''}over {_share(length)})"
    policy, *values = rest.split(":")
    words = POLICIES.get(policy.lower().replace("_", ""), "") if kind == "batch" else ""
    return f"{words} ({', '.join(values)})" if words and values else words


def _kind(norm: str) -> str:
    """One spelling for the many that are typed: BN, batch_norm and BatchNorm2d are "batch"."""
    word = norm.lower().replace("_", "").removesuffix("1d").removesuffix("2d").removesuffix("3d")
    return ALIASES.get(word, word.removesuffix("norm"))


def is_plain(arm: dict[str, Any]) -> bool:
    """Does the arm train without any normalization?"""
    return not arm.get("strategy") and _kind(str(arm.get("norm") or arm["name"].split("+")[0])) == "none"


def sentence(text: str) -> str:
    """With a capital first letter and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":", "?")) else ".")


def listing(items: list[str]) -> str:
    """a; a and b; a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def knob_words(experiment: dict[str, Any]) -> str:
    """The swept knob as prose has it: "batch size"."""
    return str(experiment["sweep"]["knob"]).replace("-", " ").replace("_", " ")


def knob_value(value: Any) -> str:
    """A value of the knob as it was typed: 0.1, 64, "pixels"."""
    return f"{value:g}" if isinstance(value, float) else str(value)

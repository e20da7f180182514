"""The answer in words: every case has its plain sentence, the unwelcome ones too."""

from __future__ import annotations

from typing import Any

from normkit.report.labels import is_plain, label, listing, sentence
from normkit.report.numbers import count, factor, factor_interval, target
from normkit.report.sweep_words import sweep_answer

DECIDED = ("faster", "slower", "one seed")
NORM, KIT = ("norm", "placement"), ("optimizer", "dropout", "init")
UNITS = {"steps": ("fewer steps", "more steps"), "time": ("less time", "more time")}


def verdict(summary: dict[str, Any]) -> str:
    """One line: what the experiment says, with intervals; the budget "quick" says first that it is no evidence."""
    caveat = _caveat(summary)
    answer = sweep_answer(summary) if summary["experiment"].get("sweep") else _answer(summary)
    return caveat + answer if caveat else sentence(answer)


def _caveat(summary: dict[str, Any]) -> str:
    words = "quick look, not evidence: " if summary["experiment"].get("budget") == "quick" else ""
    runs = [arm["runs"] for point in summary["points"] for arm in point["arms"]]
    open_, planned = sum(run["unfinished"] for run in runs), sum(run["planned"] for run in runs)
    return words + (f"unfinished, {open_} of {planned} final runs are still to come: " if open_ else "")


def _answer(summary: dict[str, Any]) -> str:
    experiment, arms = summary["experiment"], summary["points"][0]["arms"]
    baseline = next(arm for arm in arms if arm["name"] == experiment["baseline"])
    others = [arm for arm in arms if arm is not baseline]
    if not any(arm["runs"]["finished"] for arm in arms):
        return "no final run has finished yet, so there is no answer."
    goal = target(experiment["target"], experiment["metric"])
    if not others:
        return _alone(baseline, goal) + "."
    clauses, said = [], False
    for arm in others:
        clauses.append(_clause(arm, baseline, goal, said))
        said = said or arm["steps_ratio"]["verdict"] in DECIDED
    text = "; ".join(clauses) + "."
    remarks = [
        _baseline_remark(baseline, others, goal, experiment["steps"]),
        _like_for_like(summary, goal),
        plain_remark(summary),
    ]
    return " ".join([text, *(remark for remark in remarks if remark)])


def _alone(arm: dict[str, Any], goal: str) -> str:
    """There is only one arm, so there is nothing to compare."""
    runs, steps = arm["runs"], arm["steps_to_target"]
    if steps["median"] is None:
        return f"{label(arm['name'])} reaches {goal} in {runs['reached']} of {runs['finished']} runs"
    return (
        f"{label(arm['name'])} reaches {goal} in {count(steps['median'])} steps (median of {runs['finished']} runs); "
        "there is no second arm to compare it with"
    )


def _clause(arm: dict[str, Any], baseline: dict[str, Any], goal: str, said: bool) -> str:
    name, than = label(arm["name"]), label(baseline["name"])
    steps, time = arm["steps_ratio"], arm["seconds_ratio"]
    if steps["verdict"] == "no pairs":
        return f"{name} cannot be compared: {_no_pairs(arm, baseline)}"
    if steps["verdict"] == "rarely reached":
        return _rarely(arm, goal)
    arrives = f"{name} in" if said else f"{name} reaches {goal} in"
    versus = "" if said else f" than {than}"
    some = _some(arm["runs"])
    if steps["verdict"] in DECIDED and time["verdict"] in DECIDED:
        joint = "and" if (steps["value"] >= 1) == (time["value"] >= 1) else "but"
        return f"{arrives} {gain(steps, 'steps')} {joint} {gain(time, 'time')}{versus}{some}"
    if steps["verdict"] in DECIDED:
        return f"{arrives} {gain(steps, 'steps')}{versus}, in time not distinguishable ({speed_up(time)}){some}"
    if time["verdict"] in DECIDED:
        joint = "and" if time["value"] < 1 else "but"
        return (
            f"{name} is not distinguishable from {than} in steps ({speed_up(steps)}) "
            f"{joint} takes {gain(time, 'time')}{some}"
        )
    return f"{name} is not distinguishable from {than} in steps ({speed_up(steps)}) or time ({speed_up(time)}){some}"


def gain(result: dict[str, Any], of: str) -> str:
    """ "9.8× fewer steps [7.9, 11.6]", "1.3× more time [1.1, 1.5]", "more than 12× fewer steps [9.5, ∞]"."""
    fewer, more = UNITS[of]
    value, low, high = result["value"], result["low"], result["high"]
    less = value >= 1
    if not less:
        value, low, high = 1 / value, None if high is None else 1 / high, None if not low else 1 / low
    interval = factor_interval(low, high) if result["verdict"] != "one seed" else "(one seed, no interval)"
    beyond = "" if result["bound"] == "exact" else "more than "
    return f"{beyond}{factor(value)}× {fewer if less else more} {interval}".strip()


def speed_up(result: dict[str, Any]) -> str:
    """The bare ratio, for a result that does not say in which direction."""
    beyond = {"at least": "more than ", "at most": "less than "}.get(result["bound"], "")
    value = "unknown" if result["value"] is None else f"{beyond}{factor(result['value'])}×"
    return f"speed-up {value} {factor_interval(result['low'], result['high'])}"


def _some(runs: dict[str, int]) -> str:
    """A note for an arm that does not always arrive."""
    if runs["reached"] == runs["finished"]:
        return ""
    return f" (it arrives in {runs['reached']} of {runs['finished']} runs)"


def _rarely(arm: dict[str, Any], goal: str) -> str:
    """ "with", so that a sentence about no normalization does not read as one about no kind of it."""
    runs, name = arm["runs"], label(arm["name"])
    n, reached = runs["finished"], runs["reached"]
    if runs["diverged"] == n:
        return f"with {name} all {n} runs diverge" if n > 1 else f"with {name} the only run diverges"
    if reached == 0:
        return f"with {name} none of {n} runs reaches {goal}{_diverged(runs)}"
    only = "only " if 2 * reached <= n else ""
    return f"with {name} {only}{reached} of {n} runs reach {goal}{_diverged(runs)}"


def _diverged(runs: dict[str, int]) -> str:
    return f" ({runs['diverged']} diverged)" if runs["diverged"] else ""


def _no_pairs(arm: dict[str, Any], baseline: dict[str, Any]) -> str:
    for one, whose in ((arm, "its"), (baseline, "the baseline's")):
        runs = one["runs"]
        if not runs["finished"]:
            why = [f"{runs[key]} {key}" for key in ("failed", "unfinished") if runs[key]]
            return f"none of {whose} runs has finished ({listing(why)})"
    return "no seed has finished in both"


def _baseline_remark(baseline: dict[str, Any], others: list[dict[str, Any]], goal: str, budget: int) -> str:
    """A baseline that does not always arrive makes every ratio a bound; the reader must know."""
    runs = baseline["runs"]
    if runs["reached"] == runs["finished"] or all(arm["steps_ratio"]["verdict"] == "no pairs" for arm in others):
        return ""
    if runs["diverged"] == runs["finished"]:
        return sentence(_rarely(baseline, goal))
    return sentence(_rarely(baseline, f"it within {budget} steps"))


def _like_for_like(summary: dict[str, Any], goal: str) -> str:
    """What a norm adds to a network that already has AdamW, dropout or another gain; "" where no arm can tell."""
    arms = {arm["name"]: arm for arm in summary["points"][0]["arms"]}
    clauses: list[str] = []
    said: set[str] = set()
    for arm in arms.values():
        pair = arm.get("like_for_like")
        if pair is None or pair["steps_ratio"]["verdict"] in ("no pairs", "rarely reached"):
            continue
        clause = _clause(arm | pair, arms[pair["against"]], goal, pair["against"] in said)
        clauses.append(clause + _mostly_gone(summary, arm))
        if pair["steps_ratio"]["verdict"] in DECIDED:
            said.add(pair["against"])
    return f"Like for like, {'; '.join(clauses)}." if clauses else ""


def _mostly_gone(summary: dict[str, Any], arm: dict[str, Any]) -> str:
    """Says so when less than half is left of what the same norm gains against the baseline: of r× fewer steps, r − 1.

    By the ends of the intervals that make it hardest: the upper one here against the lower one there.
    """
    about = {one["name"]: one for one in summary["experiment"]["arms"]}
    here, base = about[arm["name"]], about[summary["experiment"]["baseline"]]
    wanted = [here.get(key) for key in NORM] + [base.get(key) for key in KIT]
    found = (
        other
        for other in summary["points"][0]["arms"]
        if "steps_ratio" in other and [about[other["name"]].get(key) for key in NORM + KIT] == wanted
    )
    alike = next(found, None)
    gone = [
        words
        for key, words in (("steps_ratio", "in steps"), ("seconds_ratio", "in time"))
        if alike and _halved(alike[key], arm["like_for_like"][key])
    ]
    which = "" if len(gone) == 2 else f" {gone[0]}" if gone else ""
    return f", most of the advantage{which} is gone" if gone else ""


def _halved(there: dict[str, Any], here: dict[str, Any]) -> bool:
    return there["verdict"] == "faster" and here["high"] is not None and 2 * (here["high"] - 1) < there["low"] - 1


def plain_remark(summary: dict[str, Any]) -> str:
    """Says so when normalization does not pay; "" when it does, or when the runs cannot tell."""
    experiment, arms = summary["experiment"], summary["points"][0]["arms"]
    about = {arm["name"]: arm for arm in experiment["arms"]}
    normed = [arm for arm in arms if arm["name"] != experiment["baseline"] and not is_plain(about[arm["name"]])]
    steps = [_direction(arm, "steps_ratio") for arm in normed]
    time = [_direction(arm, "seconds_ratio") for arm in normed]
    if not normed or not is_plain(about[experiment["baseline"]]) or {"no pairs", "one seed"} & set(steps):
        return ""
    if set(steps) == {"slower"}:
        return "Normalization hurts here: every arm with it needs more steps or does not arrive."
    if "faster" not in steps:
        return "No speed-up by normalization shows here."
    if "faster" in time:
        return ""
    if set(time) == {"slower"}:
        return "Normalization saves steps here but costs time."
    return "Normalization saves steps here, but no saving of time shows."


def _direction(arm: dict[str, Any], key: str) -> str:
    """The verdict; an arm that rarely arrives where the baseline mostly does is slower, whatever the ratio."""
    result = arm[key]
    arrives = 2 * result["baseline_reached"] > result["pairs"]
    return "slower" if result["verdict"] == "rarely reached" and arrives else result["verdict"]

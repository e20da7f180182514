"""Writes docs/norms.md, the tables in other pages that come from records, and the digest that nk.advise reads.

Out of the registry, the docstrings and the committed records.

python docs/generate.py            write them
python docs/generate.py --check    exit 1, with a sentence, if one of them is not what would be written
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import normkit as nk
from normkit.lab.analyse.against import against, final_runs, race
from normkit.lab.analyse.small_batches import digest
from normkit.lab.arm import Arm
from normkit.lab.build import build_model
from normkit.lab.load import Source
from normkit.lab.norm_layer import norms_of
from normkit.lab.tasks import digits_deep, variants
from normkit.lab.worker import seeded_data
from normkit.laws import LAWS
from normkit.measure.structure import OF_OPTIMIZER
from normkit.report import (
    adversarial,
    attention,
    bench_blocks,
    bench_goals,
    bench_limits,
    bench_summary,
    bench_synchronized,
    bench_watch,
    recurrent,
    small_batches,
    strategies,
    swept,
)
from normkit.report.labels import sentence
from normkit.report.words import verdict
from normkit.rules import RULES
from normkit.rules.rule import Rule
from normkit.vocabulary.quantity import STAGES
from normkit.vocabulary.record import read_lines
from normkit.vocabulary.spec import REGISTRY, Family, Spec, pooled
from normkit.watching.quantities import ALL as ALL_QUANTITIES
from normkit.watching.quantities import ALL as MEASURED

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python docs/generate.py"
NORMS, RESULTS, SPEED, CALL, PASSES, BLOCKS = "norms", "results", "speed", "call", "passes", "blocks"
"""What README.md and docs/benchmarks.md have marks for: ``<!-- norms:begin -->`` and ``<!-- norms:end -->``."""
HOLDS, BROKEN = "✓", ""
NOTHING = "–"
RESTORES = "restores"
"""The one law that is not about a change of the input."""
RECORDS = Path("records") / "compare"
TASKS = ("digits", "digits-relu", "digits-cnn")
"""In the order of the README."""
ATTENTION = ("text", "digits-vit")
"""Tasks about Transformers, shown in docs/recurrent-and-attention.md."""
RECURRENT = {
    "digits-sequence": "normkit compare digits-sequence --thorough",
    "digits-sequence-pixels": (
        "normkit compare digits-sequence --set unit=pixels "
        "--arms 'none, batch+scale:0.1, batch+scale:1, batch+where:input, layer' --thorough"
    ),
    "digits-sequence-permuted": "normkit compare digits-sequence --set permuted=true --thorough",
}
"""Comparisons of recurrent networks, shown in docs/what-works-where.md, and the commands that make them."""
ADVERSARIAL = {
    "gan-ring": "normkit compare gan --data ring --steps 1500 --seeds 10 --search-seeds 1",
    "gan-ring-thorough": "normkit compare gan --thorough",
    "gan-digits": "normkit compare gan --data digits --thorough",
}
"""Comparisons of adversarial networks, shown in docs/conditional-and-gan.md, and the commands that make them."""
SWEPT: dict[str, tuple[str, dict[str, Any]]] = {
    "deep-residual": (
        f"normkit compare digits-deep --arms '{', '.join(digits_deep.EVERY)}' --sweep depth=10,50,200",
        {"depth": swept.outcome, "gradients": swept.gradients, "depth-cost": swept.cost},
    ),
    "variants": (
        f"normkit compare variants --arms '{', '.join(variants.EVERY)}' --sweep batch-size=4,64",
        {"variants-outcome": swept.outcome, "variants-cost": swept.cost},
    ),
    "data-size": (
        "normkit compare data-size --sweep share=0.01,0.1,1",
        {"data-size-outcome": swept.outcome, "data-size-difference": swept.differences},
    ),
}
"""Sweeps that docs/what-works-where.md shows: the command without its budget, and tables by their mark."""
STRATEGIES = ("strategies", "strategies-text", "strategies-deep")
"""Comparisons of strategies, shown in docs/strategies.md; the first arm of each is the control that never changes."""
OVERHEAD = Path("records") / "bench" / "overhead"
SYNCHRONIZED = Path("records") / "bench" / "synchronized"
WATCHED = Path("records") / "bench" / "watch"
COMPOSED = Path("records") / "bench" / "blocks"
SMALL = ("small-batches", "cut-batches")
"""Sweeps over the batch size, in the order in which they answer."""
DIGEST = Path("src") / "normkit" / "small_batches.json"
"""What `nk.advise` reads: it ships with the package, and the records do not."""
SURGERY = Path("records") / "surgery"
DOCTOR = Path("records") / "doctor"
SPEEDS = Path("records") / "bench" / "cpu"
"""One directory per run of the benchmark."""
WHOLE = Path("records") / "bench" / "models"
"""The same for training steps of whole models."""
LIMITS = Path("records") / "bench" / "limits"
"""The same for both backends by name, on a ladder of sizes."""
UNMEASURED = f"No record is committed yet; `normkit bench --op overhead --out {OVERHEAD}/1` makes one."


def families() -> list[Family]:
    return [REGISTRY[name] for name in nk.list_norms()]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---", *[":-:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def law_table(link: str) -> str:
    """Norms down, laws across; ``link`` leads to the cards."""
    rows = []
    for family in families():
        spec = family.spec
        marks = [HOLDS if law in spec.laws else BROKEN for law in LAWS]
        rows.append([f"[{spec.name}]({link}#{spec.name})", f"`{spec.over}`" if spec.over else pooled(spec), *marks])
    return table(["norm", "pools over", *(name.replace("_", " ") for name in LAWS)], rows)


def legend() -> str:
    invariances = [law for law in LAWS.values() if law.name != RESTORES]
    changes = "\n".join(f"- **{law.name.replace('_', ' ')}**: {law.statement}" for law in invariances)
    return (
        "The output of a layer in training does not change with\n\n"
        f"{changes}\n\n"
        f"and **{RESTORES}** means: {LAWS[RESTORES].statement}."
    )


def markdown(text: str) -> str:
    """A docstring in Markdown, one line a paragraph."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


def paragraphs(documented: object) -> list[str]:
    return [markdown(paragraph) for paragraph in (inspect.getdoc(documented) or "").split("\n\n")]


def first(starts: tuple[str, ...], *documented: object) -> str:
    """The first paragraph that starts with one of these words, in the docstrings in this order; or nothing."""
    found = (text for thing in documented for text in paragraphs(thing) if text.startswith(starts))
    return next(found, "")


def formula(*documented: object) -> str:
    """The first equation in these docstrings, on a line of its own, and what is said after it."""
    for text in (text for thing in documented for text in paragraphs(thing)):
        if match := re.search(r"`(y = [^`]+)`(.*)", text):
            after = match[2].strip(" ,:.")
            note = f"\n\n{after[0].upper()}{after[1:]}." if after else ""
            return f"```\n{match[1]}\n```{note}"
    raise ValueError(f"no docstring of {documented} has ``y = ...``")


def facts(family: Family) -> str:
    spec = family.spec
    classes = [*family.classes.values(), *family.lazy.values()]
    aliases = [f"`{alias}`" for alias in spec.aliases if alias]
    shorthand = f"`{(spec.aliases or (spec.name,))[0]}:value` sets `{spec.shorthand}`" if spec.shorthand else ""
    centred = "mean and variance" if spec.center else "mean square, not centred"
    laws = [law.replace("_", " ") for law in LAWS if law in spec.laws]
    rows = [
        ("layer", ", ".join(f"`nk.{cls.__name__}`" for cls in sorted(classes, key=_by_size))),
        ("function", f"`nk.functional.{spec.name}`"),
        ("as a name", ", ".join([f"`{spec.name}`", *aliases]) + (f"; {shorthand}" if shorthand else "")),
        ("pools over", f"`{spec.over}`: {centred}" if spec.over else pooled(spec)),
        ("drop-in for", twins(family) or "no layer of torch"),
        ("laws", ", ".join(laws) or "none"),
        ("paper", spec.paper or "none"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _by_size(cls: type) -> tuple[bool, str]:
    return cls.__name__.startswith("Lazy"), cls.__name__


def twins(family: Family) -> str:
    dims = sorted(dim for dim in family.classes if dim is not None)
    names = {family.spec.twin.format(dim=dim): None for dim in dims or (0,)} if family.spec.twin else {}
    return ", ".join(f"`{name}`" for name in names)


def card(family: Family) -> str:
    spec: Spec = family.spec
    cls = family.pick(2)
    function = getattr(nk.functional, spec.name)
    parts = [
        f"## {spec.name}",
        markdown(spec.summary),
        formula(cls, function),
        facts(family),
        first(("Differs from",), cls, function),
        first(("When not to use it", "Do not "), cls, function),
    ]
    return "\n\n".join(filter(None, parts))


INTRODUCTION = """
# Norms

Brackets in a pattern mark the axes that share a mean and a variance: n samples, c channels, s space, g groups.

## Which norm is invariant to what
"""
PROOF = """
A tick is a claim that `tests/test_laws.py` holds: on torch's operators and on the reference, for one, two and three
spatial axes. An empty cell is a claim too, which the same test refutes with a witness. Where a variance is not large
beside `eps`, a law of scale is bent by up to `eps / (2 * variance)`, of the smaller of the two variances.
"""


def norms_page() -> str:
    source = (
        f"<!-- Written by `{COMMAND}` from the registry, the laws and the docstrings: change those, then run it. -->"
    )
    parts = [source, INTRODUCTION, law_table(""), legend(), PROOF, *(card(family) for family in families())]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def results(root: Path) -> str:
    """One paragraph per committed record: the task, the answer, the command that makes it again, the page."""
    parts = []
    for task in TASKS:
        directory = root / RECORDS / task
        if not (directory / "summary.json").exists():
            continue
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        experiment = summary["experiment"]
        where, made = RECORDS / task, experiment["environment"]
        parts.append(
            f"**{experiment['title']}** ({len(experiment['seeds'])} paired seeds, {made['processor']}, "
            f"{made['cores']} cores, torch {made['torch']}). {verdict(summary)}\n\n"
            f"`{experiment['command']}` · [the page]({where}/report.md) · "
            f"[the numbers]({where}/summary.json)"
        )
        if (directory / "picture.svg").exists():
            parts.append(f"![Learning curves and learning-rate sensitivity: {task}]({where}/picture.svg)")
    return "\n\n".join(parts)


def cost_of_a_call(root: Path) -> str:
    """What a layer on the torch backend takes longer than torch's: microseconds where small, percent where large."""
    files = sorted((root / OVERHEAD).glob("*/bench.jsonl"))
    if not files:
        return UNMEASURED
    runs = [read_lines(file) for file in files]
    made = runs[0][0]
    taken = [record for run in runs for record in run[1:] if _counts_as_call(record)]
    rows = []
    for op in dict.fromkeys(r["op"] for r in taken):
        of = lambda size, op=op: [r for r in taken if r["op"] == op and r["reason"] == size]
        tiny = [_microseconds(of("tiny"), part) for part in ("forward", "step")]
        large = [_percent(of(size), part) for size in ("1 MB", "4 MB") for part in ("forward", "step")]
        rows.append([f"`{op}`", *tiny, *large])
    header = ["layer", "tiny, forward", "tiny, both", "1 MB, forward", "1 MB, both", "4 MB, forward", "4 MB, both"]
    times = "one run" if len(runs) == 1 else f"medians of {len(runs)} runs"
    return (
        f"{table(header, rows)}\n\n{made['processor']}, {made['threads of torch']} threads, torch {made['torch']}, "
        f"{times}: {_links(files, root, '../')}. ~: the machine was busy."
    )


def _counts_as_call(record: dict[str, Any]) -> bool:
    """A time of normkit's layer on torch's operators, in memory as the C library is by default."""
    named = record.get("implementation") in ("normkit", "normkit:torch") and record.get("backend") == "torch"
    return named and record.get("state") == "measured" and record["allocator"] == "default"


def speeds(root: Path) -> tuple[list[Path], list[list[dict[str, Any]]]]:
    """The committed runs of the benchmark, and of each what no later commit has measured again."""
    files = sorted((root / SPEEDS).glob("*/bench.jsonl"), key=lambda file: (len(file.parent.name), file.parent.name))
    return files, bench_summary.newest([read_lines(file) for file in files])


def speed(root: Path) -> str:
    """How many times as fast as torch, by op, type and layout, from the committed runs of the benchmark."""
    files, runs = speeds(root)
    if not files:
        return ""
    made = runs[0][0]
    where = files[0].parent.relative_to(root)
    parts = [f"![Times as fast as torch, by type and layout]({where}/picture.svg)"]
    for allocator, words in (("default", "as the C library is by default"), ("pinned", "`nk.tune_allocator()`")):
        found = bench_summary.table(runs, allocator)
        repeats = bench_summary.repeats(runs, allocator)
        times = "one run" if repeats == 1 else f"medians of {repeats} runs"
        parts += [f"Memory {words} ({times}):", table(found.header, found.rows)]
    parts.append(
        "Forward and backward, times as fast as torch's own layer with in-place addition and ReLU: geometric mean over "
        f"shapes (least to greatest). {made['processor']}, {made['threads of torch']} threads, instruction "
        f"set {made['compiled kernels'].split(',')[0]}, torch {made['torch']}. Every shape: {_links(files, root)}."
    )
    return "\n\n".join(parts)


def _links(files: list[Path], root: Path, up: str = "") -> str:
    """The pages of the runs with the commands that make them again; ``up``: from where the page is."""
    told: dict[str, list[str]] = {}
    for file in files:
        where, command = file.parent.relative_to(root), read_lines(file)[0]["command"].partition(" --out ")[0]
        told.setdefault(command, []).append(f"[{where.name}]({up}{where}/report.md)")
    return "; ".join(f"{', '.join(pages)}: `{command} --out DIR`" for command, pages in told.items())


def goals(root: Path) -> str:
    """What is asked of the CPU kernels beside what was measured, and every shape that is slower than torch."""
    _, runs = speeds(root)
    if not runs:
        return "No record of a quiet machine is committed yet."
    found, slower = bench_goals.table(runs), bench_goals.slower(runs)
    told = f"{len(slower)} of {len(bench_summary.speedups(runs, 'pinned'))} cells"
    told += f": {'; '.join(slower)}." if slower else "."
    repeats = bench_summary.repeats(runs, "pinned")
    about = (
        "Times as fast as torch's own layers, forward and backward, pinned allocator: geometric mean over shapes "
        "(least to greatest). The first two rows are asked of each type, the others of both together. Of each shape "
        f"the median of {repeats} runs. Slower than {bench_goals.SLOWER} times torch are {told}"
    )
    return f"{table(found.header, found.rows)}\n\n{about}"


def beside_compile(root: Path) -> str:
    """What is asked beside ``torch.compile`` of torch's own layers, what was measured, and the same for every op."""
    _, runs = speeds(root)
    repeats = bench_summary.repeats(runs, "pinned", "torch.compile")
    if not repeats:
        return f"No record is committed yet; `normkit bench --implementation torch.compile --out {SPEEDS}/1` makes one."
    asked = bench_goals.table(runs, compiled=True)
    every = bench_summary.table(runs, "pinned", against="torch.compile")
    refused = {
        (r["op"], *r["shape"], r["dtype"], r["layout"])
        for r in (r for run in runs for r in run)
        if r.get("implementation") == "torch.compile" and r["state"] == "refused" and r["allocator"] == "pinned"
    }
    about = (
        "Times as fast as `torch.compile` of torch's own layers in the same rounds, forward and backward, pinned "
        "allocator: geometric mean over shapes (least to greatest); a goal is for all types of its row together. Of "
        f"each shape the median of {repeats} runs."
    )
    if refused:
        what = Counter(f"{op} in {dtype}" for op, *_, dtype, _ in refused)
        told = ", ".join(f"{count} of {name}" for name, count in sorted(what.items()))
        about += " What the compiler makes of some cells is further from float64 than roundings explain, so they have "
        about += f"no time: {told}."
    return "\n\n".join([table(asked.header, asked.rows), "Every op:", table(every.header, every.rows), about])


def limits(root: Path) -> str:
    """From which size on the kernels are faster than torch's operators, from the committed runs."""
    files = sorted((root / LIMITS).glob("*/bench.jsonl"))
    if not files:
        return f"No record is committed yet; `normkit bench --implementation normkit:torch --out {LIMITS}/1` makes one."
    runs = [read_lines(file) for file in files]
    found, made = bench_limits.table(runs), runs[0][0]
    about = (
        "Times as fast as torch's operators in the same layer and the same rounds, forward and backward, pinned "
        "allocator, by the number of elements. *Italics*: dispatch takes torch's operators there. "
        f"{made['processor']}, {made['threads of torch']} threads, torch {made['torch']}: {_links(files, root, '../')}."
    )
    return f"{table(found.header, found.rows)}\n\n{about}"


def whole_models(root: Path) -> str:
    """Training steps of whole models, from the committed runs."""
    files = sorted((root / WHOLE).glob("*/bench.jsonl"))
    if not files:
        return f"No record is committed yet; `normkit bench --op models --out {WHOLE}/1` makes one."
    runs = [read_lines(file) for file in files]
    found, made = bench_summary.models(runs, "pinned", "~"), runs[0][0]
    about = (
        "Times as fast as the plain model in the same rounds; a training step: forward, loss, backward, optimizer; "
        "pinned allocator, medians over the runs. Without norms: the same model with nothing in their places, which is "
        f"what norms that took no time would give. {made['processor']}, {made['threads of torch']} threads, torch "
        f"{made['torch']}: {_links(files, root, '../')}. ~: the machine was busy."
    )
    return f"{table(found.header, found.rows)}\n\n{about}"


def measured_passes(root: Path) -> str:
    """Memory passes beside the floor, from the committed runs of the benchmark."""
    _, runs = speeds(root)
    if not runs:
        return "No record of a quiet machine is committed yet."
    found = bench_summary.passes(runs, "pinned")
    return (
        f"{table(found.header, found.rows)}\n\nfloat32, contiguous, tensors of {bench_summary.LARGE:g} MB and more, "
        f"pinned allocator; medians over shapes and runs. {runs[0][0]['processor']}; the README names the runs."
    )


def cost_of_synchronising(root: Path) -> str:
    """Bytes and milliseconds of synchronised statistics, from the committed record."""
    file = root / SYNCHRONIZED / "bench.jsonl"
    if not file.exists():
        command = f"normkit bench --op synchronized --out {SYNCHRONIZED}"
        return f"No record of a quiet machine is committed yet; `{command}` makes one."
    made, *records = read_lines(file)
    found = bench_synchronized.table(records, "~")
    return (
        f"{table(found.header, found.rows)}\n\n{made['processor']}, one thread per process, torch {made['torch']}: "
        f"`{made['command']}`, [every number](../{SYNCHRONIZED}/report.md). ~: the machine was busy."
    )


def theory(root: Path) -> str:
    """What papers say of norms at initialisation, as it was measured here."""
    record = json.loads((root / DOCTOR / "theory.json").read_text(encoding="utf-8"))
    rows = [
        [row["network"], str(row["batch"]), f"{row['mean']:.4g} ({row['least']:.4g} to {row['greatest']:.4g})"]
        for row in record["growth"]
    ]
    ranks = ", ".join(f"{rank:.2f} with {name}" for name, rank in record["stable_rank"].items())
    along = record["gradient_along_weight"]
    return (
        f"- the growth of squared gradients per layer of linear, norm, ReLU at initialisation, {record['depth']} "
        f"layers of {record['width']} units, mean over {record['seeds']} seeds (least to greatest); for batch norm "
        "without skips and large batches theory has π / (π - 1) = 1.467 (Yang et al. 2019):\n\n"
        f"{table(['network', 'samples in the batch', 'growth per layer'], rows)}\n\n"
        f"- the stable rank of 64 samples with cosines of 0.8 after 60 such layers of 256 units: {ranks} (Daneshmand "
        "et al. 2020);\n"
        f"- the gradient of a weight right before a norm is orthogonal to it: of {len(along)} pairs of layer and norm "
        f"the greatest cosine is {max(along.values()):.0e}.\n\n"
        f"`{record['command']}`, torch {record['torch']}, [every number](../{DOCTOR}/theory.json); "
        "`pytest tests/test_theory.py` measures them again."
    )


def quantities_page(text: str) -> str:
    """``text`` of docs/quantities.md with every quantity, and what the probes found."""
    text = between_marks("docs/quantities.md", text, "theory", theory(ROOT))
    return between_marks("docs/quantities.md", text, "quantities", quantities())


def cost_of_watching(root: Path) -> str:
    """What `nk.watch` costs in a training step, from the committed record."""
    file = root / WATCHED / "bench.jsonl"
    if not file.exists():
        command = f"normkit bench --op watch --out {WATCHED}"
        return f"No record of a quiet machine is committed yet; `{command}` makes one."
    made, *records = read_lines(file)
    found = bench_watch.table(records, "~")
    told = bench_watch.answer(records)
    answer = f"{sentence(told[0])}\n\n" if told else ""
    identical = all(record.get("identical") for record in records if record.get("state") == "measured")
    same = (
        "Three steps of each, watched and not, were compared bit for bit before anything was timed. "
        if identical
        else ""
    )
    return (
        f"{answer}{table(found.header, found.rows)}\n\n{same}{made['processor']}, {made['threads of torch']} threads, "
        f"torch {made['torch']}: `{made['command']}`, [every number](../{WATCHED}/report.md). ~: the machine was busy."
    )


def composed_layers(root: Path) -> str:
    """Recurrent and Transformer layers beside torch's, from the committed record."""
    file = root / COMPOSED / "bench.jsonl"
    if not file.exists():
        return f"No record is committed yet; `normkit bench --op blocks --out {COMPOSED}` makes one."
    made, *records = read_lines(file)
    records = [r for r in records if r.get("allocator") == "default" and r.get("implementation") != "torch"]
    found = bench_blocks.table(records, "", "~")
    own = [header != "limit" for header in found.header]
    rows = [[cell for cell, kept in zip(row, own, strict=True) if kept] for row in found.rows]
    return (
        f"{table([h for h, kept in zip(found.header, own, strict=True) if kept], rows)}\n\n{made['processor']}, "
        f"{made['threads of torch']} threads, torch {made['torch']}, default allocator: `{made['command']}`, "
        f"[every number](../{COMPOSED}/report.md). ~: the machine was busy."
    )


def small_batches_digest(root: Path) -> dict[str, Any]:
    """The sweeps over the batch size, in short."""
    files = {(RECORDS / name).as_posix(): root / RECORDS / name / "summary.json" for name in SMALL}
    records = {where: json.loads(file.read_text(encoding="utf-8")) for where, file in files.items() if file.exists()}
    experiment = next(iter(records.values()))["experiment"]
    return digest(records, _values_per_sample(experiment))


def _values_per_sample(experiment: dict[str, Any]) -> int:
    """How many values of a channel reach a norm of the network per sample; all its norms see equally many."""
    task = Source(experiment["task"]).load(experiment["options"])
    model, _ = build_model(task, Arm("none"), seed=0)
    seen: set[int] = set()
    for norm in norms_of(model).values():
        norm.register_forward_pre_hook(lambda _, given: seen.add(given[0][0, 0].numel()))
    model(seeded_data(task, 0).train.first(1)[0])
    (values,) = seen
    return values


def small_batches_page(text: str) -> str:
    """``text`` of docs/small-batches.md with the tables of the committed sweeps."""
    found = small_batches_digest(ROOT)
    first, *others = found["records"]
    words = "\n".join(f"- {sentence}" for sentence in small_batches.sentences(found, first))
    text = between_marks("docs/small-batches.md", text, "words", words)
    tables = {
        "accuracy": small_batches.accuracy(found, first),
        "at-test": small_batches.at_test(found, first),
        "race": small_batches.race(found, first),
        "cost": small_batches.cost(found, first),
    }
    for record in others:
        tables |= {"cut": small_batches.accuracy(found, record), "cut-cost": small_batches.cost(found, record)}
    for name, one in tables.items():
        text = between_marks("docs/small-batches.md", text, name, table(one.header, one.rows))
    made = "; ".join(
        f"[{where}](../{where}/report.md), `{about['command']}`, {about['seeds']} paired seeds, {about['samples']} "
        f"samples seen, {about['processor']}, torch {about['torch']}"
        for where, about in found["records"].items()
    )
    return between_marks("docs/small-batches.md", text, "records", f"Records: {made}.")


def small_batches_pages() -> dict[Path, str]:
    """The page and the digest, where a sweep is committed."""
    if not (ROOT / RECORDS / SMALL[0] / "summary.json").exists():
        return {}
    page = ROOT / "docs" / "small-batches.md"
    return {
        page: small_batches_page(page.read_text(encoding="utf-8")),
        ROOT / DIGEST: json.dumps(small_batches_digest(ROOT), indent=1, ensure_ascii=False) + "\n",
    }


def strategies_page(text: str) -> str:
    """``text`` of docs/strategies.md with a table for each comparison of strategies."""
    for record in STRATEGIES:
        file = ROOT / RECORDS / record / "summary.json"
        content = strategies_compared(file) if file.exists() else "No record is committed yet; the command makes one."
        text = between_marks("docs/strategies.md", text, record, content)
    return text


def strategies_compared(file: Path) -> str:
    """One comparison of strategies: every arm against the first, whose norms never change."""
    summary = json.loads(file.read_text(encoding="utf-8"))
    about, runs = summary["experiment"], final_runs(summary)
    control, *others = (arm["name"] for arm in about["arms"])
    gaps = {name: against(control, runs, name, about["metric"]["higher_is_better"]) for name in others}
    found, made = strategies.table(summary, gaps), about["environment"]
    return (
        f"{table(found.header, found.rows)}\n\n{len(about['seeds'])} paired seeds, in brackets 95 % bootstrap "
        f"intervals, {about['steps']} steps, {made['processor']}, torch {made['torch']}; "
        f"[every number](../{RECORDS / file.parent.name}/report.md). Jumps are in deviations of the outputs before."
    )


def swept_page(text: str) -> str:
    """``text`` of docs/what-works-where.md with the tables of the sweeps."""
    for record, (command, tables) in SWEPT.items():
        file = ROOT / RECORDS / record / "summary.json"
        summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        for name, draw in tables.items():
            found = summary and draw(summary)
            content = (
                table(found.header, found.rows) if found else f"No record is committed yet; `{command}` makes one."
            )
            text = between_marks("docs/what-works-where.md", text, name, content)
        text = between_marks("docs/what-works-where.md", text, record, swept_record(record, summary) if summary else "")
    return text


def swept_record(record: str, summary: Mapping[str, Any]) -> str:
    """Where the tables come from, and the picture."""
    where, about, made = RECORDS / record, summary["experiment"], summary["experiment"]["environment"]
    return (
        f"Record: [{where}](../{where}/report.md), `{about['command']}`, {len(about['seeds'])} paired seeds, in "
        f"brackets 95 % bootstrap intervals, {made['processor']}, torch {made['torch']}.\n\n"
        f"![{record}: the outcome along the sweep](../{where}/picture.svg)"
    )


def recurrent_page(text: str) -> str:
    """``text`` of docs/what-works-where.md with the comparisons of recurrent networks."""
    for name, command in RECURRENT.items():
        content = recurrent_compared(ROOT / RECORDS / name / "summary.json", command)
        text = between_marks("docs/what-works-where.md", text, name, content)
    return text


def recurrent_compared(file: Path, command: str) -> str:
    """The answers, the tables and the picture of one record; the command that makes it, where there is none yet."""
    if not file.exists():
        return f"No record is committed yet; `{command}` makes one."
    summary = json.loads(file.read_text(encoding="utf-8"))
    about, made, runs = summary["experiment"], summary["experiment"]["environment"], final_runs(summary)
    higher, names = about["metric"]["higher_is_better"], {arm["name"] for arm in about["arms"]}
    pairs = {
        (name, other): {
            "test": against(other, runs, name, higher),
            "steps": race(other, runs, name, about["steps"]),
        }
        for name, other in recurrent.QUESTIONS
        if {name, other} <= names
    }
    answers = "\n".join(f"- {answer}" for answer in recurrent.answers(summary, pairs))
    results, gradients = recurrent.results(summary), recurrent.gradients(summary)
    where = RECORDS / file.parent.name
    return "\n\n".join(
        [
            answers,
            table(results.header, results.rows),
            "The gradient at the first time step over that at the last:",
            table(gradients.header, gradients.rows),
            f"Record: [{where}](../{where}/report.md), `{about['command']}`, {about['steps']} steps, "
            f"{len(about['seeds'])} paired seeds and {len(about['rates']['seeds'])} of the search, in brackets 95 % "
            f"bootstrap intervals, {made['processor']}, torch {made['torch']}. The curves over all time steps are on "
            f"the page of the record.\n\n![Learning curves and learning-rate sensitivity](../{where}/picture.svg)",
        ]
    )


def attention_page(text: str) -> str:
    """``text`` of docs/recurrent-and-attention.md with what the records of the tasks say."""
    for task in ATTENTION:
        text = between_marks("docs/recurrent-and-attention.md", text, task, transformer_compared(task))
    return text


def transformer_compared(task: str) -> str:
    """The answers of one task, then every number that they come from; or the command that makes the record."""
    where = RECORDS / task
    file = ROOT / where / "summary.json"
    if not file.exists():
        return f"No record is committed yet; `normkit compare {task.removesuffix('-thorough')} --thorough` makes one."
    summary = json.loads(file.read_text(encoding="utf-8"))
    about, made, runs = summary["experiment"], summary["experiment"]["environment"], final_runs(summary)
    names = [arm["name"] for arm in about["arms"]]
    higher = about["metric"]["higher_is_better"]
    gaps = {
        other: {name: against(other, runs, name, higher) for name in names if name != other}
        for other in (attention.LAYER, attention.NAIVE)
        if other in names
    }
    tables = [attention.results(summary, gaps), attention.rates(summary)]
    if any(arm.get("folding") for arm in summary["points"][0]["arms"]):
        tables.append(attention.folding(summary))
    answers = "\n".join(f"- {answer}" for answer in attention.answers(summary, gaps))
    record = (
        f"Record: [{where}](../{where}/report.md), `{about['command']}`, {about['steps']} steps, {len(about['seeds'])} "
        f"paired seeds and {len(about['rates']['seeds'])} of the search, in brackets 95 % bootstrap intervals, "
        f"{made['processor']}, torch {made['torch']}.\n\n"
        f"![Learning curves and learning-rate sensitivity: {task}](../{where}/picture.svg)"
    )
    return "\n\n".join([answers, *(table(found.header, found.rows) for found in tables), record])


def gan_page(text: str) -> str:
    """``text`` of docs/conditional-and-gan.md with the comparisons of adversarial networks."""
    for name, command in ADVERSARIAL.items():
        content = adversarial_networks(ROOT, RECORDS / name, command)
        text = between_marks("docs/conditional-and-gan.md", text, name, content)
    return text


def adversarial_networks(root: Path, where: Path, command: str) -> str:
    """The table, the answers and the picture of one record; the command that makes it, where there is none yet."""
    file = root / where / "summary.json"
    if not file.exists():
        return f"No record is committed yet; `{command}` makes one."
    summary = json.loads(file.read_text(encoding="utf-8"))
    about, runs, made = summary["experiment"], final_runs(summary), summary["experiment"]["environment"]
    higher = about["metric"]["higher_is_better"]
    gaps = {(arm, other): against(other, runs, arm, higher) for arm, other in adversarial.pairs(summary)}
    found = adversarial.table(summary)
    answers = "\n".join(f"- {answer}" for answer in adversarial.sentences(summary, gaps))
    return (
        f"{table(found.header, found.rows)}\n\n{answers}\n\nRecord: [{where}](../{where}/report.md), "
        f"`{about['command']}`, {len(about['seeds'])} paired seeds, {about['steps']} steps, in brackets 95 % bootstrap "
        f"intervals, {made['processor']}, torch {made['torch']}.\n\n![Learning curves](../{where}/picture.svg)"
    )


def converted_norms(root: Path) -> str:
    """Accuracy by kind of norm, carried over and fitted, from the committed record."""
    record = json.loads((root / SURGERY / "convert.json").read_text(encoding="utf-8"))
    plain, *ways = record["summary"]
    moments = {"converted": "at once"} | {key: key for key in plain if key.startswith("after one epoch")}
    rows = [["batch (not converted)", "", *(_percents(plain[moment]) for moment in moments)]]
    rows += [[f"`{way['to']}`", way["way"], *(_percents(way[moment]) for moment in moments)] for way in ways]
    return (
        f"{table(['to', 'weight and bias', *moments.values()], rows)}\n\n{_accuracy(record)}. {record['task']}, "
        f"{record['training_steps']} steps with batch norm at {record['learning_rate']:g}, then converted, fitted on "
        f"{record['samples_matched_on']} samples; one epoch more at the rate that is named. "
        f"{_made(record, 'convert.json')}"
    )


def calibrated_averages(root: Path) -> str:
    """Accuracy of averaged weights before and after calibration, from the committed record."""
    record = json.loads((root / SURGERY / "calibrate.json").read_text(encoding="utf-8"))
    columns = {"as it is": "as they are"}
    columns |= {key: f"`{key.partition(',')[0]}`" for key in ("update_bn, equal batches", "calibrate_, equal batches")}
    drift = {f"greatest drift {moment}": f"drift {moment}" for moment in ("before", "after")}
    rows = [
        [one["weights"], *(_percents(one[key]) for key in columns), *(f"{one[key]['mean']:.2f}" for key in drift)]
        for one in record["summary"]
    ]
    rates = f"{record['training_steps']} steps at {record['learning_rate']:g} (annealed: falling to 0)"
    return (
        f"{table(['weights', *columns.values(), *drift.values()], rows)}\n\n{_accuracy(record)}; the greatest drift of "
        f"a layer, in standard deviations. {record['task']}, {rates}; SWA: {record['swa']}; EMA: decay "
        f"{record['ema_decay']:g}. {_made(record, 'calibrate.json')}"
    )


def without_norms(root: Path) -> str:
    """A trained network without its norms, and the variance in a ResNet-50 without norms, from the committed record."""
    record = json.loads((root / SURGERY / "normalizer-free.json").read_text(encoding="utf-8"))
    moments = {"converted": "at once"} | {key: key for key in record["summary"][0] if key.startswith("after one epoch")}
    rows = [[way["way"], *(_percents(way[moment]) for moment in moments)] for way in record["summary"]]
    found = [variance for one in record["resnet50"] for variance in one["variances"]]
    first = record["resnet50"][0]
    return (
        f"{table(['network', *moments.values()], rows)}\n\n{_accuracy(record)}. {record['task']}, "
        f"{record['training_steps']} steps with batch norm at {record['learning_rate']:g}, then converted with "
        f"{record['samples_matched_on']} samples; one epoch more at the rate that is named.\n\nThe ResNet-50 of "
        f"`normkit bench` at its initial weights, drawn {len(record['resnet50'])} times, converted with "
        f"{first['images'][0]} random images: behind its {len(first['variances'])} blocks the variance is "
        f"{min(found):.2f} to {max(found):.2f}, on images that nothing was measured on. "
        f"{_made(record, 'normalizer-free.json')}"
    )


def _accuracy(record: dict[str, Any]) -> str:
    seeds = len({run["seed"] for run in record["runs"]})
    return f"Accuracy on held-out samples in percent, mean over {seeds} seeds (least to greatest)"


def _percents(spread: dict[str, float]) -> str:
    mean, least, greatest = (100 * spread[key] for key in ("mean", "least", "greatest"))
    return f"{mean:.1f} ({least:.1f} to {greatest:.1f})"


def _made(record: dict[str, Any], name: str) -> str:
    return f"torch {record['torch']}; `{record['command']}`, [every run](../{SURGERY}/{name})."


RULES_INTRODUCTION = """
# Rules

What `nk.diagnose` and `normkit doctor` look for ([how to use them](doctor.md)); `normkit explain RULE` prints it too.
A rule reads numbers and names and says what they mean; it neither runs nor changes a model. Findings that are equally
severe are told in this order: causes before their symptoms.
"""


def rules_page() -> str:
    """Every rule: what it finds, why that hurts, when to leave it, what it reads, who reports it."""
    source = f"<!-- Written by `{COMMAND}` from src/normkit/rules: change those, then run it. -->"
    rows = [[f"[{rule.name}](#{rule.name})", wants(rule), rule.finds] for rule in RULES.values()]
    overview = table(["rule", "needs", "finds"], rows)
    return "\n\n".join([source, RULES_INTRODUCTION.strip(), overview, *map(rule_card, RULES.values())]) + "\n"


def wants(rule: Rule) -> str:
    """The dearest of the stages that its quantities belong to."""
    words = {"model": "the model", "batch": "a batch", "gradients": "a loss", "run": "a run"}
    if rule.needs & set(OF_OPTIMIZER):
        return "the optimizer"
    stages = {MEASURED[need].stage for need in rule.needs if need in MEASURED}
    return next(word for stage, word in reversed(words.items()) if stage in stages)


def rule_card(rule: Rule) -> str:
    reads = "\n".join(f"- `{need}`: {MEASURED[need].formula}" for need in sorted(rule.needs) if need in MEASURED)
    references = "\n".join(f"- {link(reference)}" for reference in rule.references)
    return (
        f"## {rule.name}\n\n**{rule.finds}**\n\n{rule.means}\n\n*When to leave it.* {rule.false_alarms}\n\n"
        f"Reads\n\n{reads}\n\nReferences\n\n{references}"
    )


def link(reference: str) -> str:
    """A page of these docs by its name, an address by what it leads to."""
    if match := re.fullmatch(r"docs/([\w-]+\.md)(.*)", reference):
        return f"[{match[1]}]({match[1]}){match[2]}"
    if match := re.fullmatch(r"https://github\.com/([\w./-]+?)/(?:issues|pull)/(\d+)", reference):
        return f"[{match[1]}#{match[2]}]({reference})"
    return f"<{reference}>" if re.fullmatch(r"https://\S+", reference) else reference


def doctor_page(text: str) -> str:
    """``text`` of docs/doctor.md with the gallery and the healthy models, from their records."""
    gallery, healthy = (json.loads((ROOT / DOCTOR / f"{name}.json").read_text()) for name in ("gallery", "healthy"))
    text = between_marks("docs/doctor.md", text, "gallery", gallery_cards(gallery))
    return between_marks("docs/doctor.md", text, "healthy", healthy_table(healthy))


def gallery_cards(record: dict[str, Any]) -> str:
    rows, changed = record["scripts"], record["changed_afterwards"]
    first = sum(row["at_first_go"] for row in rows)
    cards = [
        f"### {row['script'].replace('_', ' ')}\n\n{row['complaint']} ({row['link']}; "
        f"[the script](../tests/gallery/{row['script']}.py))\n\n```\n{row['words']}\n```"
        for row in rows
    ]
    others = "\n".join(f"- *{name.replace('_', ' ')}*: {what}" for name, what in changed.items())
    return "\n\n".join(
        [
            f"All {len(rows)} scripts were written after the rules. When they were run for the first time, {first} of "
            f"them had their fault named first. For the others something was changed:\n\n{others}\n\nNow all "
            f"{len(rows)} are named first: `{record['command']}`, torch {record['torch']}.",
            *cards,
        ]
    )


def healthy_table(record: dict[str, Any]) -> str:
    warned = [f"{row['model']} ({', '.join(row['warned'])})" for row in record["rows"] if row["warned"]]
    rows = [
        [f"`{name}`", f"{most['value']:.3g}", most["model"], f"{most['threshold']:.3g}"]
        for name, most in record["greatest"].items()
    ]
    return (
        f"{record['models']} models: {record['errors']} errors, {record['warnings']} warnings"
        f"{': ' if warned else ''}{'; '.join(warned)}. The greatest value of each quantity over all of them, beside "
        f"the threshold of its rule:\n\n{table(['quantity', 'greatest', 'in', 'threshold'], rows)}\n\n"
        f"`{record['command']}`, torch {record['torch']}; [every model](../{DOCTOR}/healthy.json)."
    )


def _microseconds(records: list[dict[str, Any]], part: str) -> str:
    """Median over runs."""
    extra = [record[part]["extra_us"]["value"] for record in records]
    return f"{_busy(records)}{median(extra):+.1f} µs" if extra else ""


def _percent(records: list[dict[str, Any]], part: str) -> str:
    """Median over runs."""
    extra = [100 / record[part]["speedup"]["value"] - 100 for record in records]
    return f"{_busy(records)}{median(extra):+.1f} %" if extra else ""


def _busy(records: list[dict[str, Any]]) -> str:
    return "" if all(record["quiet"] for record in records) else "~"


def between_marks(page: str, text: str, name: str, content: str) -> str:
    """``text`` of a page with ``content`` between the two marks of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no {begin} ... {end}: there is no place for the {name}.")
    return f"{before}{begin}\n{content}\n{end}{after}"


def readme(text: str) -> str:
    """``text`` with the table of norms and the results of the committed records between their marks."""
    text = between_marks("README.md", text, NORMS, law_table("docs/norms.md"))
    text = between_marks("README.md", text, RESULTS, results(ROOT))
    return between_marks("README.md", text, SPEED, speed(ROOT))


def benchmarks(text: str) -> str:
    """``text`` with the cost of a call from the committed record."""
    text = between_marks("docs/benchmarks.md", text, CALL, cost_of_a_call(ROOT))
    text = between_marks("docs/benchmarks.md", text, BLOCKS, composed_layers(ROOT))
    text = between_marks("docs/benchmarks.md", text, "goals", goals(ROOT))
    text = between_marks("docs/benchmarks.md", text, "goals-compiled", beside_compile(ROOT))
    text = between_marks("docs/benchmarks.md", text, "limits", limits(ROOT))
    return between_marks("docs/benchmarks.md", text, PASSES, measured_passes(ROOT))


def quantities() -> str:
    """Every quantity, by what it takes."""
    parts = []
    for stage, takes in STAGES.items():
        rows = [
            [f"`{q.name}`", q.per, q.unit or NOTHING, cell(f"{q.means} {q.formula}".strip()), q.paper or NOTHING]
            for q in ALL_QUANTITIES.values()
            if q.stage == stage
        ]
        title = f"### {stage}: {takes}"
        parts.append(f"{title}\n\n{table(['name', 'per', 'unit', 'what it is', 'source'], rows)}")
    return "\n\n".join(parts)


def cell(text: str) -> str:
    """A formula inside a table, where a bar would end the cell and a star begin italics."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace(">", "&gt;")


def pages() -> dict[Path, str]:
    """What should be in which file."""
    return {
        ROOT / "docs" / "norms.md": norms_page(),
        ROOT / "docs" / "rules.md": rules_page(),
        ROOT / "docs" / "doctor.md": doctor_page((ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")),
        ROOT / "README.md": readme((ROOT / "README.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "distributed.md": between_marks(
            "docs/distributed.md",
            (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"),
            "synchronized",
            cost_of_synchronising(ROOT),
        ),
        ROOT / "docs" / "watch.md": between_marks(
            "docs/watch.md",
            (ROOT / "docs" / "watch.md").read_text(encoding="utf-8"),
            "watched",
            cost_of_watching(ROOT),
        ),
        **small_batches_pages(),
        ROOT / "docs" / "what-works-where.md": recurrent_page(
            swept_page((ROOT / "docs" / "what-works-where.md").read_text(encoding="utf-8"))
        ),
        ROOT / "docs" / "recurrent-and-attention.md": attention_page(
            (ROOT / "docs" / "recurrent-and-attention.md").read_text(encoding="utf-8")
        ),
        ROOT / "docs" / "conditional-and-gan.md": gan_page(
            (ROOT / "docs" / "conditional-and-gan.md").read_text(encoding="utf-8")
        ),
        **{
            ROOT / "docs" / f"{name}.md": between_marks(
                f"docs/{name}.md", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), name, content(ROOT)
            )
            for name, content in (
                ("accelerate", whole_models),
                ("convert", converted_norms),
                ("calibrate", calibrated_averages),
                ("normalizer-free", without_norms),
            )
        },
        ROOT / "docs" / "strategies.md": strategies_page((ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "quantities.md": quantities_page((ROOT / "docs" / "quantities.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "benchmarks.md": benchmarks((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")),
    }


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(f"{COMMAND} [--check]", file=sys.stderr)
        return 2
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the registry says: run `{COMMAND}`.", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

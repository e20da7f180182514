"""The command line: what it answers, and that every wrong word gives one clear error and exit status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import normkit as nk
from normkit import cli
from normkit.cli.errors import UserError
from normkit.cli.output import show
from normkit.dispatch import BACKENDS
from normkit.kernels import loading
from normkit.laws import LAWS
from normkit.vocabulary.spec import REGISTRY, pooled

GROUP = ["explain", "group", "--shape", "8,64,56,56"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command line: (exit status, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(list(argv))
        return (status, *capsys.readouterr())

    return run


def answered(result: tuple[int, str, str]) -> list[str]:
    """The lines of a command that succeeded: an answer first, the next command last, nothing on standard error."""
    status, output, errors = result
    lines = output.strip().splitlines()
    assert (status, errors) == (0, "")
    assert lines[0].strip()
    assert re.fullmatch(r"next: normkit \w+.*", lines[-1].strip())
    return lines


def refused(result: tuple[int, str, str]) -> str:
    """The one message of a command that failed on what was typed: on standard error, short, no traceback."""
    status, output, errors = result
    assert (status, output) == (2, "")
    assert "Traceback" not in errors
    assert "fault of normkit" not in errors
    assert 1 <= len(errors.strip().splitlines()) <= 10
    return errors


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_help_shows_every_verb_in_one_line(run, argv):
    lines = answered(run(*argv))
    for name, verb in cli.VERBS.items():
        assert sum(line.split()[:1] == [name] and verb.summary in line for line in lines) == 1


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(run, verb):
    status, output, errors = run(verb, "--help")
    assert (status, errors) == (0, "")
    assert output.startswith(f"usage: normkit {verb}")


def test_version(run):
    assert run("--version") == (0, f"normkit {nk.__version__}\n", "")


@pytest.mark.parametrize("module", ["normkit", "normkit.cli"])
def test_python_m_is_the_same_command(module):
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"normkit {nk.__version__}\n"


def test_list_shows_every_norm_with_its_laws(run):
    lines = answered(run("list"))
    for name in nk.list_norms():
        spec = REGISTRY[name].spec
        row = next(line for line in lines if line.startswith(f"{name} "))
        assert pooled(spec) in row
        assert spec.paper in row
    header = next(line for line in lines if line.split() == ["norm", *LAWS]).split()
    table = lines[[line.split() for line in lines].index(header) :]
    for name in nk.list_norms():
        marks = dict(zip(header, next(line for line in table if line.startswith(f"{name} ")).split(), strict=True))
        assert {law for law in LAWS if marks[law] == "yes"} == REGISTRY[name].spec.laws
    for law in LAWS.values():
        assert any(line.split() == [law.name, *law.statement.split()] for line in lines)


def test_list_as_json_has_the_same_content(run):
    status, output, _ = run("list", "--json")
    told = json.loads(output)
    assert status == 0
    assert [norm["name"] for norm in told["norms"]] == nk.list_norms()
    assert told["backends"] == list(BACKENDS)
    assert "digits" in told["tasks"]
    assert told["answer"] == answered(run("list"))[0]


def test_explain_says_which_backend_runs_and_why_the_others_do_not(run):
    lines = answered(run(*GROUP, "--activation", "silu"))
    assert lines[0] == f"group_norm: the {BACKENDS_THAT_RUN[0]} backend runs."
    for other in set(BACKENDS) - {BACKENDS_THAT_RUN[0]}:
        assert any(f"not {other}: " in line for line in lines)


BACKENDS_THAT_RUN = ["native", "torch"] if loading.module else ["torch"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("group --shape 8,64,56,56", {"shape": [8, 64, 56, 56], "strides": [200704, 3136, 56, 1], "dtype": "float32"}),
        ("group --shape 8x64x56x56 --channels-last", {"strides": [200704, 1, 3584, 64]}),
        ("group:8 --shape 4,64,5,6,7 --channels-last", {"strides": [13440, 1, 2688, 448, 64]}),
        ("group --shape 8,64,7,7 --dtype bfloat16", {"dtype": "bfloat16", "weight_dtype": "bfloat16"}),
        ("bn --shape 8,64", {"training": True, "kind": "channels"}),
        ("bn --shape 8,64,7 --eval", {"training": False}),
        ("BatchNorm2d --shape 8,64,7,7 --activation relu", {"activation": "relu"}),
        ("ln --shape 8,128,768", {"pooled": [2]}),
        ("layer --shape 8,64,7,7", {"pooled": [1]}),
    ],
)
def test_explain_as_json_describes_what_was_asked(run, arguments, expected):
    status, output, errors = run("explain", *arguments.split(), "--json")
    assert (status, errors) == (0, "")
    problem = json.loads(output)["problem"]
    assert {key: problem[key] for key in expected} == expected


def test_explain_runs_the_backend_that_is_asked_for(run):
    assert "reference backend" in answered(run(*GROUP, "--backend", "reference"))[0]


def test_explain_of_no_norm_is_an_answer_too(run):
    answered(run("explain", "none", "--shape", "8,64"))


@pytest.mark.parametrize("arguments", ["batch --shape 1,64 --eval", "group:64 --shape 8,64", "ln --shape 8,1"])
def test_explain_of_one_value_per_statistic_is_an_answer_where_the_norm_takes_it(run, arguments):
    assert "over 1 values each" in "\n".join(answered(run("explain", *arguments.split())))


def test_env_names_versions_and_hardware_and_no_place(run):
    text = "\n".join(answered(run("env")))
    assert nk.__version__ in text
    assert "scikit-learn" in text
    assert not re.search(r"(?<![\w.])/\w", text), "a path of this machine"


def test_env_as_json_has_the_same_content(run):
    status, output, _ = run("env", "--json")
    told = json.loads(output)
    assert status == 0
    assert told["answer"] == answered(run("env"))[0]
    assert told["kernels"]["backends"] == list(BACKENDS)
    assert set(told) == {"answer", "software", "processor", "kernels", "gpus", "extras"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("explian group", ["'explian'", "did you mean: normkit explain", "compare, report, list"]),
        ("zzz", ["'zzz'", "choose from: compare"]),
        ("--lsit", ["'--lsit'", "normkit list"]),
        ("list --jsn", ["--jsn", "--json"]),
        ("list batch", ["batch", "normkit list --help"]),
        ("env everything", ["everything"]),
        ("env --jsn", ["--jsn", "--json"]),
        ("explain", ["NORM", "--shape"]),
        ("explain group", ["--shape"]),
        ("explain grop --shape 8,64,56,56", ["'grop'", "did you mean 'group_norm'?"]),
        ("explain xyzzy --shape 8,64,56,56", ["'xyzzy'", "choose from: batch_norm"]),
        ("explain group:x --shape 8,64,56,56", ["'group:x'", "num_groups"]),
        ("explain group:4.5 --shape 8,64,56,56", ["'group:4.5'", "whole number"]),
        ("explain group --shape", ["--shape"]),
        ("explain group --shape 8,64 extra", ["extra"]),
        ("explain batch --shape 1,64", ["more than 1 value per channel when training", "(1, 64)"]),
        ("explain instance --shape 8,64,1,1", ["more than 1 spatial element", "(8, 64, 1, 1)"]),
        ("explain instance --shape 8,64", ["no spatial axes", "n,c,h,w"]),
        ("explain group --shape 99999999999999999999,2", ["99999999999999999999", "memory"]),
        ("explain group --shape 8,64,7,7 --device xla", ["xla", "normkit env"]),
        ("explain group --shape 8,64,7,7 --device mkldnn", ["mkldnn", "normkit env"]),
        ("explain group --shape 8,48,14,14", ["48", "32", "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"]),
        ("explain group --shape eight", ["'eight'", "8,64,56,56"]),
        ("explain group --shape 8,,64", ["'8,,64'", "8,64,56,56"]),
        ("explain group --shape 8,-64,3", ["'8,-64,3'", "positive"]),
        ("explain group --shape 8,0,3", ["'8,0,3'", "positive"]),
        ("explain group --shape 64", ["1 axes", "n,c,h,w"]),
        ("explain group --shape 1,2,3,4,5,6", ["6 axes", "n,c,h,w"]),
        ("explain BatchNorm2d --shape 8,64", ["expected 4D input (got 2D input)", "1d for (n, c)"]),
        ("explain group --shape 8,64,7,7 --dtype int8", ["int8", "bfloat16"]),
        ("explain group --shape 8,64,7 --channels-last", ["3 axes", "n,c,h,w"]),
        ("explain group --shape 8,64,7,7 --activation rellu", ["'rellu'", "'relu'"]),
        ("explain group --shape 8,64,7,7 --backend refrence", ["'refrence'", "'reference'"]),
        ("explain group --shape 8,64,7,7 --device abacus", ["abacus", "normkit env"]),
        ("explain group --shape 999999,999999,9999,9999", ["memory", "999999"]),
    ],
)
def test_a_wrong_word_gives_one_clear_error(run, arguments, told):
    message = refused(run(*arguments.split()))
    assert max(map(len, message.splitlines())) < 400
    for words in told:
        assert words in message


def test_sizes_without_commas_are_no_shape(run):
    assert "'8 64 7 7' is not a shape" in refused(run("explain", "group", "--shape", "8 64 7 7"))
    answered(run("explain", "group", "--shape", "(8, 64, 7, 7)"))


@pytest.fixture
def verb(tmp_path, monkeypatch):
    """Puts a verb of the given source into the command line, as ``normkit trial``."""

    def make(source: str) -> None:
        (tmp_path / "trial_verb.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "trial_verb", raising=False)
        monkeypatch.setitem(cli.VERBS, "trial", cli.Verb("trial_verb", "a trial"))

    return make


@pytest.fixture
def without(monkeypatch):
    """Makes a package as good as not installed, even where another test has loaded it."""

    def without(package: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return without


@pytest.mark.parametrize(("module", "extra"), [("sklearn.datasets", "lab"), ("safetensors", "export"), ("ray", "ray")])
def test_a_missing_extra_is_the_one_line_to_type(run, verb, without, module, extra):
    verb(f"def main(argv):\n    import {module}\n")
    without(module.partition(".")[0])
    assert f'pip install "normkit[{extra}]"' in refused(run("trial"))


@pytest.mark.parametrize("package", ["sklearn", "joblib", "numpy", "scipy", "matplotlib"])
def test_compare_without_its_extra_names_the_line_to_type_before_any_work(run, without, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without(package)
    assert 'pip install "normkit[lab]"' in refused(run("compare", "--quick"))
    assert not [*tmp_path.glob("runs/*/*.jsonl")]


@pytest.mark.parametrize("package", ["numpy", "scipy", "matplotlib"])
def test_report_without_its_extra_names_the_line_to_type(run, without, package):
    without(package)
    assert 'pip install "normkit[lab]"' in refused(run("report", "somewhere"))


BARE = """
import sys
for name in ("numpy", "sklearn", "scipy", "matplotlib", "joblib", "safetensors"):
    sys.modules[name] = None
from normkit.cli import main
for line in ("list", "explain group --shape 8,64,7,7", "env"):
    assert main(line.split()) == 0, line
for line in ("compare --quick", "report somewhere"):
    assert main(line.split()) == 2, line
"""


def test_without_any_extra_every_verb_works_or_names_the_line_to_type(tmp_path):
    """As ``pip install normkit`` leaves it: torch does without numpy, and so do the verbs that need no extra."""
    result = subprocess.run([sys.executable, "-c", BARE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stderr.count("error: ") == result.stderr.count('type: pip install "normkit[lab]"') == 2
    assert "Traceback" not in result.stderr


def test_an_error_of_the_user_is_its_message_alone(run, verb):
    verb("from normkit.cli.errors import UserError\ndef main(argv):\n    raise UserError('no such file: a.pt')\n")
    assert refused(run("trial")) == "error: no such file: a.pt\n"


@pytest.mark.parametrize("source", ["1 / 0", "raise ValueError('inner')", "import a_module_that_is_nowhere"])
def test_a_fault_of_our_own_keeps_its_traceback(run, verb, source):
    verb(f"def main(argv):\n    {source}\n")
    status, output, errors = run("trial")
    assert (status, output) == (2, "")
    assert "Traceback" in errors
    assert "normkit env" in errors


def test_the_exit_status_of_a_verb_is_the_exit_status(run, verb):
    verb("def main(argv):\n    return len(argv)\n")
    assert run("trial", "one")[0] == 1


def test_an_interrupt_is_no_fault(run, verb):
    verb("def main(argv):\n    raise KeyboardInterrupt\n")
    assert run("trial") == (130, "", "interrupted\n")


def test_only_the_errors_of_a_refusal_count_as_the_users():
    with pytest.raises(UserError, match="no"), cli.errors.from_user():
        raise ValueError("no")
    with pytest.raises(ZeroDivisionError), cli.errors.from_user():
        raise ZeroDivisionError


LOADED = """
import sys
from normkit.cli import main
for line in ("--help", "list", "explain group --shape 8,64,7,7", "env"):
    assert main(line.split()) == 0
loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted(loaded & {"matplotlib", "scipy", "sklearn", "joblib", "safetensors"}))
"""


def test_a_verb_loads_only_what_it_uses():
    result = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("argv", [["--help"], ["list"]])  # one prints by itself, the other through rich
def test_a_reader_that_stops_early_is_no_fault(argv):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed_pipe:
        command = [sys.executable, "-m", "normkit", *argv]
        result = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_colon_stays_a_colon(capsys):
    """rich would make an emoji of the arm ``batch:ghost:4``, also in the command that is to be typed next."""
    show("batch:ghost:4", then="normkit compare --arms batch:ghost:4")
    assert capsys.readouterr().out.count("batch:ghost:4") == 2

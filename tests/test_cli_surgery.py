"""The verbs that operate on checkpoints: what they write, what they leave alone, and what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import normkit as nk
from normkit.cli import checkpoints
from test_cli import answered, refused, run  # noqa: F401  # run is a fixture

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.last, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.last.weight

    def forward(self, image):
        return self.tied(self.last(self.norm(self.conv(image)).relu().mean((2, 3))))

def net():
    torch.manual_seed(1)
    return Net()

def learnt():
    model = net()
    with torch.no_grad():
        model.norm.running_mean.add_(0.7)
        model.norm.running_var.mul_(3)
        model.norm.weight.mul_(1.5)
    return model

def refusing():
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())

def batches():
    torch.manual_seed(2)
    for _ in range(3):
        yield {"image": torch.randn(4, 3, 8, 8) + 1, "label": torch.zeros(4)}

def raising():
    raise KeyError("weights")

def number():
    return 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with models in nets.py, a checkpoint in both forms, and data."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"nets{abs(hash(tmp_path)) % 10**8}.py"  # a module of its own in every test
    path.write_text(SOURCE)
    monkeypatch.setenv("NETS", path.name)
    state = built(path, "learnt").state_dict()
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {}}, "in.pt")
    save_file({name: tensor.clone() for name, tensor in state.items()}, "in.safetensors")
    torch.manual_seed(5)
    x = torch.randn(20, 3, 8, 8) * 2 + 1
    np.savez("x.npz", x.numpy())
    torch.save((x, torch.arange(20)), "x.pt")
    return path


def built(path: Path, name: str) -> nn.Module:
    namespace: dict = {}
    exec(path.read_text(), namespace)
    return namespace[name]()


def no_more_files(place: Path, *more: str) -> bool:
    first = {place.name, "in.pt", "in.safetensors", "x.npz", "x.pt"}
    return {path.name for path in place.parent.iterdir()} - {"__pycache__"} == first | set(more)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_fold_writes_the_weights_of_the_folded_model_and_its_certificate(run, place, suffix):  # noqa: F811
    lines = answered(
        run("fold", f"{place.name}:net", "--checkpoint", f"in{suffix}", "--data", "x.npz", "-o", f"out{suffix}")
    )
    assert lines[0] == "fold: 1 x BatchNorm2d folded into the layer before it."
    assert f"certificate: {checkpoints.beside(Path('out.pt'))}" in lines
    state = load_file("out.safetensors") if suffix == ".safetensors" else torch.load("out.pt", weights_only=True)
    model = built(place, "learnt").eval()
    x = torch.load("x.pt", weights_only=True)[0]
    folded = nk.fold(model, x)
    assert {*state} == {*folded.state_dict()}
    assert all(torch.equal(value, state[name]) for name, value in folded.state_dict().items())
    folded.load_state_dict(state)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert json.loads(Path("out.certificate.json").read_text())["changed"][0]["module"] == "norm"
    assert no_more_files(place, f"out{suffix}", "out.certificate.json")


def test_fold_from_a_shape_and_as_a_program(run, place):  # noqa: F811
    asked = ("fold", f"{place.name}:learnt", "--shape", "2,3,8,8", "-o", "out.pt", "--program", "out.pt2")
    assert any("torch.export.load" in line for line in answered(run(*asked)))
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.load("out.pt2").module()
    torch.testing.assert_close(program(x), built(place, "learnt").eval()(x), rtol=1e-4, atol=1e-5)
    assert "out.pt2 exists already" in refused(run(*asked))


def test_calibrate_gives_the_statistics_of_the_data(run, place):  # noqa: F811
    common = (f"{place.name}:net", "--checkpoint", "in.pt", "--data", "x.pt", "--batch-size", "8")
    lines = answered(run("calibrate", *common, "-o", "out.pt"))
    assert "not carried over from in.pt: epoch, optimizer" in lines
    model = built(place, "learnt")
    x = torch.load("x.pt", weights_only=True)[0]
    seen = model.conv(x).transpose(0, 1).flatten(1)
    state = torch.load("out.pt", weights_only=True)
    torch.testing.assert_close(state["norm.running_mean"], seen.mean(1))
    torch.testing.assert_close(state["norm.running_var"], seen.var(1))
    assert torch.equal(state["conv.weight"], model.conv.weight)


def test_calibrate_takes_a_function_that_yields_dicts(run, place):  # noqa: F811
    lines = answered(
        run("calibrate", f"{place.name}:net", "--data", f"{place.name}:batches", "--steps", "2", "-o", "o.pt")
    )
    assert any("2 batches" in line for line in lines)


def test_convert_fits_what_it_converts(run, place):  # noqa: F811
    asked = ("convert", f"{place.name}:net", "--checkpoint", "in.pt", "--to", "group:4")
    assert any("nothing was matched" in line for line in answered(run(*asked, "-o", "a.pt")))
    answered(run(*asked, "--data", "x.npz", "--batch-size", "10", "-o", "b.pt"))
    model = built(place, "net")
    nk.convert_(model, to="group:4")
    plain, matched = (torch.load(name, weights_only=True) for name in ("a.pt", "b.pt"))
    model.load_state_dict(plain)
    model.load_state_dict(matched)
    assert not torch.equal(plain["norm.weight"], matched["norm.weight"])


@pytest.mark.parametrize(
    ("verb", "call"), [("freeze", "nk.freeze_(model, statistics=True, affine=True)"), ("sync", "nk.sync_(model)")]
)
def test_what_stands_in_the_model_is_said_to(run, place, verb, call):  # noqa: F811
    lines = answered(
        run(verb, f"{place.name}:net", "--checkpoint", "in.pt", "--data", "x.npz", "-o", "out.safetensors")
    )
    assert any(call in line for line in lines)
    before, after = load_file("in.safetensors"), load_file("out.safetensors")
    assert {*before} == {*after}
    assert all(torch.equal(before[name], after[name]) for name in before)


VERBS = {
    "calibrate": ("--data", "x.npz"),
    "fold": ("--data", "x.npz"),
    "convert": ("--to", "group:4"),
    "freeze": (),
    "sync": (),
}
QUICK = ("calibrate", "freeze")
each_verb = pytest.mark.parametrize(
    "verb", [verb if verb in QUICK else pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS]
)


@each_verb
def test_a_dry_run_writes_nothing_and_names_the_command_that_would(run, place, verb):  # noqa: F811
    lines = answered(run(verb, f"{place.name}:learnt", *VERBS[verb], "--dry-run"))
    assert "(planned)" in lines[0]
    assert lines[-1] == f"next: normkit {' '.join([verb, f'{place.name}:learnt', *VERBS[verb]])} -o out.safetensors"
    assert no_more_files(place)


@each_verb
def test_json_is_the_certificate(run, place, verb):  # noqa: F811
    status, output, errors = run(verb, f"{place.name}:learnt", *VERBS[verb], "-o", "out.pt", "--json")
    assert (status, errors) == (0, "")
    told = json.loads(output)
    assert told["out"] == "out.pt"
    assert told["answer"] == told["verdict"]
    assert told["changed"] == json.loads(Path("out.certificate.json").read_text())["changed"]
    assert told["changed"]


@each_verb
def test_nothing_is_overwritten_without_force(run, place, verb):  # noqa: F811
    asked = (verb, f"{place.name}:learnt", *VERBS[verb], "-o")
    for taken in ("out.certificate.json", "out.pt"):
        Path(taken).write_text("mine")
        assert f"{taken} exists already; --force overwrites it" in refused(run(*asked, "out.pt"))
        assert Path(taken).read_text() == "mine"
    answered(run(*asked, "out.pt", "--force"))
    assert torch.load("out.pt", weights_only=True)


def test_what_was_refused_shows_in_the_exit_status(run, place):  # noqa: F811
    status, output, errors = run("fold", f"{place.name}:refusing", "--shape", "2,3,8,8", "-o", "out.pt")
    assert (status, errors) == (1, "")
    assert output.startswith("fold: nothing was changed; 1 refused.")


def test_layers_are_chosen_by_their_names(run, place):  # noqa: F811
    for words, changed in (("--only", "nor*"), 1), (("--only", "conv"), 0), (("--leave-out", "norm"), 0):
        _, output, _ = run("fold", f"{place.name}:net", "--shape", "2,3,8,8", "--dry-run", "--json", *words)
        assert len(json.loads(output)["changed"]) == changed


def test_a_file_is_whole_or_is_the_one_of_before(place, monkeypatch):
    before = Path("in.pt").read_bytes()

    def breaking(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", breaking)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.write(Path("in.pt"), {"a": torch.zeros(1)}, {})
    assert Path("in.pt").read_bytes() == before
    assert no_more_files(place)


def test_a_checkpoint_from_a_wrapped_model_and_in_another_type(run, place):  # noqa: F811
    state = built(place, "learnt").bfloat16().state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, "wrapped.pt")
    answered(run("freeze", f"{place.name}:net", "--checkpoint", "wrapped.pt", "-o", "out.pt"))
    after = torch.load("out.pt", weights_only=True)
    assert all(torch.equal(value, after[name]) for name, value in state.items())


class Code:
    def __reduce__(self):
        return os.system, ("echo ran",)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("net", "-o", "out.pt"), "write file.py:function or package.module:function"),
        (("nowhere.py:net", "-o", "out.pt"), "no file nowhere.py"),
        (("{nets}:met", "-o", "out.pt"), "did you mean 'net'"),
        (("{nets}:raising", "-o", "out.pt"), "raised KeyError: 'weights'"),
        (("{nets}:number", "-o", "out.pt"), "returned a int, and not a torch.nn.Module"),
        (("{nets}:net",), "-o FILE is missing"),
        (("{nets}:net", "-o", "out.bin"), "the result ends in .safetensors, .pt, .pth"),
        (("{nets}:net", "-o", "no/where/out.pt"), "there is no directory no/where"),
        (("{nets}:net", "-o", "out.pt", "--checkpoint", "none.pt"), "none.pt: there is no such file"),
        (("{nets}:net", "-o", "out.pt", "--checkpoint", "x.npz"), "a checkpoint ends in"),
        (("{nets}:net", "-o", "out.pt", "--checkpoint", "code.pt"), "reading that could run any code"),
        (("{nets}:net", "-o", "out.pt", "--checkpoint", "x.pt"), "holds no state_dict"),
        (("{nets}:net", "-o", "out.pt", "--checkpoint", "broken.safetensors"), "cannot be read as safetensors"),
        (("{nets}:refusing", "-o", "out.pt", "--checkpoint", "in.pt"), "missing: 1.weight, 1.bias"),
        (("{nets}:net", "-o", "out.pt", "--data", "none.npz"), "none.npz: there is no such file"),
        (("{nets}:net", "-o", "out.pt", "--data", "x.csv"), "give a file that ends in .npz, .pt, .pth"),
        (("{nets}:net", "-o", "out.pt", "--data", "{nets}:number"), "a function gives batches"),
        (("{nets}:net", "-o", "out.pt", "--data", "{nets}:raising"), "raised KeyError"),
        (("{nets}:net", "-o", "out.pt", "--data", "code.pt"), "cannot be read as tensors"),
        (("{nets}:net", "-o", "out.pt", "--data", "x.npz", "--batch-size", "0"), "at least one sample"),
        (("{nets}:net", "-o", "out.pt", "--device", "nowhere"), "--device nowhere cannot be used here"),
        (("{nets}:refusing", "-o", "out.pt", "--data", "{nets}:batches"), "image, label"),
    ],
)
def test_a_wrong_word_gives_one_clear_error_and_no_file(run, place, words, says):  # noqa: F811
    torch.save(Code(), "code.pt")
    Path("broken.safetensors").write_bytes(b"no")
    message = refused(run("freeze", *(word.replace("{nets}", place.name) for word in words)))
    assert says in message
    assert no_more_files(place, "code.pt", "broken.safetensors")


def test_what_only_one_verb_asks_for(run, place):  # noqa: F811
    net = f"{place.name}:net"
    assert "--data is missing" in refused(run("calibrate", net, "-o", "out.pt"))
    assert "--steps -1" in refused(run("calibrate", net, "--data", "x.npz", "--steps", "-1", "-o", "out.pt"))
    assert "one of them" in refused(run("fold", net, "-o", "out.pt"))
    assert "one of them" in refused(run("fold", net, "--data", "x.npz", "--shape", "2,3,8,8", "-o", "out.pt"))
    assert "raises" in refused(run("fold", net, "--shape", "2,5,8,8", "-o", "out.pt"))
    assert "'nonsense'" in refused(run("convert", net, "--to", "nonsense", "-o", "out.pt"))
    assert no_more_files(place)


def test_a_missing_extra_is_named_before_any_work(run, place, monkeypatch):  # noqa: F811
    from normkit.cli import errors

    find = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name))
    for words in (("-o", "out.safetensors"), ("--checkpoint", "in.safetensors", "-o", "out.pt")):
        message = refused(run("freeze", f"{place.name}:net", *words))
        assert 'pip install "normkit[export]"' in message


PAGE = (Path(__file__).parent.parent / "docs" / "surgery-on-files.md").read_text()
COMMANDS = re.findall(r"^\$ (normkit .*)$", PAGE, re.MULTILINE)
(SAID,) = re.findall(r"first line of each is its verdict:\n\n```\n(.*?)```", PAGE, re.DOTALL)


def test_the_commands_of_the_page_do_what_it_says(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "nets.py").write_text(program)
    save_file(built(tmp_path / "nets.py", "net").state_dict(), "in.safetensors")
    np.savez("images.npz", torch.randn(8, 3, 16, 16).numpy())
    verdicts = [answered(run(*shlex.split(command)[1:]))[0] for command in COMMANDS]
    assert verdicts == SAID.splitlines()
    assert {path.name for path in tmp_path.glob("*.p*t*")} >= {"net.pt2", "groups.pt", "frozen.pt", "synchronised.pt"}

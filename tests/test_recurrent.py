"""LSTM, GRU and RNN with norms inside: against the formulas, one sample and one step after the other, in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import normkit as nk

KINDS = {"LSTM": nk.LSTM, "GRU": nk.GRU, "RNN": nk.RNN}
NORMS = (None, "layer", "rms", "batch", "batch:per_step:9")
LENGTHS = [4, 7, 1, 7, 4]
STEPS, INPUTS, WIDTH = 7, 3, 6


def made(kind, norm, **options):
    """A layer in float64 whose parameters are all away from 0 and 1."""
    layer = KINDS[kind](INPUTS, WIDTH, norm=norm, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.3, 0.9).mul_(torch.randn_like(parameter).sign())
    return layer


class Rows:
    """A norm of the rows of one time step that count, (n, c), by its definition; batch norm per step and over all."""

    def __init__(self, layer, part, norm):
        found = None if layer.norms is None else layer.norms["l0"]
        self.own = found[part].norm if found is not None and part in found else None
        self.norm = norm

    def __call__(self, x):
        if self.own is None:
            return x
        if self.norm.startswith("batch"):
            z = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
            if len(x) == 1 and "per_step" in self.norm:  # which has the running statistics, as they were at first
                z = x / (1 + 1e-5) ** 0.5
        elif self.norm == "rms":
            z = x / ((x**2).mean(1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        else:
            z = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        bias = getattr(self.own, "bias", None)
        return z * self.own.weight + (0 if bias is None else bias)


def by_hand(layer, x, lengths):
    """One layer in one direction, from the formulas: (steps, n, c), and the last states."""
    kind, norm, n = layer.mode, layer.norm or "", x.shape[1]
    of_input, of_hidden, of_cell = (Rows(layer, part, norm) for part in ("input", "hidden", "cell"))
    zero = torch.zeros(WIDTH).double()
    h, c = [zero] * n, [zero] * n
    outputs = [[zero] * n for _ in x]
    together = norm == "batch"  # the statistics of the input's part are those of all time steps
    valid = [(t, s) for t in range(len(x)) for s in range(n) if t < lengths[s]]
    driven = dict(zip(valid, of_input(torch.stack([layer.weight_ih_l0 @ x[t, s] for t, s in valid])), strict=True))
    for t in range(max(lengths)):
        alive = [s for s in range(n) if t < lengths[s]]
        rows = torch.stack([layer.weight_ih_l0 @ x[t, s] for s in alive])
        d = (torch.stack([driven[t, s] for s in alive]) if together else of_input(rows)) + layer.bias_ih_l0
        u = of_hidden(torch.stack([layer.weight_hh_l0 @ h[s] for s in alive])) + layer.bias_hh_l0
        if kind == "LSTM":
            i, f, g, o = (d + u).chunk(4, 1)
            cell = f.sigmoid() * torch.stack([c[s] for s in alive]) + i.sigmoid() * g.tanh()
            new, cells = o.sigmoid() * of_cell(cell).tanh(), cell
        elif kind == "GRU":
            (r, z, _), (ur, uz, un) = d.chunk(3, 1), u.chunk(3, 1)
            r, z = (r + ur).sigmoid(), (z + uz).sigmoid()
            candidate = (d.chunk(3, 1)[2] + r * un).tanh()
            new = cells = (1 - z) * candidate + z * torch.stack([h[s] for s in alive])
        else:
            new = cells = (d + u).tanh()
        for row, s in enumerate(alive):
            h[s], c[s] = new[row], cells[row]
            outputs[t][s] = new[row]
    last = (torch.stack(h), torch.stack(c)) if kind == "LSTM" else (torch.stack(h),)
    return torch.stack([torch.stack(step) for step in outputs]), last


def gradients(layer, x, outputs):
    upstream = [torch.linspace(-1, 2, y.numel()).double().reshape(y.shape).sin() for y in outputs]
    parameters = [p for _, p in sorted(layer.named_parameters())]
    return torch.autograd.grad(outputs, [x, *parameters], upstream, allow_unused=True)


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("placement", ["all", "input"])
@pytest.mark.parametrize(("kind", "norm"), [*itertools.product(KINDS, NORMS)], ids=str)
def test_outputs_and_gradients_are_those_of_the_formulas(kind, norm, placement, ragged):
    layer = made(kind, norm, placement=placement)
    x = (2 * torch.randn(STEPS, 5, INPUTS).double() + 1).requires_grad_()
    lengths = LENGTHS if ragged else [STEPS] * 5
    wanted, states = by_hand(copy.deepcopy(layer) if norm is None else layer, x, lengths)
    got, state = layer(x, lengths=lengths if ragged else None)
    state = state if isinstance(state, tuple) else (state,)
    for mine, other in zip((got, *(s[0] for s in state)), (wanted, *states), strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11)
    if norm is None:
        wanted, states = by_hand(layer, x, lengths)
    for mine, other in zip(
        gradients(layer, x, (got, *(s[0] for s in state))), gradients(layer, x, (wanted, *states)), strict=True
    ):
        assert (mine is None) == (other is None)
        assert mine is None or torch.allclose(mine, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "norm"), [*itertools.product(KINDS, NORMS[1:])], ids=str)
def test_two_layers_in_two_directions_are_four_layers_of_one(kind, norm, batch_first):
    """Each reads the sequences from their own end, in whatever way their lengths are told."""
    layer = made(kind, norm, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(STEPS, 5, INPUTS).double()
    reached, wanted_last = x, []
    for place in ("l0", "l1"):
        ways = []
        for end in ("", "_reverse"):
            single = KINDS[kind](reached.shape[2], WIDTH, norm=norm).double()
            own = {
                name.replace(f"_{place}{end}", "_l0").replace(f"norms.{place}{end}.", "norms.l0."): value
                for name, value in layer.state_dict().items()
                if name.endswith(f"_{place}{end}") or name.startswith(f"norms.{place}{end}.")
            }
            single.load_state_dict(own)
            turn = [list(range(n))[:: -1 if end else 1] + list(range(n, STEPS)) for n in LENGTHS]
            turned = torch.stack([reached[order, s] for s, order in enumerate(turn)], 1)
            y, last = single(turned, lengths=LENGTHS)
            ways.append(torch.stack([y[order, s] for s, order in enumerate(turn)], 1))
            wanted_last.append(last[0] if kind == "LSTM" else last)
        reached = torch.cat(ways, 2)
    mask = torch.arange(STEPS)[:, None] < torch.tensor(LENGTHS)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    fresh = lambda: copy.deepcopy(layer)  # whose running statistics have not moved
    as_given = x.transpose(0, 1) if batch_first else x
    told = [
        fresh()(as_given, lengths=LENGTHS),
        fresh()(as_given, mask=mask.T if batch_first else mask),
        fresh()(packed),
    ]
    for y, last in told:
        if isinstance(y, nn.utils.rnn.PackedSequence):
            assert y.batch_sizes.equal(packed.batch_sizes)
            y = pad_packed_sequence(y, batch_first=batch_first)[0]
        y = y.transpose(0, 1) if batch_first else y
        assert torch.allclose(y, reached, atol=1e-12)
        assert torch.allclose(last[0] if kind == "LSTM" else last, torch.cat(wanted_last), atol=1e-12)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("norm", [None, "identity"])
@pytest.mark.parametrize(("kind", "options"), [
    ("LSTM", {}), ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 4, "batch_first": True}),
    ("GRU", {"num_layers": 2, "bias": False}), ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
], ids=str)  # fmt: skip
def test_without_a_norm_it_is_torchs_layer_in_every_form(kind, options, norm):
    own, twin = KINDS[kind](INPUTS, WIDTH, norm=norm, **options), getattr(nn, kind)(INPUTS, WIDTH, **options)
    own.load_state_dict(twin.state_dict())
    assert isinstance(own, getattr(nn, kind))
    x = torch.randn(5, STEPS, INPUTS) if options.get("batch_first") else torch.randn(STEPS, 5, INPUTS)
    _, first = twin(x)
    packed = pack_padded_sequence(
        x, torch.tensor(LENGTHS), batch_first=bool(options.get("batch_first")), enforce_sorted=False
    )
    single = x[0] if options.get("batch_first") else x[:, 0]
    flat = lambda t: [t] if isinstance(t, torch.Tensor) else [part for each in t for part in flat(each)]
    for given in ((x,), (x, first), (single,), (packed,), (packed, first)):
        unpack = lambda y: y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
        (y, last), (wanted, wanted_last) = own(*given), twin(*given)
        for mine, other in zip(flat((unpack(y), last)), flat((unpack(wanted), wanted_last)), strict=True):
            assert mine.shape == other.shape
            assert torch.allclose(mine, other, atol=1e-6)


def test_a_checkpoint_of_torch_loads_and_leaves_the_norms_as_they_are():
    own, twin = nk.LSTM(INPUTS, WIDTH, 2, norm="batch:per_step:9"), nn.LSTM(INPUTS, WIDTH, 2)
    own.load_state_dict(twin.state_dict())
    assert own.weight_hh_l1.equal(twin.weight_hh_l1)
    assert (own.norms["l1"]["cell"].norm.weight == 0.1).all()
    model = nn.Sequential(own)
    model.load_state_dict(nn.Sequential(twin).state_dict())
    own(torch.randn(STEPS, 5, INPUTS))
    other = nk.LSTM(INPUTS, WIDTH, 2, norm="batch:per_step:9")
    other.load_state_dict(own.state_dict())
    x = torch.randn(STEPS, 5, INPUTS)
    assert own.eval()(x)[0].equal(other.eval()(x)[0])
    missing = {name: value for name, value in own.state_dict().items() if "cell" not in name}
    with pytest.raises(RuntimeError, match="cell"):
        other.load_state_dict(missing)


def test_every_step_has_statistics_and_later_ones_take_the_last_that_training_has_reached():
    layer = nk.RNN(INPUTS, WIDTH, norm="batch:per_step:20").double()
    for _ in range(100):
        layer(torch.arange(1.0, 6.0).double()[:, None, None] * torch.randn(5, 32, INPUTS).double() + 3)
    norm = layer.norms["l0"]["input"].norm
    table = norm.statistics_state
    assert table.batches.tolist() == [100] * 5 + [0] * 15
    assert table.var[4].mean() / table.var[0].mean() == pytest.approx(25, rel=0.3)
    x = torch.randn(9, 4, INPUTS).double()
    y, _ = layer.eval()(x)
    last = (x[8] @ layer.weight_ih_l0.T - table.mean[4]) / (table.var[4] + 1e-5).sqrt() * norm.weight
    hidden = layer.norms["l0"]["hidden"].norm
    before = y[7] @ layer.weight_hh_l0.T
    own = hidden.statistics_state
    u = (before - own.mean[4]) / (own.var[4] + 1e-5).sqrt() * hidden.weight
    assert torch.allclose(y[8], (last + layer.bias_ih_l0 + u + layer.bias_hh_l0).tanh())


def test_a_norm_in_training_inside_a_layer_in_evaluation_measures_every_step():
    layer = nk.LSTM(INPUTS, WIDTH, norm="batch:per_step:4").eval()
    for norm in (part.norm for part in layer.norms["l0"].values()):
        norm.train()
    layer(torch.randn(4, 6, INPUTS))
    assert layer.norms["l0"]["cell"].norm.statistics_state.batches.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_shown_as_it_arises_and_has_its_whole_gradient(kind, norm):
    layer = made(kind, norm, num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(STEPS, 5, INPUTS).double(), torch.tensor(LENGTHS), enforce_sorted=False)
    wanted, _ = layer(packed)
    seen = {}
    layer.on_state = lambda place, step, h: seen.__setitem__((place, step), h)
    y, _ = layer(packed)
    assert torch.allclose(y.data, wanted.data, atol=1e-12)
    assert list(seen) == [(place, step) for place in range(4) for step in range(STEPS)]
    first, last = torch.autograd.grad(y.data.sin().sum(), [seen[2, 0], seen[2, STEPS - 1]])
    assert first.shape == last.shape == (5, WIDTH)
    assert torch.allclose(last[:2], seen[2, STEPS - 1][:2].cos())  # only the output comes behind it; two have got there
    assert not last[2:].any()
    assert (first - seen[2, 0].cos()).abs().max() > 1e-6  # to the first one all others come back


@pytest.mark.parametrize("norm", NORMS[1:])
def test_padding_is_never_seen(norm):
    """NaN in it changes no output, no gradient and no statistic."""
    layer = made("LSTM", norm)
    x = torch.randn(STEPS, 5, INPUTS).double()
    dirty = x.clone()
    for sample, length in enumerate(LENGTHS):
        dirty[length:, sample] = torch.nan
    results = []
    for given in (x, dirty):
        own = copy.deepcopy(layer)
        y, (h, c) = own(given, lengths=LENGTHS)
        y.sin().sum().add(h.sum()).backward()
        results.append([y, h, c, *(p.grad for p in own.parameters()), *own.state_dict().values()])
    for clean, other in zip(*results, strict=True):
        assert torch.isfinite(other).all()
        assert clean.equal(other)
    assert not y[4:, 0].any()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMS norm under autocast
@pytest.mark.parametrize("norm", NORMS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_comes_near(kind, norm):
    layer = made(kind, norm).float()
    x = torch.randn(STEPS, 16, INPUTS)
    wanted = copy.deepcopy(layer)(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
        y.float().square().mean().backward()
    assert (y.float() - wanted).abs().mean() < 0.1
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in layer.parameters())


def test_the_first_scales():
    weights = lambda layer: {
        round(float(p.detach().mean()), 6) for name, p in layer.named_parameters() if name.endswith("norm.weight")
    }
    assert weights(nk.LSTM(3, 4, norm="batch")) == {0.1}
    assert weights(nk.LSTM(3, 4, norm="layer")) == {1.0}
    assert weights(nk.LSTM(3, 4, norm="batch", placement="input")) == {1.0}
    layer = nk.LSTM(3, 4, norm="batch", scale=0.5)
    layer.reset_parameters()
    assert weights(layer) == {0.5}
    assert "norm='batch', scale=0.5" in repr(layer)
    assert set(layer.norms["l0"]) == {"input", "hidden", "cell"}
    assert set(nk.GRU(3, 4, norm="batch", placement="input").norms["l0"]) == {"input"}


def test_what_it_refuses():
    lstm, x = nk.LSTM(3, 4, norm="layer"), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="placement='hidden' is neither all nor input"):
        nk.LSTM(3, 4, norm="layer", placement="hidden")
    with pytest.raises(ValueError, match=r"lengths are .* from 1 to the 5 steps"):
        lstm(x, lengths=[6, 1])
    with pytest.raises(ValueError, match="has gaps"):
        lstm(x, mask=torch.tensor([[True, True], [False, True], [True, True], [True, True], [True, True]]))
    with pytest.raises(ValueError, match="give one of them"):
        lstm(x, lengths=[5, 1], mask=torch.ones(5, 2).bool())
    with pytest.raises(ValueError, match=r"the mask is \(2, 5\)"):
        lstm(x, mask=torch.ones(2, 5).bool())
    with pytest.raises(ValueError, match="a packed sequence knows its lengths"):
        lstm(pack_padded_sequence(x, [5, 1]), lengths=[5, 1])
    with pytest.raises(ValueError, match="no time step"):
        lstm(x[:0])
    with pytest.raises(RuntimeError, match="Expected hidden"):
        lstm(x, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))

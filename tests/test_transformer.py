"""Transformer layers with any norm: against torch's own, and against the formulas in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.blocks import ProgressiveRepBatchNorm, RepBatchNorm, settle_

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, in dynamo
WIDTH, HEADS, INNER, N, T, S = 8, 2, 12, 3, 6, 5
NORMS = ("layer", "rms", "batch", "power:1000", "rep", "progressive:4:1", "none")
LENGTHS = torch.tensor([6, 3, 5])
PADDING = torch.arange(T) >= LENGTHS[:, None]
CAUSAL = torch.ones(T, T).triu(1).bool()


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.3, 0.9).mul_(torch.randn_like(parameter).sign())
            if parameter.dim() > 1:
                parameter.div_(3)
    return layer


def encoder(**options):
    given = {"dropout": 0.0, "batch_first": True, **options}
    return randomised(nk.TransformerEncoderLayer(WIDTH, HEADS, INNER, **given)).double()


MASKS = {
    "none": {},
    "causal": {"src_mask": CAUSAL, "is_causal": True},
    "padding": {"src_key_padding_mask": PADDING},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
    "added": {"src_mask": torch.randn(T, T).double(), "src_key_padding_mask": -1e9 * PADDING.double()},
    "by_head": {"src_mask": torch.randn(N * HEADS, T, T).double()},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("batch_first", "norm_first", "bias"), [*itertools.product([False, True], repeat=3)])
def test_with_layer_norm_the_encoder_layer_is_torchs(batch_first, norm_first, bias, masks):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first, "bias": bias, "activation": "gelu"}
    twin = randomised(nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, **options)).double()
    own = nk.TransformerEncoderLayer(WIDTH, HEADS, INNER, **options).double()
    own.load_state_dict(twin.state_dict())
    twin.load_state_dict(own.state_dict())
    x = torch.randn(N, T, WIDTH).double() if batch_first else torch.randn(T, N, WIDTH).double()
    upstream = torch.randn(x.shape).double()
    found = []
    for layer in (own, twin):
        given = x.clone().requires_grad_()
        y = layer(given, **MASKS[masks])
        found.append([y, *torch.autograd.grad(y, [given, *layer.parameters()], upstream)])
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11)
    assert torch.allclose(own.eval()(x), own.train()(x))


def test_one_sequence_without_a_batch():
    twin = randomised(nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0)).double()
    own = nk.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0).double()
    own.load_state_dict(twin.state_dict())
    x = torch.randn(T, WIDTH).double()
    assert torch.allclose(own(x), twin(x))
    padding = {"src_key_padding_mask": PADDING[1]}
    assert torch.allclose(own(x, **padding), twin(x, **padding))


@pytest.mark.parametrize(("batch_first", "norm_first"), [*itertools.product([False, True], repeat=2)])
def test_with_layer_norm_the_decoder_layer_is_torchs(batch_first, norm_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    twin = randomised(nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, **options)).double()
    own = nk.TransformerDecoderLayer(WIDTH, HEADS, INNER, **options).double()
    own.load_state_dict(twin.state_dict())
    x, memory = torch.randn(N, T, WIDTH).double(), torch.randn(N, S, WIDTH).double()
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    masks = {
        "tgt_mask": CAUSAL,
        "tgt_is_causal": True,
        "tgt_key_padding_mask": PADDING,
        "memory_key_padding_mask": torch.arange(S) >= torch.tensor([[2], [5], [4]]),
    }
    found = []
    for layer in (own, twin):
        leaves = [x.clone().requires_grad_(), memory.clone().requires_grad_()]
        y = layer(*leaves, **masks)
        upstream = torch.linspace(-1, 2, y.numel()).double().view(y.shape).sin()
        found.append([y, *torch.autograd.grad(y, [*leaves, *layer.parameters()], upstream)])
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11)


class ByHand:
    """An encoder layer from the formulas: lists of the real tokens of each sample, loops over samples and heads."""

    def __init__(self, layer, norm):
        self.layer, self.norm = layer, norm

    def normalised(self, own, samples, eps=1e-5, kind=None):
        rows, kind = torch.cat(samples), kind or self.norm.partition(":")[0]
        by_layer = lambda: (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + eps).sqrt()
        by_batch = lambda: (rows - rows.mean(0)) / (rows.var(0, correction=0) + eps).sqrt()
        if kind == "none":
            z = rows
        elif kind == "layer":
            z = by_layer() * own.weight + own.bias
        elif kind == "rms":
            z = rows / ((rows**2).mean(1, keepdim=True) + eps).sqrt() * own.weight
        elif kind == "batch":
            z = by_batch() * own.weight + own.bias
        elif kind == "power":
            z = rows / ((rows**2).mean(0) + eps).sqrt() * own.weight + own.bias
        elif kind == "rep":
            z = by_batch() * own.norm.weight + own.norm.bias + own.skip * rows
        else:
            z = by_layer() * own.layer.weight + own.layer.bias  # of the first batch nothing else has a share
        return z.split([len(s) for s in samples])

    def attention(self, samples, causal):
        a, done = self.layer.self_attn, []
        for x in samples:
            heads = []
            for head in range(HEADS):
                d = WIDTH // HEADS
                part = lambda w: slice(w * WIDTH + head * d, w * WIDTH + head * d + d)  # noqa: B023
                q, k, v = (x @ a.in_proj_weight[part(w)].T + a.in_proj_bias[part(w)] for w in range(3))
                if self.layer.self_attn_norms is not None:
                    eps = torch.finfo(q.dtype).eps  # torch's default of RMS norm
                    q, k = (
                        self.normalised(self.layer.self_attn_norms[name], [t], eps, "rms")[0]
                        for name, t in (("query", q), ("key", k))
                    )
                scores = q @ k.T / d**0.5
                if causal:
                    scores = scores.masked_fill(CAUSAL[: len(x), : len(x)], -torch.inf)
                heads.append(scores.softmax(1) @ v)
            done.append(torch.cat(heads, 1) @ a.out_proj.weight.T + a.out_proj.bias)
        return done

    def network(self, samples):
        own = self.layer
        inner = [x @ own.linear1.weight.T + own.linear1.bias for x in samples]
        if own.ffn_norm is not None:
            inner = self.normalised(own.ffn_norm, inner)
        return [x.relu() @ own.linear2.weight.T + own.linear2.bias for x in inner]

    def __call__(self, samples, causal):
        own = self.layer
        for norm, branch in ((own.norm1, lambda s: self.attention(s, causal)), (own.norm2, self.network)):
            if own.norm_first:
                samples = [x + b for x, b in zip(samples, branch(self.normalised(norm, samples)), strict=True)]
            else:
                samples = self.normalised(norm, [x + b for x, b in zip(samples, branch(samples), strict=True)])
        return samples


@pytest.mark.parametrize("extra", [{}, {"qk_norm": "rms"}, {"ffn_norm": True}], ids=["", "qk", "ffn"])
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", NORMS)
def test_outputs_and_gradients_are_those_of_the_formulas(norm, placement, extra):
    options = {key: norm if value is True else value for key, value in extra.items()}
    layer = encoder(norm=norm, placement=placement, **options)
    x = (2 * torch.randn(N, T, WIDTH).double() + 1).requires_grad_()
    samples = [x[s, : LENGTHS[s]] for s in range(N)]
    wanted = torch.cat(ByHand(copy.deepcopy(layer), norm)(samples, causal=True))
    got = torch.cat([*_real(layer(x, src_key_padding_mask=PADDING, is_causal=True))])
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-10)
    own = copy.deepcopy(layer)
    wanted = torch.cat(ByHand(layer, norm)(samples, causal=True))
    fresh = encoder(norm=norm, placement=placement, **options)
    fresh.load_state_dict(own.state_dict())
    for part in fresh.modules():
        if isinstance(part, nk.BatchNorm1d):
            part.reset_running_stats()
    got = torch.cat([*_real(fresh(x, src_key_padding_mask=PADDING, is_causal=True))])
    upstream = torch.linspace(-1, 2, got.numel()).double().view(got.shape).sin()
    mine = torch.autograd.grad(got, [x, *fresh.parameters()], upstream, allow_unused=True)
    other = torch.autograd.grad(wanted, [x, *layer.parameters()], upstream, allow_unused=True)
    for name, a, b in zip(["x", *dict(layer.named_parameters())], mine, other, strict=True):
        a, b = (torch.zeros(()).double() if t is None else t for t in (a, b))
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9), name


def _real(y):
    return (y[s, : LENGTHS[s]] for s in range(N))


@pytest.mark.parametrize("norm", NORMS)
def test_padding_is_never_seen(norm):
    """Whatever number stands in it changes no output of a real token and no statistic."""
    x = torch.randn(N, T, WIDTH).double()
    results, first = [], encoder(norm=norm, ffn_norm=norm)
    for far in (0.0, 1e6):
        layer = copy.deepcopy(first)
        given = torch.where(PADDING[..., None], far, x)
        y = layer(given, src_key_padding_mask=PADDING)
        torch.cat([*_real(y)]).sin().sum().backward()
        results.append([*_real(y), *layer.buffers(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    for clean, other in zip(*results, strict=True):
        assert torch.allclose(clean, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "norm", [n if n.startswith("progressive") else pytest.param(n, marks=pytest.mark.slow) for n in NORMS]
)
def test_it_compiles_whole_exports_saves_and_loads(norm):
    torch._dynamo.reset()
    layer = encoder(norm=norm, qk_norm="layer", ffn_norm=norm, placement="pre")
    x = torch.randn(N, T, WIDTH).double()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    plain = copy.deepcopy(layer)
    for _ in range(3):
        given = [x.clone().requires_grad_() for _ in range(2)]
        for run, leaf in zip((compiled, plain), given, strict=True):
            run(leaf, src_key_padding_mask=PADDING, is_causal=True).sin().sum().backward()
        assert torch.allclose(given[0].grad, given[1].grad, rtol=1e-9, atol=1e-11)
    other = nk.TransformerEncoderLayer(
        WIDTH, HEADS, INNER, batch_first=True, norm=norm, qk_norm="layer", ffn_norm=norm, placement="pre"
    ).double()
    other.load_state_dict(plain.state_dict())
    assert other.eval()(x).equal(plain.eval()(x))
    exported = torch.export.export(plain, (x,)).module()
    assert torch.allclose(exported(x), plain(x), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when Inductor is loaded
@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_inductor_compiles_the_whole_block(norm):
    torch._dynamo.reset()
    layer = encoder(norm=norm, qk_norm="rms", ffn_norm=norm, placement="pre")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="inductor")
    x = torch.randn(N, T, WIDTH).double()
    upstream = torch.randn(x.shape).double()
    for _ in range(2):
        found = []
        for run in (compiled, layer):
            given = x.clone().requires_grad_()
            y = run(given, src_key_padding_mask=PADDING, is_causal=True)
            found.append([y, *torch.autograd.grad(y, [given, *run.parameters()], upstream)])
        for mine, wanted in zip(*found, strict=True):
            assert torch.allclose(mine, wanted, rtol=1e-8, atol=1e-10)
    for (name, mine), wanted in zip(compiled.named_buffers(), layer.buffers(), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-6), name


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMS norm under autocast
@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_autocast_comes_near(norm):
    layer = encoder(norm=norm, qk_norm="rms", ffn_norm=norm, placement="pre").float()
    x = torch.randn(N, T, WIDTH)
    wanted = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().mean().backward()
    assert (y - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_it_stands_in_torchs_encoder():
    for norm in ("layer", "batch"):
        layer = encoder(norm=norm)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        x = torch.randn(N, T, WIDTH).double()
        for mode in (True, False):
            model.train(mode)
            y = model(x, src_key_padding_mask=PADDING)
            again = copy.deepcopy(model)
            by_hand = x
            for block in again.layers:
                by_hand = block(by_hand, src_key_padding_mask=PADDING)
            assert mode or torch.allclose(y, by_hand)
            assert y.shape == x.shape


def test_what_it_refuses():
    with pytest.raises(ValueError, match="placement='peri' is neither pre nor post"):
        encoder(placement="peri")
    with pytest.raises(ValueError, match="write progressive:STEPS"):
        encoder(norm="progressive")
    with pytest.raises(ValueError, match="no norm named 'layr'"):
        encoder(norm="layr")
    with pytest.raises(ValueError, match="steps=0"):
        ProgressiveRepBatchNorm(4, 0)


def test_progressive_goes_from_layer_norm_to_rep_batch_norm():
    norm = ProgressiveRepBatchNorm(WIDTH, steps=4, warmup=2).double()
    twin = nn.LayerNorm(WIDTH).double()
    with torch.no_grad():
        twin.weight.uniform_(0.5, 2)
        twin.bias.uniform_(-1, 1)
    norm.load_state_dict(twin.state_dict())
    norm.load_state_dict(norm.state_dict())
    shares = []
    for _ in range(8):
        x = 3 * torch.randn(50, WIDTH).double() + 1
        shares.append(norm.share.item())
        rep = copy.deepcopy(norm.rep)
        by_batch = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() + x
        assert torch.allclose(norm(x), shares[-1] * twin(x) + (1 - shares[-1]) * by_batch)
        assert torch.allclose(rep(x), by_batch)
    assert shares == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    x = torch.randn(5, WIDTH).double()
    assert norm.eval()(x).equal(norm.rep(x))
    norm.rep.norm.num_batches_tracked.fill_(4)
    assert torch.allclose(norm(x), 0.5 * twin(x) + 0.5 * norm.rep(x))


def test_a_recomputing_pass_has_the_share_of_the_first_one():
    x = torch.randn(16, WIDTH, requires_grad=True)
    grads = []
    for run in (lambda norm: norm(x), lambda norm: checkpoint(norm, x, use_reentrant=False)):
        norm = ProgressiveRepBatchNorm(WIDTH, steps=3)
        for _ in range(2):
            run(norm).sin().sum().backward()
        grads.append([p.grad for p in norm.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.allclose(plain, again, atol=1e-6)


class Reader(nn.Module):
    """Two pre-norm blocks and a head: every norm has a linear layer behind it."""

    def __init__(self, norm, ffn_norm=None):
        super().__init__()
        options = {"batch_first": True, "norm": norm, "placement": "pre", "ffn_norm": ffn_norm}
        self.blocks = nn.Sequential(
            *(nk.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, **options) for _ in range(2))
        )
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


@pytest.mark.parametrize("norm", ["batch", "rep", "progressive:3"])
def test_what_batch_norm_has_become_folds_into_the_linear_layers(norm):
    model = randomised(Reader(norm, ffn_norm=norm))
    for _ in range(20):
        model(2 * torch.randn(16, T, WIDTH) + 1)
    model.eval()
    x = 2 * torch.randn(16, T, WIDTH) + 1
    wanted = model(x)
    settle_(model)
    assert not any(isinstance(part, ProgressiveRepBatchNorm) for part in model.modules())
    assert model(x).equal(wanted)
    folded = nk.fold(model, x)
    kinds = {type(part) for part in folded.modules()}
    assert not kinds & {nk.BatchNorm1d, RepBatchNorm}, folded
    assert (folded(x) - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)


def test_settling_too_early_is_refused_and_changes_nothing():
    model = Reader("progressive:4")
    model(torch.randn(2, T, WIDTH))
    with pytest.raises(ValueError, match=r"share in 4 places: blocks.0.norm1 0.75"):
        settle_(model)
    assert isinstance(model.blocks[0].norm1, ProgressiveRepBatchNorm)
    alone = ProgressiveRepBatchNorm(4, 1)
    alone(torch.randn(8, 4))
    assert settle_(alone) is alone.rep

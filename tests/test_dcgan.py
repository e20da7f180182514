"""DCGAN: shapes, who sees whose statistics, spectral norm, and that two networks learn from each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit as nk
from normkit.blocks import Discriminator, Generator, judge

SMALL = {"size": 8, "smallest": 2, "width": 8}


def norms(model):
    return [m for m in model.modules() if hasattr(m, "running_mean")]


@pytest.mark.parametrize(("size", "smallest", "inner"), [(64, 4, 3), (32, 4, 2), (8, 2, 1), (8, 4, 0)])
def test_shapes_and_where_norms_stand(size, smallest, inner):
    """Behind every layer but the last of the generator, and the first and last of the discriminator."""
    generator = Generator(6, 3, size, width=4, smallest=smallest)
    discriminator = Discriminator(3, size, width=4, smallest=smallest)
    images = generator(torch.randn(2, 6))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2,)
    assert len(norms(generator)) == inner + 1
    assert len(norms(discriminator)) == inner
    assert isinstance(generator.layers[-1], nn.Tanh)
    assert isinstance(generator.layers[-2], nn.ConvTranspose2d)


def test_initial_weights_have_the_deviation_of_the_paper():
    for model in (Generator(64, size=16), Discriminator(size=16)):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert layer.bias is None or not layer.bias.any()


def test_a_bias_stands_where_no_norm_follows():
    assert Generator(6, **SMALL).layers[0].bias is None
    for none in (None, nk.factory("none")):
        assert Generator(6, **SMALL, norm_layer=none).layers[0].bias is not None


@pytest.mark.parametrize(("size", "smallest"), [(4, 4), (12, 4), (7, 2), (8, 0)])
def test_sizes_that_cannot_be_are_refused(size, smallest):
    for kind in (lambda **k: Generator(4, **k), Discriminator):
        with pytest.raises(ValueError, match=f"size={size} is not smallest={smallest} times 2, 4, 8"):
            kind(size=size, smallest=smallest)


def test_virtual_batch_norm_frees_samples_of_each_other():
    torch.manual_seed(0)
    z, reference = torch.randn(4, 6), torch.randn(8, 6)
    virtual, plain = Generator(6, **SMALL, norm_layer=nk.factory("batch:virtual")), Generator(6, **SMALL)
    with nk.reference_batch(virtual, reference):
        assert torch.allclose(virtual(z)[:2], virtual(z[:2]), atol=1e-6)
    assert not torch.allclose(plain(z)[:2], plain(z[:2]), atol=1e-6)


def test_spectral_norm_bounds_every_weight():
    torch.manual_seed(0)
    model = Discriminator(**SMALL, norm_layer=None, spectral_norm=True)
    for _ in range(100):  # power iteration runs at each forward pass in training
        model(torch.randn(2, 1, 8, 8))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-2)


def test_separated_statistics_and_mixed_ones():
    torch.manual_seed(0)
    real, fake = torch.randn(6, 1, 8, 8), 4 + torch.randn(5, 1, 8, 8)
    policy = nk.statistics.PerDomain(2)
    model = Discriminator(**SMALL, norm_layer=nk.factory("batch", statistics=policy))
    of_real, of_fake = model.judge(real, fake)
    (norm,) = norms(model)
    assert norm.statistics_state.batches.tolist() == [1, 1]
    assert not torch.allclose(*norm.statistics_state.mean, atol=1e-3)
    with nk.domain(0):
        assert model(real).equal(of_real)
    with nk.domain(1):
        assert model(fake).equal(of_fake)
    plain = Discriminator(**SMALL)
    plain.load_state_dict(model.state_dict(), strict=False)
    mixed = plain.judge(real, fake, mixed=True)
    assert torch.cat(mixed).equal(plain(torch.cat([real, fake])))
    assert [len(part) for part in mixed] == [6, 5]
    assert not torch.allclose(mixed[0], of_real, atol=1e-3)
    assert all(a.equal(b) for a, b in zip(judge(plain, real, fake), plain.judge(real, fake), strict=True))


def test_two_networks_learn_from_each_other():
    """The target is one picture: after a few steps the generator draws it, whatever the noise."""
    torch.manual_seed(0)
    generator, discriminator = Generator(4, **SMALL), Discriminator(**SMALL, norm_layer=None, spectral_norm=True)
    picture = torch.where(torch.eye(8).bool(), 1.0, -1.0)
    steps = [torch.optim.Adam(m.parameters(), 4e-3, betas=(0.5, 0.999)) for m in (discriminator, generator)]
    distance = lambda: (generator(torch.randn(32, 4)) - picture).square().mean().item()
    before = distance()
    for _ in range(60):
        fake = generator(torch.randn(16, 4))
        real_logits, fake_logits = discriminator.judge(picture.expand(16, 1, 8, 8), fake.detach())
        steps[0].zero_grad()
        (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()).backward()
        steps[0].step()
        steps[1].zero_grad()
        F.softplus(-discriminator(fake)).mean().backward()
        steps[1].step()
    assert distance() < before / 4

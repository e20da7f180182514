"""The demonstration `style`: bands that are a picture, moments that are exchanged, and a page that shows it."""

from __future__ import annotations

import json

import pytest
import torch

from normkit.cli import main
from normkit.lab.demonstrations import style
from normkit.lab.demonstrations.bands import Bands, RandomConvolutions, moments


def pictures(side: int = 24) -> dict[str, torch.Tensor]:
    """A bright coarse one and a dark fine one."""
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), side, mode="bilinear")
    return {"coarse": 0.5 + coarse / 2, "fine": 0.3 * torch.rand(1, 3, side, side)}


def test_the_sum_of_the_bands_is_the_picture():
    bands, x = Bands(), torch.randn(2, 3, 20, 30)
    assert bands(x).shape == (2, Bands.channels, 20, 30)
    assert torch.allclose(bands.picture(bands(x)), x, atol=1e-5)
    flat = bands(torch.full((1, 3, 20, 30), 0.7))
    assert flat[:, :-3].abs().max() < 1e-6  # no detail in a picture without any
    assert flat[:, -3].mean().item() == pytest.approx(0.7 * 3**0.5, rel=1e-5)


def test_a_stripe_is_in_the_band_of_its_direction_and_scale():
    stripes = torch.zeros(1, 3, 32, 64)
    stripes[..., 1::2] = 1  # vertical, two pixels apart
    energy = Bands()(stripes)[0, ::3].square().sum((1, 2))  # of the light
    assert energy[:-1].argmax() == 1  # down, side, diagonal of the finest scale: side
    assert energy[1] > 0.8 * energy[:-1].sum()  # the rest is the border


def test_adain_gives_every_band_the_moments_of_the_other_picture():
    torch.manual_seed(0)
    content, look = 9 * torch.rand(1, 3, 70, 70), 2 + 5 * torch.rand(1, 3, 70, 90)  # far above eps
    bands = Bands()
    made = style.AdaptiveInstanceNorm()(bands(content), bands(look))
    assert torch.allclose(moments(made), moments(bands(look)), atol=5e-3)
    whole = style.transferred(content, look)
    assert torch.allclose(style.transferred(3 + content / 2, look), whole, atol=0.05)  # contrast is style


def test_instance_norm_takes_a_difference_away_that_batch_norm_leaves():
    torch.manual_seed(0)
    both, judge = torch.cat([2 + torch.rand(1, 3, 48, 48), 2.4 + 0.2 * torch.rand(1, 3, 48, 48)]), style.Judge()
    with torch.no_grad():
        apart = {
            name: judge.apart(*style.normed(name, both).split(1))["bands"] for name in ("none", "batch", "instance")
        }
    assert apart["instance"] < 0.4 * apart["none"]
    assert apart["batch"] > 0.6 * apart["none"]
    assert torch.allclose(style.normed("none", both), both, atol=1e-5)


def test_the_judge_of_convolutions_is_always_the_same():
    x = torch.rand(1, 3, 24, 24)
    assert all(a.equal(b) for a, b in zip(RandomConvolutions()(x), RandomConvolutions()(x), strict=True))


def test_the_page_shows_the_pictures_and_says_what_they_are(tmp_path):
    style.style(tmp_path, pictures())
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 + 2 + 4
    assert "coarse in the style of fine" in page
    assert "nothing is trained" in page
    told = json.loads((tmp_path / "style.json").read_text())
    assert {row["norm"]: set(row["apart"]) for row in told["norms"]}["none"] == {"bands", "convolutions"}
    assert all(0 < row["style_error"]["convolutions"] < 1 for row in told["transfers"])
    assert all(0 < row["change_at_half_contrast"] < 0.05 for row in told["transfers"])


def test_what_makes_no_sense_for_a_demonstration_is_refused(capsys):
    assert main(["compare", "style", "--quick"]) == 2
    assert "style is a demonstration, without arms, rates or seeds, and takes no --quick" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_shows_the_photographs(tmp_path, capsys):
    assert main(["compare", "style", "--out", str(tmp_path / "style")]) == 0
    assert "instance norm" in capsys.readouterr().out
    assert (tmp_path / "style" / "china-as-flower.jpg").exists()

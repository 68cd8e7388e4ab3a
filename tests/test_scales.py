"""Scales that are taught, scales that are only looked through, and the doubt between them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import AugmentConfig, ModelConfig, TrainConfig, half_octaves, parse_scales
from mvcr_cli.data.augment import augment, foreign_scales
from mvcr_cli.data.loader import Batch
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.loss import taught_sureness, unsure_loss
from mvcr_cli.engine.optim import WeightAverage, make_optimiser
from mvcr_cli.engine.session import Session
from mvcr_cli.engine.starting import Start
from mvcr_cli.errors import UsageError
from mvcr_cli.models import build, config_for
from mvcr_cli.models.mvcr import MultiScaleResNet, scale_norms
from mvcr_cli.models.resnet import BasicBlock
from mvcr_cli.models.scale_aware import ScaleBatchNorm2d
from mvcr_cli.models.scale_set import ConfidenceFusion, make_view, sureness

STILL = AugmentConfig(crop=1, zoom=0, shear=0, hflip=False, trivial=0)


def network(scales: tuple[float, ...], taught: tuple[float, ...] | None = None, **changes: object) -> MultiScaleResNet:
    """A small trunk with batch-norm statistics and last layer of its own, in evaluation mode."""
    torch.manual_seed(3)
    config = replace(config_for("mvcr10n", 5, scales=scales, stem="small"), width=8, taught=taught, **changes)  # type: ignore[arg-type]
    made = build(config).eval()
    assert isinstance(made, MultiScaleResNet)
    for norm in made.modules():
        if isinstance(norm, ScaleBatchNorm2d):
            for number in range(1 + len(norm.scales)):
                norm.of(number).running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                # The last of a block starts at 0, and with it the whole branch.
                norm.of(number).weight.data.uniform_(0.5, 1.5)
    return made


def pictures(count: int = 4, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("taught", [(1.0,), (1.0, 0.5), None])
def test_every_residual_branch_of_the_network_here_has_a_say(taught):
    mine, x = network((2.0, 1.0, 0.5), taught=taught), pictures()
    before = [mine.look_at(x, view) for view in range(3)]
    blocks = [block for block in mine.modules() if isinstance(block, BasicBlock)]
    assert len(blocks) == 4
    for block in blocks:
        kept = block.conv2.weight.clone()
        block.conv2.weight.zero_()
        assert not any(torch.allclose(mine.look_at(x, view), before[view], atol=1e-3) for view in range(3))
        block.conv2.weight.copy_(kept)


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("1,1/2", (1.0, 0.5)),
        ("2..1/2", (2.0, 2**0.5, 1.0, 0.5**0.5, 0.5)),
        ("1/4..4", tuple(2.0 ** (step / 2) for step in range(4, -5, -1))),
        ("1..1/4", (1.0, 0.5**0.5, 0.5, 0.5**1.5, 0.25)),
    ],
)
def test_scales_are_written_as_a_list_or_as_a_range_of_half_octaves(text, scales):
    assert parse_scales(text) == pytest.approx(scales, rel=1e-12)
    assert 1.0 in parse_scales(text)


@pytest.mark.parametrize("text", ["2..", "..", "1..2..4", "0..1", "-1..1", "2..4", "8..1", "a..b"])
def test_ranges_that_are_none_are_refused(text):
    with pytest.raises(UsageError):
        parse_scales(text)


def test_half_octaves_keep_powers_of_two_exact():
    assert {4.0, 2.0, 1.0, 0.5, 0.25} <= set(half_octaves(4, 0.25))


def test_taught_scales_have_norms_of_their_own_and_the_others_borrow_the_nearest():
    mine = network((2.0, 1.0, 0.7, 0.5, 0.25), taught=(1.0, 0.5))
    assert [mine.config.scales[view] for view in mine.taught] == [1.0, 0.5]
    assert mine.norm_of == [0, 0, 1, 1, 1]
    assert all(len(norm.scales) == 1 for norm in scale_norms(mine))


def test_the_view_at_scale_1_has_the_plain_names_whatever_is_larger():
    mine = network((2.0, 1.0, 0.5))
    assert mine.norm_of == [1, 0, 2]


@pytest.mark.parametrize("taught", [(0.5,), (1.0, 0.75), ()])
def test_a_taught_set_without_1_or_outside_the_scale_set_is_refused(taught):
    with pytest.raises(UsageError):
        ModelConfig(name="x", classes=2, block="basic", depths=(1, 1, 1, 1), width=8, scales=(1.0, 0.5), taught=taught)


@torch.inference_mode()
def test_looking_once_is_the_view_at_scale_1():
    mine = network((2.0, 1.0, 0.5))
    x = pictures()
    mine.look = "1"
    assert torch.equal(mine(x), mine.view_logits(x, mine.config.scales.index(1.0)))


@torch.inference_mode()
def test_the_surest_view_decides_and_training_sees_the_taught_ones_alone():
    mine = network((2.0, 1.0, 0.5), taught=(1.0,), surest=True)
    x = torch.cat([pictures(12, 4 << octave).repeat_interleave(16 >> octave, 2).repeat_interleave(16 >> octave, 3)
                   for octave in range(5)])  # fmt: skip
    fused, views = mine.forward_views(x)
    chosen = torch.stack([sureness(view) for view in views]).argmax(0)
    assert len(set(chosen.tolist())) > 1, "the pictures do not tell the views apart"
    expected = torch.stack(views)[chosen, torch.arange(len(chosen))]
    assert torch.allclose(fused, expected, atol=1e-6)
    assert len(mine.train().forward_views(pictures())[1]) == 1


@torch.inference_mode()
def test_looking_until_sure_ends_where_looking_at_all_does_and_begins_with_the_cheapest():
    mine = network((2.0, 1.0, 0.5), taught=(1.0,), surest=True)
    x = pictures()
    mine.sure = 1.1  # never
    logits, cost = mine.forward_until_sure(x)
    assert torch.allclose(logits, mine.forward_views(x)[0], atol=1e-5)
    assert torch.allclose(cost, torch.full((4,), 4 + 1 + 0.25))
    mine.sure = 1e-9  # always
    logits, cost = mine.forward_until_sure(x)
    assert torch.allclose(logits, mine.view_logits(make_view(x, 0.5), 2), atol=1e-6)
    assert torch.equal(cost, torch.full((4,), 0.25))


@torch.inference_mode()
def test_only_the_pictures_that_are_unsure_are_looked_at_again():
    mine = network((2.0, 1.0, 0.5), taught=(1.0,), surest=True)
    x = pictures()
    cheapest = sureness(mine.view_logits(make_view(x, 0.5), 2))
    mine.sure = float(cheapest.sort().values[2])  # two of four are sure enough
    cost = mine.forward_until_sure(x)[1]
    assert torch.equal(cost == 0.25, cheapest >= mine.sure)
    mine.look = "auto"
    assert torch.equal(mine(x), mine.forward_until_sure(x)[0])


@pytest.mark.parametrize("stem", ["imagenet", "small", "fine"])
def test_weights_keep_their_stem(tmp_path, stem):
    config = replace(config_for("mvcr10n", 2, stem=stem), width=8)
    made = Checkpoint(
        config=config, classes=("a", "b"), preprocess=Preprocess(size=64), tensors=build(config).state_dict()
    )
    made.save(tmp_path / "w.safetensors")
    assert Start.of_file("weights", tmp_path / "w.safetensors").stem == stem


def test_sureness_runs_from_uniform_to_certain():
    assert float(sureness(torch.zeros(7))) == pytest.approx(0, abs=1e-6)
    assert float(sureness(torch.tensor([50.0, 0, 0]))) == pytest.approx(1, abs=1e-6)


def test_the_surest_of_two_views_wins_alone():
    sure, unsure = torch.tensor([[0.0, 6.0]]), torch.tensor([[0.5, 0.0]])
    for beta in (0.0, 0.5, 1.0):  # it never learns there, and is 0 in a network that began from a plain trunk
        fusion = ConfidenceFusion(beta, surest=True)
        assert torch.equal(fusion([unsure, sure]), sure)
        assert torch.equal(fusion([sure, unsure]), sure)


def test_the_unsure_loss_is_zero_at_doubt_and_grows_with_conviction():
    assert float(unsure_loss(torch.zeros(3, 5))) == pytest.approx(0, abs=1e-6)
    losses = [float(unsure_loss(torch.tensor([[strength, 0.0, 0.0]]))) for strength in (0.5, 2.0, 8.0)]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_foreign_pictures_have_the_same_size_and_are_clearly_smaller_or_larger():
    """The period of stripes says by how much."""
    side, period = 192, 24
    stripes = torch.sin(torch.arange(side) * 2 * torch.pi / period).expand(30, 3, side, side)
    foreign = foreign_scales(stripes, random.Random(0))
    assert foreign.shape == stripes.shape
    spectra = torch.fft.rfft(foreign[:, 0, 0] - foreign[:, 0, 0].mean(1, keepdim=True), 8 * side).abs()
    factors = 8 * side / spectra.argmax(1) / period
    strengths = torch.where(factors > 1, factors, 1 / factors)
    assert float(strengths.min()) >= 1.3 and float(strengths.max()) <= 3.0
    assert 5 < int((factors > 1).sum()) < 25
    assert len(set(factors.tolist())) > 15  # each its own


def test_taught_and_foreign_pictures_share_the_statistics_of_the_batch_norms():
    """The network is only asked for verdicts on both together."""
    seen = []

    class Watched(MultiScaleResNet):
        def forward_views(self, x):
            seen.append(x.shape)
            return super().forward_views(x)

    network = Watched(config_for("mvcr10n", 4, scales=(1.0,), stem="small")).train()
    config = TrainConfig(data=Path(), unsure=0.5, batch=6, lr=1e-3)
    session = Session(
        config=config, network=network, average=WeightAverage(network, 0.9), preprocess=Preprocess(size=32),
        optimiser=make_optimiser(network, 1e-3, 0.05, set()), device=torch.device("cpu"), dtype=torch.float32,
        weights=None, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    images = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    for step, progress in enumerate((0.2, 0.5)):  # a young network is not taught to doubt
        session.step(Batch(images, torch.arange(6) % 4, ("",) * 6), step, progress)
    assert seen == [(6, 3, 32, 32), (9, 3, 32, 32)]


def test_resolution_jitter_takes_detail_and_leaves_size_and_place():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = augment(noise, 64, "pad", STILL, random.Random(0), (0, 0, 0))
    jittered = [
        augment(noise, 64, "pad", replace(STILL, resolution=1.0), random.Random(seed), (0, 0, 0)) for seed in range(20)
    ]
    rough = [float(np.abs(np.diff(picture.astype(float), axis=1)).mean()) for picture in jittered]
    assert all(picture.shape == plain.shape for picture in jittered)
    assert min(rough) < 0.2 * float(np.abs(np.diff(plain.astype(float), axis=1)).mean())
    assert len(set(rough)) > 10
    edge = Image.fromarray(np.repeat(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None], 64, 0))
    for seed in range(10):
        row = augment(edge, 64, "pad", replace(STILL, resolution=1.0), random.Random(seed), (0, 0, 0))[32, :, 0]
        assert row[:28].max() == 0 or row[24:40].tolist() == sorted(row[24:40].tolist())
        assert abs(int(np.searchsorted(row, 128)) - 32) <= 2


def test_a_network_is_asked_to_be_as_sure_as_its_labels_are_and_no_surer():
    assert taught_sureness(2, 0.0) == pytest.approx(1)
    for classes, smoothing in ((2, 0.1), (36, 0.1), (1000, 0.3)):
        reached = taught_sureness(classes, smoothing)
        verdict = torch.full((classes,), smoothing / classes)
        verdict[0] += 1 - smoothing
        assert 0 < reached < 1
        assert float(sureness(verdict.log())) == pytest.approx(reached)
    assert ModelConfig.sure > taught_sureness(2, 0.1)  # so that without this, "auto" would never stop early

"""Label maps in a step: MixUp, CutMix and MixToken do the same to pixels and to token targets.

Every image has a brightness of its own and a teacher that is sure of a class of its own; so what is left of an image
under a token can be read off the pixels, and has to be what is left of its class in the token's target.
"""

from dataclasses import replace

import pytest
import torch

from volo.build import make_network
from volo.config import Config
from volo.data.dataset import Batch
from volo.data.mixing import draw_mix_token_box
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Inputs, Learner
from volo.runtime.distributed import World
from volo.runtime.rng import generator
from volo.token_labels.aligned import AlignedMaps
from volo.token_labels.published import PublishedMaps

NUM_CLASSES, SIDE, GRID = 8, 32, 4
BRIGHTNESS = torch.tensor([10, 250, 60, 180, 110, 215], dtype=torch.uint8)  # of image 0, 1, ...
WAYS = {
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 1.0, "prob": 0.8},
}


def labelled(count: int, geometry: str = "aligned") -> Batch:
    """Images of one brightness each; in geometries where a token can lie outside, token 5 of image 0 does."""
    valid = torch.ones(count, GRID * GRID, dtype=torch.bool)
    valid[0, 5] = geometry != "aligned"
    boxes = torch.tensor([[-0.5, -0.5, 0.5, 0.5]]).expand(count, 4)  # all of the map's one cell
    return Batch(
        images=BRIGHTNESS[:count, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous(),
        labels=torch.arange(count),
        erase_boxes=torch.zeros(count, 4, dtype=torch.int64),
        noise_seeds=torch.zeros(count, dtype=torch.int64),
        indices=torch.arange(count),
        notes=torch.zeros(count, dtype=torch.int64),
        failures=[],
        sidecar=PublishedMaps(torch.full((count, 1, 1, 1), 40.0), torch.arange(count)[:, None, None, None], boxes)
        if geometry == "published"
        else AlignedMaps(
            scores=torch.full((count, 1, 1), 40.0),
            classes=torch.arange(count)[:, None, None],
            cells=torch.zeros(count, GRID * GRID, 1, dtype=torch.int64),
            weights=torch.ones(count, GRID * GRID, 1),
            class_weights=torch.ones(count, 1),
            valid=valid,
        ),
    )


@pytest.fixture
def make_learner(tiny_config):
    def make(geometry: str = "aligned", mix: dict | None = None, **sections) -> Learner:
        config: Config = tiny_config(
            model={"num_classes": NUM_CLASSES},
            augment={"mean": [0.0] * 3, "std": [1.0] * 3, "order": "published"},
            loss={"smoothing": 0.0},
            token_label={"root": "labels", "geometry": geometry},
            mix={"mix_token": False} | (mix or {}),
            **sections,
        )
        learner = Learner(
            config,
            World(0, 1, 0, torch.device("cpu")),
            BatchLayout.of(config, 1),
            make_network(config, World(0, 1, 0, torch.device("cpu"))),
        )
        assert learner.grid == (GRID, GRID)
        return learner

    return make


def own_shares(inputs: Inputs, count: int) -> torch.Tensor:
    """Share of its own image in the pixels under each token, [B, N], by their mean brightness."""
    cell = SIDE // GRID
    seen = inputs.images[:, 0].reshape(count, GRID, cell, GRID, cell).mean((2, 4)).flatten(1) * 255
    own = BRIGHTNESS[:count, None].float()
    return (seen - own.flip(0)) / (own - own.flip(0))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("geometry", ["aligned", "published"])
def test_targets_say_what_the_pixels_show(make_learner, way, mode, geometry):
    learner = make_learner(geometry, WAYS[way] | {"mode": mode})
    partial = 0
    for step in range(12):
        count = (2, 4, 6)[step % 3]
        batch = labelled(count, geometry)
        inputs = learner.inputs(batch, 0, step, 0)
        shares = own_shares(inputs, count)  # [B, N]
        whole = shares.mean(1)  # [B]
        partial += int(((shares > 0.01) & (shares < 0.99)).sum())

        expected = shares if geometry == "aligned" else whole[:, None].expand_as(shares)
        valid = torch.ones(count, GRID * GRID) if geometry == "published" else batch.sidecar.valid.float()
        mine, theirs = expected * valid, (1 - expected) * valid.flip(0)
        images = torch.arange(count)
        dense = inputs.targets.to_dense()  # [B, C, 2 + N]
        for column in (0, 1):  # the image's own label, and the teacher's view of the crop
            torch.testing.assert_close(dense[images, images, column], whole, atol=1e-5, rtol=0)
            torch.testing.assert_close(dense[images, images.flip(0), column], 1 - whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(dense[images, images, 2:], mine, atol=1e-5, rtol=0)
        torch.testing.assert_close(dense[images, images.flip(0), 2:], theirs, atol=1e-5, rtol=0)
        if geometry != "published":
            torch.testing.assert_close(inputs.targets.mass, mine + theirs, atol=1e-5, rtol=0)
    assert partial > 20, "tokens that show two images are what this is about"


@pytest.mark.parametrize("way", WAYS)
def test_mixing_of_labels_ends_with_that_of_images(make_learner, way):
    learner = make_learner(mix=WAYS[way] | {"prob": 1.0, "off_epoch": 2})
    plain = make_learner().inputs(labelled(4), 0, 0, 0)
    for epoch, is_mixed in ((0, True), (1, True), (2, False), (3, False)):
        inputs = learner.inputs(labelled(4), epoch, 0, 0)
        assert torch.equal(inputs.images, plain.images) != is_mixed
        assert torch.equal(inputs.targets.to_dense(), plain.targets.to_dense()) != is_mixed


@pytest.mark.parametrize("count", [1, 3, 5])
def test_mix_token_takes_any_batch_and_leaves_targets_alone(make_learner, count):
    """The network mixes its tokens and returns them un-mixed; only the loss mixes, for the class token."""
    learner = make_learner(mix={"mix_token": True})
    plain = make_learner().inputs(labelled(count), 0, 0, 0).targets.to_dense()
    for step in range(8):
        inputs = learner.inputs(labelled(count), 0, step, 0)
        box = draw_mix_token_box(generator(learner.config.train.seed, "mix", 0, step, 0), (GRID, GRID))
        assert inputs.mix_box.tolist() == list(box)
        assert torch.equal(inputs.targets.to_dense(), plain)
        terms = learner.forward_backward(labelled(count), 0, step, 0)
        assert torch.isfinite(terms.total) and terms.dense > 0


@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_batch_has_no_pairs(make_learner, count):
    with pytest.raises(ValueError, match=rf"mix.mixup and mix.cutmix.* \({count}\)"):
        make_learner(mix={"mixup": 1.0}).inputs(labelled(count), 0, 0, 0)


def test_a_chunk_is_mixed_the_same_on_any_process(make_learner):
    """Pass 1 of one process is pass 0 of the second of two processes."""
    learner = make_learner(mix=WAYS["both"] | {"mode": "elem", "mix_token": True})
    here = [learner.inputs(labelled(4), 1, step, micro=1) for step in range(4)]
    first = [learner.inputs(labelled(4), 1, step, micro=0) for step in range(4)]
    learner.world = replace(learner.world, size=2, rank=1)
    there = [learner.inputs(labelled(4), 1, step, micro=0) for step in range(4)]
    for a, b, c in zip(here, there, first, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.mix_box, b.mix_box)
        assert torch.equal(a.targets.to_dense(), b.targets.to_dense())
        assert not torch.equal(a.images, c.images)

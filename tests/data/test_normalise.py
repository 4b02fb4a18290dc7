"""Normalisation against torchvision and timm; the noise of random erasing."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from volo.config import AugmentConfig
from volo.data.dataset import Batch, Sample, collate
from volo.data.normalise import normalise_and_erase

MEAN, STD = AugmentConfig().mean, AugmentConfig().std


def make_batch(boxes: list[tuple], height: int = 20, width: int = 26, seeds: list[int] | None = None) -> Batch:
    rng = np.random.default_rng(0)
    return collate(
        [
            Sample(i, rng.integers(0, 256, (3, height, width), np.uint8), i, box, seeds[i] if seeds else 100 + i)
            for i, box in enumerate(boxes)
        ]
    )


NONE = (0, 0, 0, 0)


def test_normalisation_is_torchvisions_and_timms():
    batch = make_batch([NONE] * 3)
    batch.images[0, :, 0] = 0
    batch.images[0, :, 1] = 255
    images, labels = normalise_and_erase(batch, "cpu", MEAN, STD)
    assert images.dtype == torch.float32 and labels.tolist() == [0, 1, 2]
    expected = F.normalize(batch.images.double() / 255, MEAN, STD)
    torch.testing.assert_close(images.double(), expected, atol=1e-6, rtol=0)
    # As in timm's PrefetchLoader.
    mean, std = (torch.tensor([v * 255 for v in values]).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(images, batch.images.float().sub(mean).div(std), atol=1e-6, rtol=0)


def test_erased_boxes_have_the_noise_of_their_sample():
    boxes = [NONE, (3, 4, 15, 20), (0, 0, 19, 25), (7, 7, 8, 8), NONE]
    batch = make_batch(boxes)
    plain, _ = normalise_and_erase(make_batch([NONE] * 5), "cpu", MEAN, STD)
    images, _ = normalise_and_erase(batch, "cpu", MEAN, STD)
    again, _ = normalise_and_erase(batch, "cpu", MEAN, STD)
    assert torch.equal(images, again)
    for image, before, (top, left, bottom, right), seed in zip(
        images, plain, boxes, batch.noise_seeds.tolist(), strict=True
    ):
        inside = torch.zeros(20, 26, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(image[:, ~inside], before[:, ~inside])
        noise = torch.randn(3, bottom - top, right - left, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(image[:, top:bottom, left:right], noise)

    # The noise does not depend on the sample's position in the batch.
    alone = make_batch([boxes[1]], seeds=[101])
    torch.testing.assert_close(
        normalise_and_erase(alone, "cpu", MEAN, STD)[0][0, :, 3:15, 4:20], images[1, :, 3:15, 4:20], rtol=0, atol=0
    )


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone():
    batch = make_batch([(1, 1, 99, 119)] * 8, height=100, width=120)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    noise = normalise_and_erase(batch, "cpu", MEAN, STD)[0][:, :, 1:99, 1:119]
    assert torch.equal(state, torch.get_rng_state())
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(noise.flatten(1)) - torch.eye(8)).max() < 0.03


def test_memory_format_and_dtype():
    batch = make_batch([NONE, (2, 2, 9, 9)])
    plain, _ = normalise_and_erase(batch, "cpu", MEAN, STD)
    images, _ = normalise_and_erase(batch, "cpu", MEAN, STD, channels_last=True)
    assert images.is_contiguous(memory_format=torch.channels_last) and torch.equal(images, plain)
    half, _ = normalise_and_erase(batch, "cpu", MEAN, STD, dtype=torch.bfloat16)
    assert torch.equal(half, plain.bfloat16())


def test_the_batch_is_not_changed():
    batch = make_batch([(2, 2, 9, 9)])
    before = batch.images.clone()
    normalise_and_erase(batch, "cpu", MEAN, STD)
    assert torch.equal(batch.images, before)


def test_an_empty_batch_stays_empty():
    batch = collate([Sample(0, None, 0, failures=("cannot read x",))])
    images, labels = normalise_and_erase(batch, "cpu", MEAN, STD)
    assert len(images) == len(labels) == len(batch) == 0 and batch.failures == ["cannot read x"]
    assert batch.note_counts() == {}


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_on_every_available_device(device, channels_last):
    """The same pixels, reproducible noise, and (on CUDA) no waiting for the device."""
    batch = make_batch([NONE, (2, 3, 9, 11)])
    expected, _ = normalise_and_erase(batch, "cpu", MEAN, STD)
    if device == "cuda":
        batch = batch.pin_memory()
        assert batch.images.is_pinned() and batch.labels.is_pinned()
    images, labels = normalise_and_erase(batch, device, MEAN, STD, channels_last=channels_last)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        again, _ = normalise_and_erase(batch, device, MEAN, STD, channels_last=channels_last)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert images.device.type == device and labels.tolist() == [0, 1] and torch.equal(images, again)
    torch.testing.assert_close(images[0].cpu(), expected[0], atol=1e-6, rtol=0)
    inside = torch.zeros(20, 26, dtype=torch.bool)
    inside[2:9, 3:11] = True
    torch.testing.assert_close(images[1].cpu()[:, ~inside], expected[1][:, ~inside], atol=1e-6, rtol=0)
    assert (images[1].cpu()[:, inside] - expected[1][:, inside]).std() < 2

"""Training plans step by step, and the evaluation transform against timm's."""

import math

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from volo.config import AugmentConfig
from volo.data.pixels.crop import ResizedCrop, Shift
from volo.data.pixels.decode import from_image
from volo.data.pixels.plan import Plan
from volo.data.pixels.rand_augment import Op
from volo.data.pixels.transforms import EvalTransform, TrainTransform

BICUBIC = Image.Resampling.BICUBIC
SIZES = [(32, 32), (500, 375), (375, 500), (64, 300), (33, 32), (1, 9), (231, 233), (1, 1)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.96, 1.0, 1.15])
@pytest.mark.parametrize("image_hw", [(32, 32), (224, 224), (48, 80), (80, 48)])
def test_evaluation_has_timms_pixels(make_picture, image_hw, crop_pct, interpolation):
    reference = create_transform((3, *image_hw), interpolation=interpolation, crop_pct=crop_pct, use_prefetcher=True)
    transform = EvalTransform(image_hw, crop_pct, interpolation)
    for width, height in SIZES:
        image = make_picture(width, width, height)
        ours = transform(image)
        assert ours.dtype == np.uint8 and ours.shape == (3, *image_hw) and ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, reference(image).numpy())


def test_crop_pct_above_one_pads_with_black():
    """floor(448 / 1.15) = 389, so 59 rows and columns are black."""
    pixels = EvalTransform((448, 448), 1.15, "bicubic")(Image.new("RGB", (600, 600), (9, 9, 9)))
    black = (pixels == 0).all(0)
    assert black.all(0).sum() == black.all(1).sum() == 59
    assert (pixels[:, ~black] == 9).all()


@pytest.mark.parametrize("crop", ["random_resized", "shift"])
@pytest.mark.parametrize("order", ["timm", "published"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 30), (300, 20)])
def test_every_drawn_plan_can_be_applied(make_picture, order, crop, size):
    config = AugmentConfig(order=order, crop=crop, vflip=0.5, rand_augment="rand-m9-mstd0.5-inc1-n3-p0.9")
    transform = TrainTransform(config, (16, 24))
    image = make_picture(0, *size)
    for seed in range(60):
        plan = transform.draw(np.random.default_rng(seed), *size)
        assert plan == transform.draw(np.random.default_rng(seed), *size)
        pixels = transform.apply(from_image(image), plan)
        assert pixels.shape == (3, 16, 24) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, transform.apply(from_image(image), plan))


def test_the_order_of_the_steps_of_a_plan(make_picture):
    """Against the same steps by hand, on arrays and with Pillow; the plan is asymmetric."""
    image = make_picture(0, 40, 30)
    crop = ResizedCrop(2, 3, 20, 25, BICUBIC)
    transform = TrainTransform(AugmentConfig(), (16, 24))

    def cropped(image):
        return image.crop((3, 2, 28, 22)).resize((24, 16), BICUBIC)

    def inverted_and_mirrored(image):
        return Image.fromarray(255 - np.asarray(image)[:, ::-1])

    ops = (Op("Invert"),)
    timm_order = transform.apply(from_image(image), Plan("timm", crop, hflip=True, ops=ops))
    np.testing.assert_array_equal(timm_order, np.asarray(inverted_and_mirrored(cropped(image))).transpose(2, 0, 1))
    published = transform.apply(from_image(image), Plan("published", crop, hflip=True, ops=ops))
    np.testing.assert_array_equal(published, np.asarray(cropped(inverted_and_mirrored(image))).transpose(2, 0, 1))
    assert (timm_order != published).any()
    upside_down = transform.apply(from_image(image), Plan("timm", crop, vflip=True))
    np.testing.assert_array_equal(upside_down, np.asarray(cropped(image))[::-1].transpose(2, 0, 1))


def test_operations_come_after_flips_and_in_order(make_picture):
    image = make_picture(0, 16, 16)
    transform = TrainTransform(AugmentConfig(crop="shift"), (16, 16))
    ops = (Op("ShearX", (0.3,), BICUBIC), Op("Rotate", (20.0,), BICUBIC))
    plan = Plan("timm", Shift(0, 0), hflip=True, ops=ops)
    step = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op in ops:
        step = op.apply(step, (124, 116, 104))
    np.testing.assert_array_equal(transform.apply(from_image(image), plan), np.asarray(step).transpose(2, 0, 1))


def test_probabilities_of_flips_and_erasing():
    transform = TrainTransform(AugmentConfig(hflip=0.5, vflip=0.1, rand_augment="none"), (32, 32))
    plans = [transform.draw(np.random.default_rng(seed), 40, 30) for seed in range(3000)]
    for share, of in ((0.5, lambda p: p.hflip), (0.1, lambda p: p.vflip), (0.25, lambda p: p.erase[2] > 0)):
        assert abs(np.mean([of(plan) for plan in plans]) - share) < 4 * math.sqrt(share * (1 - share) / 3000)
    assert all(plan.ops == () for plan in plans)


def test_certain_and_impossible_flips():
    transform = TrainTransform(AugmentConfig(hflip=1.0, vflip=0.0, erase_prob=0.0), (8, 8))
    plans = [transform.draw(np.random.default_rng(seed), 9, 9) for seed in range(200)]
    assert all(plan.hflip and not plan.vflip and not any(plan.erase) for plan in plans)


def test_interpolation_choice_reaches_crop_and_operations():
    for choice, expected in (("bicubic", {BICUBIC}), ("random", {BICUBIC, Image.Resampling.BILINEAR})):
        transform = TrainTransform(AugmentConfig(interpolation=choice), (8, 8))
        plans = [transform.draw(np.random.default_rng(seed), 30, 30) for seed in range(300)]
        assert {plan.crop.resample for plan in plans} == expected
        assert {op.resample for plan in plans for op in plan.ops} - {None} == expected


def test_the_fill_colour_is_the_mean_rounded_as_in_timm():
    assert TrainTransform(AugmentConfig(), (8, 8)).fill == (124, 116, 104)
    assert TrainTransform(AugmentConfig(mean=[0.5, 0.0, 1.0]), (8, 8)).fill == (128, 0, 255)


def test_a_wrong_policy_is_refused_before_any_image():
    with pytest.raises(ValueError, match="augment.rand_augment"):
        TrainTransform(AugmentConfig(rand_augment="rand-m9-inc3"), (8, 8))

"""render.cpp against Pillow: operations, plans and evaluation give the same bytes.

render.cpp computes with integers, and with floats in Pillow's order of operations. So the bytes are equal if Pillow was
compiled without fused multiply-adds, as it is on x86-64. Elsewhere one grey level may differ in a few pixels.
"""

import dataclasses
import platform

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from volo.config import AugmentConfig
from volo.data.pixels import jpeg_region
from volo.data.pixels import render as pixels
from volo.data.pixels.backend import Backend
from volo.data.pixels.crop import ResizedCrop, Shift
from volo.data.pixels.decode import from_image
from volo.data.pixels.plan import Plan
from volo.data.pixels.rand_augment import _ARGUMENT, _GEOMETRIC, Op
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.runtime import native as compiled

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
PHOTOGRAPHS = [Image.fromarray(array) for array in load_sample_images().images]  # 640 x 427
HALVES = [image.crop((160, 100, 480, 313)) for image in PHOTOGRAPHS]
SMALL = [image.crop((200, 100, 333, 197)) for image in PHOTOGRAPHS]
EXACT = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(autouse=True, scope="module")
def built():
    assert pixels.unavailable_reason() is None


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    if EXACT:
        assert not difference.any(), (difference.max(), (difference > 0).mean())
    assert difference.mean() < 0.01


def both(config: AugmentConfig, image_hw: tuple[int, int]) -> tuple[TrainTransform, TrainTransform]:
    return tuple(TrainTransform(dataclasses.replace(config, backend=b), image_hw) for b in ("native", "pillow"))


def rendered(transform: TrainTransform | EvalTransform, image: Image.Image, plan: Plan) -> np.ndarray:
    """Return what ``plan`` makes of an image, with noise outside the box that is needed."""
    box = transform.box_needed(plan, (image.height, image.width))
    pixels = from_image(image)
    if box is not None:
        left, top, right, bottom = box
        kept = pixels[top:bottom, left:right].copy()
        assert kept.size, box
        pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
        pixels[top:bottom, left:right] = kept
    return transform.apply(pixels, plan)


# ---- operations and plans


@pytest.mark.parametrize("order", ["timm", "published"])
@pytest.mark.parametrize("name", sorted(_ARGUMENT))
def test_every_operation_is_pillows(name, order):
    """On photographs, for several magnitudes, both signs, both resamplings and both orders."""
    native, exact = both(AugmentConfig(), (56, 56))
    for number, level in enumerate((0.0, 0.31, 0.9, 1.0)):
        for sign in (1, -1):
            args = (_ARGUMENT[name](level, sign),) if _ARGUMENT[name] else ()
            op = Op(name, args, (BILINEAR, BICUBIC)[number % 2] if name in _GEOMETRIC else None)
            for image in HALVES:
                crop = ResizedCrop(17, 31, 161, 203, BILINEAR)
                plan = Plan(order, crop, hflip=sign > 0, vflip=number == 2, ops=(op,))
                assert_same(rendered(native, image, plan), rendered(exact, image, plan))


@given(
    seed=st.integers(0, 2**32),
    order=st.sampled_from(["timm", "published"]),
    crop=st.sampled_from(["random_resized", "shift"]),
    size=st.tuples(st.integers(1, 133), st.integers(1, 97)),
    out=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
@example(seed=0, order="timm", crop="random_resized", size=(1, 1), out=(1, 1))
@example(seed=1, order="published", crop="random_resized", size=(2, 97), out=(60, 3))
@settings(max_examples=300, deadline=None)
def test_drawn_plans_are_pillows_at_any_size(seed, order, crop, size, out):
    """Small images, tiny outputs and three operations each meet every edge case."""
    config = AugmentConfig(order=order, crop=crop, vflip=0.5, rand_augment="rand-m9-mstd3-n3-p0.8-inc1")
    native, exact = both(config, out)
    image = SMALL[seed % 2].crop((0, 0, *size))
    plan = native.draw(np.random.default_rng(seed), *size)
    assert_same(rendered(native, image, plan), rendered(exact, image, plan))


@pytest.mark.parametrize("order", ["timm", "published"])
def test_plans_of_the_published_recipe_are_pillows_on_photographs(order):
    native, exact = both(AugmentConfig(order=order), (224, 224))
    for seed in range(24):
        image = PHOTOGRAPHS[seed % 2]
        plan = native.draw(np.random.default_rng(seed), *image.size)
        assert_same(rendered(native, image, plan), rendered(exact, image, plan))


def test_geometric_operations_move_pixels_as_their_matrix_says():
    """Colours encode coordinates, and are within half a pixel of the point that the matrix gives, or are the fill."""
    height, width = 200, 240
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 255)], -1).astype(np.uint8))
    native = TrainTransform(AugmentConfig(backend="native"), (height, width))
    for name, value in (("ShearX", 0.27), ("ShearY", -0.2), ("TranslateXRel", 0.4), ("Rotate", 27.0)):
        op = Op(name, (value,), BILINEAR)
        a, b, c, d, e, f = pixels._affine(op, height, width)
        plan = Plan("published", ResizedCrop(0, 0, height, width, BILINEAR), ops=(op,))
        out = native.apply(from_image(image), plan)
        seen = out[2] == 255
        from_x, from_y = a * (x + 0.5) + b * (y + 0.5) + c - 0.5, d * (x + 0.5) + e * (y + 0.5) + f - 0.5
        inside = (from_x > 0) & (from_x < width - 1) & (from_y > 0) & (from_y < height - 1)
        assert (seen[inside]).all() and 0.3 < inside.mean() < 1
        for found, expected in ((out[0], from_x), (out[1], from_y)):  # Pillow truncates
            assert np.abs(found + 0.5 - expected)[inside].max() <= 0.5 + 1e-9
        assert (out[:, ~seen].T == (124, 116, 104)).all()


# ---- evaluation


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_pct", "image_hw"), [(0.96, (224, 224)), (1.15, (112, 112)), (0.875, (48, 80))])
def test_evaluation_is_pillows(interpolation, crop_pct, image_hw):
    native, exact = (EvalTransform(image_hw, crop_pct, interpolation, backend) for backend in ("native", "pillow"))
    for image in (*PHOTOGRAPHS, *(image.transpose(Image.Transpose.ROTATE_90) for image in PHOTOGRAPHS), *SMALL):
        plan = native.plan(*image.size)
        np.testing.assert_array_equal(rendered(native, image, plan), rendered(exact, image, plan))


@given(
    size=st.tuples(st.integers(1, 130), st.integers(1, 97)), resized=st.tuples(st.integers(1, 90), st.integers(1, 90))
)
@settings(max_examples=80, deadline=None)
def test_resize_is_pillows_with_either_pass_first(size, resized):
    for image, resample in zip(SMALL, (BILINEAR, BICUBIC), strict=True):
        image = image.crop((0, 0, *size))
        whole = Plan("timm", ResizedCrop(0, 0, image.height, image.width, resample))
        ours = rendered(TrainTransform(AugmentConfig(backend="native"), resized), image, whole)
        np.testing.assert_array_equal(ours, np.asarray(image.resize(resized[::-1], resample)).transpose(2, 0, 1))


# ---- the choice of backend


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """Hide the built library and the compiler."""
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        patch.setenv("CXX", "/nonexistent")
        pixels._library.forget()
        yield
    pixels._library.forget()


def test_without_a_compiler_auto_takes_pillow_and_native_is_refused(no_compiler, make_picture):
    backend = Backend("auto")
    assert not backend.native
    assert str(backend).startswith("Pillow (") and "/nonexistent" in str(backend) and "CXX" in str(backend)
    with pytest.raises(ValueError, match="augment.backend is 'native'.*/nonexistent.*auto or pillow"):
        TrainTransform(AugmentConfig(backend="native"), (8, 8))
    transform = TrainTransform(AugmentConfig(), (8, 8))
    plan = transform.draw(np.random.default_rng(0), 20, 16)
    assert transform.apply(from_image(make_picture(0)), plan).shape == (3, 8, 8)


def test_the_backend_names_itself(monkeypatch):
    monkeypatch.setattr(jpeg_region, "unavailable_reason", lambda: None)
    assert str(Backend("auto")) == str(Backend("native")) == "native"
    monkeypatch.setattr(jpeg_region, "unavailable_reason", lambda: "no header")
    assert str(Backend("auto")).startswith("native (") and "no header" in str(Backend("auto"))
    assert str(Backend("pillow")) == "Pillow (chosen by augment.backend)"


def test_shift_is_pillows(make_picture):
    native, exact = both(AugmentConfig(crop="shift"), (32, 32))
    for size in ((32, 32), (40, 31)):
        for top_, left in ((-4, 3), (0, 0), (40, 0), (2, -33)):
            plan = Plan("timm", Shift(top_, left), hflip=True, ops=(Op("Rotate", (9.0,), BICUBIC),))
            image = make_picture(1, *size)
            assert_same(rendered(native, image, plan), rendered(exact, image, plan))


def test_no_fused_multiply_adds():
    """With them the bytes would depend on the processor."""
    assert "-ffp-contract=off" in pixels._FLAGS and "-ffast-math" not in (*pixels._FLAGS, *compiled._FLAGS)

"""Native pixels are Pillow's: plans, operations, evaluation and decoding, to the last bit, on photographs.

Every number of pixels.cpp is an integer, or a float in Pillow's own order, so there is nothing to tolerate where Pillow
was compiled without fused multiply-adds, as it is on x86-64. Elsewhere one grey level may differ in a few pixels.
"""

import contextlib
import dataclasses
import io
import math
import platform

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from volo import compiled
from volo.config import AugmentConfig
from volo.data import pixels
from volo.data.augment import Backend, EvalTransform, Plan, TrainTransform
from volo.data.crop import ResizedCrop, Shift
from volo.data.decode import Note, UnreadableImage, read_image, read_pixels
from volo.data.jpeg import plain_frame, top
from volo.data.pixels import Pixels
from volo.data.rand_augment import _ARGUMENT, _GEOMETRIC, Op

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
PHOTOGRAPHS = [Image.fromarray(array) for array in load_sample_images().images]  # 640 x 427
HALVES = [image.crop((160, 100, 480, 313)) for image in PHOTOGRAPHS]
SMALL = [image.crop((200, 100, 333, 197)) for image in PHOTOGRAPHS]
EXACT = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(autouse=True, scope="module")
def built():
    assert pixels.why_not() is None


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    if EXACT:
        assert not difference.any(), (difference.max(), (difference > 0).mean())
    assert difference.mean() < 0.01


def both(config: AugmentConfig, image_hw: tuple[int, int]) -> tuple[TrainTransform, TrainTransform]:
    return tuple(TrainTransform(dataclasses.replace(config, backend=b), image_hw) for b in ("native", "pillow"))


# ---- operations and plans


@pytest.mark.parametrize("order", ["timm", "reference"])
@pytest.mark.parametrize("name", sorted(_ARGUMENT))
def test_every_operation_is_pillows(name, order):
    """On photographs, at magnitudes 0 ... 10, of both signs and resamplings, on both canvases."""
    native, exact = both(AugmentConfig(), (56, 56))
    for number, level in enumerate((0.0, 0.31, 0.9, 1.0)):
        for sign in (1, -1):
            args = (_ARGUMENT[name](level, sign),) if _ARGUMENT[name] else ()
            op = Op(name, args, (BILINEAR, BICUBIC)[number % 2] if name in _GEOMETRIC else None)
            for image in HALVES:
                crop = ResizedCrop(17, 31, 161, 203, BILINEAR)
                plan = Plan(order, crop, hflip=sign > 0, vflip=number == 2, ops=(op,))
                assert_same(native.apply(image, plan), exact.apply(image, plan))


@given(
    seed=st.integers(0, 2**32),
    order=st.sampled_from(["timm", "reference"]),
    crop=st.sampled_from(["random_resized", "shift"]),
    size=st.tuples(st.integers(1, 133), st.integers(1, 97)),
    out=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
@example(seed=0, order="timm", crop="random_resized", size=(1, 1), out=(1, 1))
@example(seed=1, order="reference", crop="random_resized", size=(2, 97), out=(60, 3))
@settings(max_examples=300, deadline=None)
def test_drawn_plans_are_pillows_at_any_size(seed, order, crop, size, out):
    """Small images and tiny outputs, three operations each: every edge of every canvas is met."""
    config = AugmentConfig(order=order, crop=crop, vflip=0.5, rand_augment="rand-m9-mstd3-n3-p0.8-inc1")
    native, exact = both(config, out)
    image = SMALL[seed % 2].crop((0, 0, *size))
    plan = native.draw(np.random.default_rng(seed), *size)
    assert_same(native.apply(image, plan), exact.apply(image, plan))


@pytest.mark.parametrize("order", ["timm", "reference"])
def test_plans_of_the_published_recipe_are_pillows_on_photographs(order):
    native, exact = both(AugmentConfig(order=order), (224, 224))
    for seed in range(24):
        image = PHOTOGRAPHS[seed % 2]
        plan = native.draw(np.random.default_rng(seed), *image.size)
        assert_same(native.apply(image, plan), exact.apply(image, plan))


def test_geometric_operations_take_pixels_from_where_they_say():
    """Colours tell their place: what arrives is within half a pixel of where Pillow's matrix points, or fill."""
    height, width = 200, 240
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 255)], -1).astype(np.uint8))
    native = TrainTransform(AugmentConfig(backend="native"), (height, width))
    for name, value in (("ShearX", 0.27), ("ShearY", -0.2), ("TranslateXRel", 0.4), ("Rotate", 27.0)):
        op = Op(name, (value,), BILINEAR)
        a, b, c, d, e, f = pixels._affine(op, height, width)
        out = native.apply(image, Plan("reference", ResizedCrop(0, 0, height, width, BILINEAR), ops=(op,)))
        seen = out[2] == 255
        from_x, from_y = a * (x + 0.5) + b * (y + 0.5) + c - 0.5, d * (x + 0.5) + e * (y + 0.5) + f - 0.5
        inside = (from_x > 0) & (from_x < width - 1) & (from_y > 0) & (from_y < height - 1)
        assert (seen[inside]).all() and 0.3 < inside.mean() < 1
        for seen_at, place in ((out[0], from_x), (out[1], from_y)):  # Pillow cuts off what is behind the point
            assert np.abs(seen_at + 0.5 - place)[inside].max() <= 0.5 + 1e-9
        assert (out[:, ~seen].T == (124, 116, 104)).all()


# ---- evaluation


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_pct", "image_hw"), [(0.96, (224, 224)), (1.15, (112, 112)), (0.875, (48, 80))])
def test_evaluation_is_pillows(interpolation, crop_pct, image_hw):
    native, exact = (EvalTransform(image_hw, crop_pct, interpolation, backend) for backend in ("native", "pillow"))
    for image in (*PHOTOGRAPHS, *(image.transpose(Image.Transpose.ROTATE_90) for image in PHOTOGRAPHS), *SMALL):
        np.testing.assert_array_equal(native(image), exact(image))


@given(
    size=st.tuples(st.integers(1, 130), st.integers(1, 97)), resized=st.tuples(st.integers(1, 90), st.integers(1, 90))
)
@settings(max_examples=200, deadline=None)
def test_resize_is_pillows_whichever_pass_comes_first(size, resized):
    for image, resample in zip(SMALL, (BILINEAR, BICUBIC), strict=True):
        image = image.crop((0, 0, *size))
        ours = Pixels.of(image).resized(resized, (0, 0), resized, resample)
        np.testing.assert_array_equal(ours, np.asarray(image.resize(resized[::-1], resample)).transpose(2, 0, 1))


# ---- decoding


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2, "quality": 95},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "RGB": {"keep_rgb": True},
    "comment": {"comment": b"\xff\xd8 a comment"},
    "tags": {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoded_rows_are_pillows(kind, mode):
    options = dict(KINDS[kind])
    if mode == "L":
        options.pop("keep_rgb", None), options.pop("subsampling", None)
    image = PHOTOGRAPHS[0].crop((0, 0, 331, 203)).convert(mode)
    data = encoded(image, **options)
    exact, notes = read_image(data, "a.jpg")
    shorter = []
    for rows in (1, 7, 8, 9, 16, 17, 100, 160, 178, 186, 187, 195, 202, 203):
        ours, ours_notes = read_pixels(data, "a.jpg")
        assert (ours.height, ours.width, ours_notes) == (203, 331, notes)
        np.testing.assert_array_equal(ours._decode(rows)[:rows, :, :3], np.asarray(exact)[:rows])
        shorter.append(top(data, plain_frame(data), rows) is not None)
    assert shorter[0] == (kind != "progressive") and not shorter[-1]


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_tags_count_in_plain_jpegs_too(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(SMALL[0], exif=exif)
    for choice in ("ignore", "apply"):
        exact, notes = read_image(data, "a.png", choice)
        ours, ours_notes = read_pixels(data, "a.png", choice)
        assert ours_notes == notes and Note.OTHER_FORMAT in notes
        np.testing.assert_array_equal(ours._decode(ours.height)[..., :3], np.asarray(exact))


def kinds_for_pillow() -> dict[str, bytes]:
    cmyk, png, several = io.BytesIO(), io.BytesIO(), io.BytesIO()
    SMALL[0].convert("CMYK").save(cmyk, "JPEG")
    SMALL[0].convert("P").save(png, "PNG")
    SMALL[0].save(several, "MPO", save_all=True, append_images=[SMALL[1]])
    return {
        "cmyk": cmyk.getvalue(),
        "png": png.getvalue(),
        "mpo": several.getvalue(),
        "tail": encoded(SMALL[0]) + b"\0",
    }


@pytest.mark.parametrize("kind", ["cmyk", "png", "mpo", "tail"])
def test_what_is_not_plain_goes_through_pillow(kind):
    data = kinds_for_pillow()[kind]
    assert plain_frame(data) is None
    exact, notes = read_image(data, "a.jpg")
    ours, ours_notes = read_pixels(data, "a.jpg")
    assert ours_notes == notes
    np.testing.assert_array_equal(ours._decode(ours.height)[..., :3], np.asarray(exact))


@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_as_pillow_has_it(cut, flips):
    """Cut at any place and with bytes changed: the same error, the same size and notes, the same pixels."""
    data = bytearray(encoded(SMALL[0], quality=60))
    for place, bits in flips:
        data[place % len(data)] ^= bits
    data = bytes(data[: len(data) - cut])

    def outcome(read):
        try:
            return read()
        except UnreadableImage as error:
            return str(error)

    def native():
        image, notes = read_pixels(data, "a.jpg")
        return np.array(image._decode(image.height)[..., :3]), notes

    def exact():
        image, notes = read_image(data, "a.jpg")
        return np.asarray(image), notes

    ours, theirs = outcome(native), outcome(exact)
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(ours, str):
        assert ours == theirs
    else:
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]


@pytest.mark.parametrize(("mode", "progressive"), [("RGB", False), ("RGB", True), ("L", False)])
@pytest.mark.filterwarnings("ignore")
def test_damaged_headers_end_in_pillows_pixels_or_its_refusal(mode, progressive):
    """Each byte of the headers of the frame (its size apart) and of the first scan, with values that made trouble."""
    colours = {"subsampling": 2} if mode == "RGB" else {}
    good = encoded(SMALL[0].crop((0, 0, 40, 61)).convert(mode), progressive=progressive, **colours)
    frame, scan = good.index(b"\xff\xc2" if progressive else b"\xff\xc0"), good.index(b"\xff\xda")
    refused = 0
    components = 3 if mode == "RGB" else 1
    for place in [*range(frame + 9, frame + 10 + 3 * components), *range(scan + 4, scan + 8 + 2 * components)]:
        for value in (0, 1, 0x10, 0x41, 0x15, 0x50, 255):
            data = bytearray(good)
            data[place] = value
            with contextlib.suppress(UnreadableImage):  # and no other error
                read_pixels(bytes(data), "a.jpg")[0]._decode(1)
            try:
                exact = np.asarray(read_image(bytes(data), "a.jpg")[0])
            except UnreadableImage as error:
                refused += 1
                with pytest.raises(UnreadableImage) as caught:
                    image = read_pixels(bytes(data), "a.jpg")[0]
                    image._decode(image.height)
                assert str(caught.value) == str(error)
                continue
            image = read_pixels(bytes(data), "a.jpg")[0]
            np.testing.assert_array_equal(image._decode(image.height)[:, :, :3], exact)
    assert refused > 10


@pytest.mark.parametrize("marker", [b"\xff\xc0", b"\xff\xda", b"\xff\x01", b"\xff\xd8"])
def test_a_marker_in_the_rows_below_the_crop_is_seen(marker):
    """All of such a file is decoded, so that it is the same file whatever the crop."""
    data = encoded(SMALL[0])
    place = len(data) - len(data) // 8
    damaged = data[:place] + marker + data[place + 2 :]
    assert top(data, plain_frame(data), 8) is not None
    assert top(damaged, plain_frame(damaged), 8) is None


def test_more_pixels_than_pillow_allows_are_refused_by_its_own_words(monkeypatch):
    data = encoded(SMALL[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_pixels(data, "a.jpg")


# ---- the choice of backend


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """What is built is not there, and nothing can build it."""
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        patch.setenv("CXX", "/nonexistent")
        pixels._library.cache_clear()
        yield
    pixels._library.cache_clear()


def test_without_a_compiler_auto_takes_pillow_and_native_is_refused(no_compiler, make_picture):
    backend = Backend("auto")
    assert not backend.native
    assert str(backend) == (
        "Pillow (The native augmentation cannot be built: no C++ compiler was found (/nonexistent); install one or "
        "name it in CXX)"
    )
    with pytest.raises(ValueError, match="augment.backend is 'native'.*no C.. compiler.*give auto or pillow"):
        TrainTransform(AugmentConfig(backend="native"), (8, 8))
    transform = TrainTransform(AugmentConfig(), (8, 8))
    plan = transform.draw(np.random.default_rng(0), 20, 16)
    assert transform.apply(make_picture(0), plan).shape == (3, 8, 8)


def test_the_backend_says_what_it_is():
    assert str(Backend("auto")) == str(Backend("native")) == "native"
    assert str(Backend("pillow")) == "Pillow (as asked for)"


def test_shift_is_pillows(make_picture):
    native, exact = both(AugmentConfig(crop="shift"), (32, 32))
    for size in ((32, 32), (40, 31)):
        for top_, left in ((-4, 3), (0, 0), (40, 0), (2, -33)):
            plan = Plan("timm", Shift(top_, left), hflip=True, ops=(Op("Rotate", (9.0,), BICUBIC),))
            assert_same(native.apply(make_picture(1, *size), plan), exact.apply(make_picture(1, *size), plan))


def test_flags_keep_products_and_sums_apart():
    """With fused multiply-adds the bytes would hang on the processor."""
    assert "-ffp-contract=off" in pixels._FLAGS and "-ffast-math" not in (*pixels._FLAGS, *compiled._FLAGS)
    assert math.isclose(pixels._affine(Op("Rotate", (30.0,)), 10, 10)[0], math.cos(math.radians(30)))

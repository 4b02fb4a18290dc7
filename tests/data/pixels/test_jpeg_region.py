"""Boxes of JPEGs against Pillow, for every kind of file and colour sampling; damaged files are left to Pillow."""

import ctypes.util
import io
import itertools
import subprocess

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from volo.data.pixels import jpeg_region
from volo.data.pixels.decode import UnreadableImage, read_header, read_image
from volo.data.pixels.jpeg import plain_frame
from volo.runtime import native as compiled

PHOTOGRAPH = Image.fromarray(load_sample_images().images[0]).crop((200, 100, 333, 197))  # 133 x 97
KINDS = (
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"keep_rgb": True},
)
needs_library = pytest.mark.skipif(
    jpeg_region.unavailable_reason() is not None, reason=str(jpeg_region.unavailable_reason())
)


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def assert_box_is_pillows(data: bytes, exact: np.ndarray, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    pixels, frame = np.full((*exact.shape[:2], 4), 77, np.uint8), plain_frame(data)
    if frame is None:
        assert exact.shape[0] * exact.shape[1] <= 8  # files with a scan of a few bytes are not plain
        return
    assert jpeg_region.decode(data, frame, box, pixels)
    np.testing.assert_array_equal(pixels[top:bottom, left:right, :3], exact[top:bottom, left:right], str(box))


@needs_library
@pytest.mark.parametrize("colours", ["444", "422", "420", "440", "411", "Gray"])
@pytest.mark.parametrize("size", [(133, 97), (128, 96), (17, 33), (16, 7), (1, 1)])
def test_boxes_at_block_borders_are_pillows(colours, size):
    """There, and at the edges of the image, upsampled colours depend on the neighbouring block."""
    pixels = np.array(PHOTOGRAPH.crop((0, 0, *size)))
    if colours == "Gray":
        data = simplejpeg.encode_jpeg(pixels[..., :1].copy(), 90, "Gray", "Gray")
    else:
        data = simplejpeg.encode_jpeg(pixels, 90, "RGB", colours)
    exact = np.asarray(read_image(data, "a.jpg")[0])
    corners = (0, 1, 7, 8, 15, 16, 17, 31, 32, 63, 64, 79, 95, 96, 111, 127, 132)
    for left, top, side in itertools.product(corners, corners, (1, 2, 20)):
        if left < size[0] and top < size[1]:
            assert_box_is_pillows(data, exact, (left, top, min(left + side, size[0]), min(top + side, size[1])))


def drawn_box(size: tuple[int, int], shares: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    (left, right), (top, bottom) = (
        sorted(int(share * (side - 1)) for share in pair)
        for pair, side in zip((shares[:2], shares[2:]), size, strict=True)
    )
    return left, top, right + 1, bottom + 1


@needs_library
@given(
    kind=st.sampled_from(KINDS),
    grey=st.booleans(),
    size=st.tuples(st.integers(1, 133), st.integers(1, 97)),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(max_examples=400, deadline=None)
def test_any_box_of_any_kind_is_pillows(kind, grey, size, shares):
    image = PHOTOGRAPH.crop((0, 0, *size))
    if grey:
        image, kind = image.convert("L"), {name: kind[name] for name in kind if name not in ("subsampling", "keep_rgb")}
    data = encoded(image, **kind)
    assert_box_is_pillows(data, np.asarray(read_image(data, "a.jpg")[0]), drawn_box(size, shares))


@needs_library
@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_boxes_of_damaged_files_are_pillows(kind, flips, shares):
    """If decoding a box fails, Pillow fails with the same message; if both succeed, the pixels are the same."""
    damaged = bytearray(encoded(PHOTOGRAPH, **kind))
    for at, bits in flips:
        damaged[at % len(damaged)] ^= bits
    data = bytes(damaged)

    def outcome(read, decode):
        try:
            image = read()
            box = drawn_box((image.width, image.height), shares)  # of the size that the damage left
            return np.array(decode(image, box))[box[1] : box[3], box[0] : box[2], :3]
        except UnreadableImage as error:
            return str(error)

    exact = outcome(lambda: read_image(data, "a.jpg")[0], lambda image, box: image)
    ours = outcome(lambda: read_header(data, "a.jpg"), lambda image, box: image.decode(box))
    if isinstance(ours, str):
        assert ours == exact
    elif not isinstance(exact, str):
        np.testing.assert_array_equal(ours, exact)


@needs_library
@pytest.mark.parametrize("colours", ["420", "411"])
def test_images_with_uncommon_colour_sampling_are_decoded_as_a_whole(colours):
    data = simplejpeg.encode_jpeg(np.array(PHOTOGRAPH), 90, "RGB", colours)
    pixels = np.zeros((97, 133, 4), np.uint8)
    assert jpeg_region.decode(data, plain_frame(data), (50, 40, 60, 50), pixels)
    assert np.array_equal(pixels[..., :3], np.asarray(read_image(data, "a.jpg")[0])) == (colours == "411")


@needs_library
@pytest.mark.parametrize("marker", [b"\xff\xc0", b"\xff\xda", b"\xff\x01", b"\xff\xd8", b"\xff\xff\xc0"])
@pytest.mark.parametrize("from_end", [2, 800])
def test_markers_below_a_box_are_detected(marker, from_end):
    """A file with a wrong marker is left to Pillow, whatever the box; other damage is not detected."""
    data = encoded(PHOTOGRAPH)
    frame, pixels = plain_frame(data), np.empty((97, 133, 4), np.uint8)
    for box in ((0, 0, 8, 8), (0, 0, 133, 97)):
        assert not jpeg_region.decode(data[:-from_end] + marker + data[-from_end:], frame, box, pixels)
    assert jpeg_region.decode(data[:-800] + b"\x55\x33" + data[-800:], frame, (0, 0, 8, 8), pixels)


@needs_library
def test_a_warning_leaves_the_file_to_pillow():
    """The library warns if a file ends early, and fills in the rest."""
    data = encoded(PHOTOGRAPH)
    cut, pixels = data[:-800] + data[-2:], np.empty((97, 133, 4), np.uint8)
    assert jpeg_region.decode(cut, plain_frame(cut), (0, 0, 8, 8), pixels)
    assert not jpeg_region.decode(cut, plain_frame(cut), (0, 90, 8, 97), pixels)


@needs_library
def test_a_frame_of_another_size_is_refused():
    """Nothing may be written beyond the pixels."""
    data = encoded(PHOTOGRAPH)
    frame = plain_frame(data)
    for height, width in ((97, 132), (96, 133), (98, 133)):
        other = frame._replace(height=height, width=width)
        assert not jpeg_region.decode(data, other, (0, 0, 8, 8), np.empty((height, width, 4), np.uint8))


def test_it_is_available_if_its_header_is():
    """The tests of boxes may be skipped for a missing header only, not because the source does not compile."""
    ask = [*compiled._compiler(), "-x", "c++", "-E", "-include", "cstdio", "-include", "jpeglib.h", "/dev/null"]
    if subprocess.run(ask, capture_output=True).returncode == 0:
        assert jpeg_region.unavailable_reason() is None
    else:
        assert "jpeglib.h" in jpeg_region.unavailable_reason() or "jconfig.h" in jpeg_region.unavailable_reason()


@pytest.fixture
def fresh(monkeypatch):
    jpeg_region._library.forget()
    yield monkeypatch
    monkeypatch.undo()
    jpeg_region._library.forget()


def test_without_the_header_rows_are_decoded(fresh, tmp_path):
    source = tmp_path / "jpeg_region.cpp"
    source.write_text("#include <none/jconfig.h>\n")
    fresh.setattr(jpeg_region, "_SOURCE", source)
    reason = jpeg_region.unavailable_reason()
    assert "none/jconfig.h" in reason and "libjpeg-dev" in reason
    data = encoded(PHOTOGRAPH)
    ours = read_header(data, "a.jpg").decode((50, 30, 60, 40))
    np.testing.assert_array_equal(ours[:40, :, :3], np.asarray(read_image(data, "a.jpg")[0])[:40])


@needs_library
def test_a_library_without_a_needed_function_is_refused(fresh):
    fresh.setattr(Image.core, "__file__", ctypes.util.find_library("m"))
    assert "jpeg_read_scanlines" in jpeg_region.unavailable_reason()


@needs_library
def test_a_library_that_gives_other_bytes_is_refused(fresh):
    fresh.setattr(jpeg_region, "_decode", lambda library, data, frame, box, pixels: True)
    assert "does not match jpeglib.h" in jpeg_region.unavailable_reason()


@needs_library
def test_the_abi_of_the_library_is_found(fresh):
    """The library refuses a caller with another ABI, and the next one is tried."""
    right = [layout for layout in jpeg_region._LAYOUTS if _alone(fresh, layout) is None]
    assert len(right) == 1
    fresh.setattr(jpeg_region, "_LAYOUTS", (*(set(jpeg_region._LAYOUTS) - set(right)), *right))
    jpeg_region._library.forget()
    assert jpeg_region.unavailable_reason() is None


def _alone(fresh: pytest.MonkeyPatch, layout: int) -> str | None:
    jpeg_region._library.forget()
    with fresh.context() as patch:
        patch.setattr(jpeg_region, "_LAYOUTS", (layout,))
        return jpeg_region.unavailable_reason()

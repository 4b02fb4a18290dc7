"""Plain JPEGs give Pillow's pixels and Pillow's errors, whether boxes or whole rows are decoded."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from volo.data.pixels import jpeg_region
from volo.data.pixels.decode import Header, Note, UnreadableImage, read_header, read_image
from volo.data.pixels.jpeg import plain_frame, top

PHOTOGRAPHS = [Image.fromarray(array) for array in load_sample_images().images]  # 640 x 427
SMALL = [image.crop((200, 100, 333, 197)) for image in PHOTOGRAPHS]


@pytest.fixture(autouse=True, scope="module", params=["boxes", "rows"])
def by(request):
    """Run every test with both decoders; the one for boxes needs a header that may be missing."""
    if request.param == "rows":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jpeg_region, "unavailable_reason", lambda: "disabled by the test")
            yield request.param
        return
    if reason := jpeg_region.unavailable_reason():
        pytest.skip(reason)
    yield request.param


def whole(image: Header) -> np.ndarray:
    return image.decode((0, 0, image.width, image.height))[..., :3]


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
        ours = read_header(data, "a.jpg")
        assert (ours.height, ours.width, ours.notes) == (203, 331, notes)
        np.testing.assert_array_equal(ours.decode((0, 0, 331, rows))[:rows, :, :3], np.asarray(exact)[:rows])
        shorter.append(top(data, plain_frame(data), rows) is not None)
    assert shorter[0] == (kind != "progressive") and not shorter[-1]


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_tags_of_plain_jpegs(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(SMALL[0], exif=exif)
    for choice in ("ignore", "apply"):
        exact, notes = read_image(data, "a.png", choice)
        ours = read_header(data, "a.png", choice)
        assert ours.notes == notes and Note.OTHER_FORMAT in notes
        np.testing.assert_array_equal(whole(ours), np.asarray(exact))


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
def test_other_files_are_decoded_by_pillow(kind):
    data = kinds_for_pillow()[kind]
    assert plain_frame(data) is None
    exact, notes = read_image(data, "a.jpg")
    ours = read_header(data, "a.jpg")
    assert ours.notes == notes
    np.testing.assert_array_equal(whole(ours), np.asarray(exact))


@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_pillows_pixels_or_its_error(cut, flips):
    """Files cut anywhere and with changed bytes: the same error, or the same size, notes and pixels."""
    data = bytearray(encoded(SMALL[0], quality=60))
    for at, bits in flips:
        data[at % len(data)] ^= bits
    data = bytes(data[: len(data) - cut])

    def outcome(read):
        try:
            return read()
        except UnreadableImage as error:
            return str(error)

    def native():
        image = read_header(data, "a.jpg")
        return np.array(whole(image)), image.notes

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
def test_damaged_headers_give_pillows_pixels_or_its_error(mode, progressive):
    """Each byte of the frame header (except the size) and of the first scan header, with values that caused bugs."""
    colours = {"subsampling": 2} if mode == "RGB" else {}
    good = encoded(SMALL[0].crop((0, 0, 40, 61)).convert(mode), progressive=progressive, **colours)
    frame, scan = good.index(b"\xff\xc2" if progressive else b"\xff\xc0"), good.index(b"\xff\xda")
    refused = 0
    components = 3 if mode == "RGB" else 1
    for at in [*range(frame + 9, frame + 10 + 3 * components), *range(scan + 4, scan + 8 + 2 * components)]:
        for value in (0, 1, 0x10, 0x41, 0x15, 0x50, 255):
            data = bytearray(good)
            data[at] = value
            with contextlib.suppress(UnreadableImage):  # no other error may be raised
                read_header(bytes(data), "a.jpg").decode((0, 0, 1, 1))
            try:
                exact = np.asarray(read_image(bytes(data), "a.jpg")[0])
            except UnreadableImage as error:
                refused += 1
                with pytest.raises(UnreadableImage) as caught:
                    image = read_header(bytes(data), "a.jpg")
                    whole(image)
                assert str(caught.value) == str(error)
                continue
            image = read_header(bytes(data), "a.jpg")
            np.testing.assert_array_equal(whole(image), exact)
    assert refused > 10


@pytest.mark.parametrize("marker", [b"\xff\xc0", b"\xff\xda", b"\xff\x01", b"\xff\xd8"])
def test_a_marker_in_the_rows_below_the_crop_is_detected(marker):
    """Such a file is decoded as a whole, so that the error does not depend on the crop."""
    data = encoded(SMALL[0])
    at = len(data) - len(data) // 8
    damaged = data[:at] + marker + data[at + 2 :]
    assert top(data, plain_frame(data), 8) is not None
    assert top(damaged, plain_frame(damaged), 8) is None


def test_more_pixels_than_pillow_allows_are_refused(monkeypatch):
    data = encoded(SMALL[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_header(data, "a.jpg")

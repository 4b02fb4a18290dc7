"""Decoding files: unusual ones have notes, broken ones raise one exception with one line."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin

from volo.data.pixels.decode import Note, UnreadableImage, count_notes, read_header, read_image


def save(image: Image.Image, path, **options) -> str:
    image.save(path, **options)
    return str(path)


def read(path, **options) -> tuple[Image.Image, Note]:
    return read_image(Path(path).read_bytes(), str(path), **options)


def pixels(path: str, **options) -> np.ndarray:
    return np.asarray(read(path, **options)[0])


def test_plain_image_is_what_pillow_reads(tmp_path, make_picture):
    path = save(make_picture(0), tmp_path / "a.jpg")
    image, notes = read(path)
    assert image.mode == "RGB" and notes == 0
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "suffix", "note"),
    [
        ("L", "png", 0),
        ("1", "png", 0),
        ("CMYK", "jpg", Note.CMYK),
        ("P", "png", Note.PALETTE),
        ("RGBA", "png", Note.ALPHA),
        ("LA", "png", Note.ALPHA),
    ],
)
def test_other_modes_are_converted_as_by_pillow(tmp_path, make_picture, mode, suffix, note):
    path = save(make_picture(0).convert(mode), tmp_path / f"a.{suffix}")
    image, notes = read(path)
    assert notes == note
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


def test_transparent_palette(tmp_path, make_picture):
    path = save(make_picture(0).convert("P"), tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns about dropped transparency; the note says it already
        image, notes = read(path)
    assert notes == Note.PALETTE | Note.ALPHA
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(image), reference)


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.arange(0, 65536, 17, dtype=np.uint16).reshape(16, -1)
    path = save(Image.fromarray(values), tmp_path / f"a.{suffix}")
    image, notes = read(path)
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image), np.stack([expected] * 3, -1))
    assert notes == Note.SIXTEEN_BIT
    # convert() alone clips values above 255 to white.
    assert (np.asarray(Image.open(path).convert("RGB")) == 255).mean() > 0.98


def sixteen_bit_rgb_png(values: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_rgb_keeps_its_scale(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, size=(4, 5, 3))
    (tmp_path / "a.png").write_bytes(sixteen_bit_rgb_png(values))
    assert abs(pixels(str(tmp_path / "a.png")) - values / 257).max() <= 1


def test_values_without_a_scale_are_refused(tmp_path):
    floats = save(Image.fromarray(np.ones((4, 4), np.float32)), tmp_path / "f.tif")
    with pytest.raises(UnreadableImage, match=r"f.tif: its values are floats.*8 or 16 bits$"):
        read(floats)
    integers = save(Image.fromarray(np.full((4, 4), 70000, np.int32)), tmp_path / "i.tif")
    with pytest.raises(UnreadableImage, match=r"i.tif: .*0\.\.65535"):
        read(integers)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tag(tmp_path, make_picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(make_picture(0), tmp_path / "a.jpg", exif=exif)
    stored = Image.open(path)
    ignored, notes = read(path)
    applied, _ = read(path, exif="apply")
    np.testing.assert_array_equal(np.asarray(ignored), np.asarray(stored))
    np.testing.assert_array_equal(np.asarray(applied), np.asarray(ImageOps.exif_transpose(stored)))
    assert notes == (Note.EXIF_ROTATED if orientation > 1 else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_tags_leave_the_pixels_readable(tmp_path, make_picture):
    path = save(make_picture(0), tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    for exif in ("ignore", "apply"):
        np.testing.assert_array_equal(pixels(path, exif=exif), np.asarray(Image.open(path)))


def test_the_content_determines_the_format_not_the_suffix(tmp_path, make_picture):
    make_picture(0).save(tmp_path / "a.JPEG", format="PNG")
    image, notes = read(str(tmp_path / "a.JPEG"))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(make_picture(0)))
    assert notes == Note.OTHER_FORMAT


def test_first_frame_of_several(tmp_path, make_picture):
    frames = [make_picture(i) for i in range(3)]
    path = save(frames[0], tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    image, notes = read(path)
    assert notes == Note.MULTI_FRAME
    np.testing.assert_array_equal(np.asarray(image), np.asarray(frames[0]))


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def broken_files(make_picture) -> dict[str, bytes]:
    big = make_picture(0, 200, 160)
    bomb = sixteen_bit_rgb_png(np.zeros((1, 1, 3), int)).replace(
        struct.pack(">II", 1, 1), struct.pack(">II", 60000, 60000)
    )
    bomb = bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:]
    return {
        "empty.jpg": b"",
        "text.jpg": b"404: not found\n",
        "cut.jpg": encoded(big, "JPEG")[:1500],
        "cut.png": encoded(big, "PNG")[:1500],
        "header.png": encoded(big, "PNG")[:20],
        "cut.webp": encoded(big, "WEBP")[:500],
        "cut.tif": encoded(big, "TIFF")[:5000],
        "bomb.png": bomb,
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }


def test_every_kind_of_broken_file_gives_one_line(tmp_path, make_picture):
    files = broken_files(make_picture)
    reasons = {
        "empty.jpg": "the file is empty",
        "text.jpg": "404",
        "cut.jpg": "truncated",
        "bomb.png": "decompression bomb",
        "script.jpg": "not an image",  # Pillow would run Ghostscript on it
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UnreadableImage) as caught:
            read(str(path))
        message = str(caught.value)
        assert message.startswith(f"cannot read {path}: ") and "\n" not in message and len(message) < 400
        assert reasons.get(name, "") in message, message


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("read_it", [read_image, read_header])
def test_a_tiny_file_of_many_pixels_is_refused_before_it_is_decoded(monkeypatch, kind, read_it):
    data = encoded(Image.new("L", (1200, 1000)), kind)
    if kind == "JPEG":
        data = data[:5000] + data[-2:]
    assert 120 * len(data) < 1_200_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700_000)
    monkeypatch.setattr(Image.Image, "load", None)
    for module in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile):
        monkeypatch.setattr(module, "load", None)
    message = f"could be a decompression bomb: it claims 1,200,000 pixels in {len(data):,} bytes"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        with pytest.raises(UnreadableImage, match=f"cannot read a: {message}"):
            read_it(data, "a")


def test_a_big_file_of_many_pixels_is_read_with_a_warning(monkeypatch, make_picture):
    data = encoded(make_picture(0, 200, 160), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert read_header(data, "a.png").hw in ((160, 200), (200, 160))


def test_notes_are_counted_by_name():
    assert count_notes([0, Note.CMYK, Note.CMYK | Note.ALPHA, 0]) == {"cmyk": 2, "alpha": 1}
    assert count_notes([]) == {}

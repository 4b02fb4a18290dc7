"""Contents of image files to 8-bit RGB, and what was unusual about each of them.

The content of a file decides how it is read, not its suffix: the ImageNet training set holds a PNG named .JPEG
and two dozen CMYK files. Whatever Pillow cannot turn into pixels becomes one exception with one line of text.
"""

import io
import os
from collections.abc import Callable, Iterable
from enum import IntFlag
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from volo.data.pixels import Pixels

# Suffixes that count as images (torchvision's list), each with the formats it promises.
SUFFIX_FORMATS = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".ppm": ("PPM",),
    ".pgm": ("PPM",),
    ".bmp": ("BMP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".webp": ("WEBP",),
}
# The raster formats to try. Not Pillow's whole list: its EPS reader hands the file to Ghostscript, which no file
# of a data set should be able to bring about.
_READ_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Decoded = TypeVar("Decoded")


class UnreadableImage(ValueError):
    """A file that cannot be turned into an image; the message is one line: path and reason."""


class Note(IntFlag):
    """What was unusual about a file that could be read."""

    EXIF_ROTATED = 1  # an EXIF orientation other than upright
    CMYK = 2  # converted by Pillow's formula, without a colour profile
    SIXTEEN_BIT = 4  # grey values scaled from 0..65535 to 0..255
    PALETTE = 8
    ALPHA = 16  # transparency, dropped
    MULTI_FRAME = 32  # animation or several pages; the first is taken
    OTHER_FORMAT = 64  # the content is not what the suffix says


def read_image(data: bytes, name: str, exif: str = "ignore") -> tuple[Image.Image, Note]:
    """Decode the content of one file to an RGB image, and say what was unusual about it.

    CMYK, palette and transparent images become RGB by Pillow's ``convert("RGB")``, as in the published code.

    Args:
        data: The content.
        name: Path of the file, for messages; its suffix says what the content should be.
        exif: "ignore" takes the pixels as they are stored, as the published code does; "apply" turns the image
            upright by its EXIF orientation tag.

    Raises:
        UnreadableImage: Empty, truncated or no image at all; more pixels than Pillow's limit against
            decompression bombs; or sample values without a known scale (floats, 32-bit integers).
    """
    return _reading(data, name, lambda image, suffix: _to_rgb(image, suffix, exif))


def read_pixels(data: bytes, name: str, exif: str = "ignore") -> tuple[Pixels, Note]:
    """Do what :func:`read_image` does, faster where the content is a plain JPEG, as most are.

    The pixels are the same: both decoders are libjpeg-turbo, but here it writes into memory that is there already.
    What a call returns is overwritten by the next one in the same thread. Arguments and errors as there.
    """

    def decode(image: Image.Image, suffix: str) -> tuple[Pixels, Note]:
        upright = exif == "ignore" or _orientation(image) not in _UPRIGHT
        if image.format == "JPEG" and image.mode in ("RGB", "L") and upright:
            pixels = Pixels.reused(image.height, image.width)
            try:
                simplejpeg.decode_jpeg(data, "RGBX", buffer=pixels.array)
                return pixels, _notes(image, suffix)
            except ValueError:  # anything odd, down to a warning: Pillow says what it makes of it
                pass
        rgb, notes = _to_rgb(image, suffix, exif)
        return Pixels.of(rgb), notes

    return _reading(data, name, decode)


def _reading(data: bytes, name: str, decode: Callable[[Image.Image, str], Decoded]) -> Decoded:
    """Return what ``decode`` makes of the image, whose header is read, and the suffix of ``name``."""
    try:
        with Image.open(io.BytesIO(data), formats=_READ_FORMATS) as image:
            return decode(image, os.path.splitext(name)[1].lower())
    except MemoryError:  # says something about the machine, nothing about the file
        raise
    except Exception as error:  # Pillow's readers raise anything from struct.error to SyntaxError on broken bytes
        raise UnreadableImage(f"cannot read {name}: {_reason(data, error)}") from error


def count_notes(notes: Iterable[int]) -> dict[str, int]:
    """Count how many images carry each note, by its lower-case name; notes that do not occur are left out."""
    values = [int(value) for value in notes]
    counts = {note.name.lower(): sum(bool(value & note) for value in values) for note in Note}
    return {name: count for name, count in counts.items() if count}


def _to_rgb(image: Image.Image, suffix: str, exif: str) -> tuple[Image.Image, Note]:
    several = getattr(image, "n_frames", 1) > 1
    image.load()
    notes = _notes(image, suffix) | (Note.MULTI_FRAME if several else Note(0))
    # convert() warns that it drops this; that is meant, and the note says it.
    image.info.pop("transparency", None)

    if image.mode == "F":
        raise ValueError("its values are floats, whose scale is not known; store it with 8 or 16 bits")
    orientation = _orientation(image) if exif == "apply" else 1
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image, notes


def _notes(image: Image.Image, suffix: str) -> Note:
    """Say what is unusual about an image that is not yet converted; frames are counted before it is loaded."""
    notes = Note(0)
    if image.format not in SUFFIX_FORMATS.get(suffix, (image.format,)):
        notes |= Note.OTHER_FORMAT
    if _orientation(image) in _UPRIGHT:
        notes |= Note.EXIF_ROTATED
    if image.mode == "CMYK":
        notes |= Note.CMYK
    if image.mode in ("P", "PA"):
        notes |= Note.PALETTE
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        notes |= Note.ALPHA
    if image.mode.startswith("I"):
        notes |= Note.SIXTEEN_BIT
    return notes


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey values 0..65535 to 0..255; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its 32-bit values go beyond 0..65535, so their scale is not known; store 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged tag block leaves the pixels whole, and says nothing about their orientation
        return 1


def _reason(data: bytes, error: Exception) -> str:
    """One line on why a file cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image (it begins with {data[:12]!r})" if data else "the file is empty"
    return " ".join(str(error).split()) or type(error).__name__

"""Contents of image files to 8-bit RGB, and what was unusual about each of them.

The content of a file decides how it is read, not its suffix: the ImageNet training set holds a PNG named .JPEG
and two dozen CMYK files. Whatever Pillow cannot turn into pixels becomes one exception with one line of text.
"""

import io
import math
import os
from collections.abc import Iterable
from enum import IntFlag

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from volo.data.pixels import jpeg_region
from volo.data.pixels.jpeg import Frame, plain_frame, top
from volo.data.pixels.render import Box, Pixels, from_image, reused

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
    try:
        with Image.open(io.BytesIO(data), formats=_READ_FORMATS) as image:
            return _to_rgb(image, os.path.splitext(name)[1].lower(), exif)
    except MemoryError:  # says something about the machine, nothing about the file
        raise
    except Exception as error:  # Pillow's readers raise anything from struct.error to SyntaxError on broken bytes
        raise UnreadableImage(f"cannot read {name}: {_reason(data, error)}") from error


def read_pixels(data: bytes, name: str, exif: str = "ignore") -> tuple[Pixels, Note]:
    """Do what :func:`read_image` does, faster where the content is a plain JPEG, as most are.

    The pixels are the same: both decoders are libjpeg-turbo, but here it writes only what is needed, into memory that
    is there already. Arguments and errors as there; what is wrong with the data of a JPEG comes to light when
    something is made of the pixels.
    """

    frame = plain_frame(data)
    if frame is None or frame.height * frame.width > (Image.MAX_IMAGE_PIXELS or math.inf):
        image, notes = read_image(data, name, exif)
        return Pixels.of(image), notes
    suffix = os.path.splitext(name)[1].lower()
    notes = Note(0) if "JPEG" in SUFFIX_FORMATS.get(suffix, "JPEG") else Note.OTHER_FORMAT
    if frame.tagged and _stored_orientation(data) in _UPRIGHT:
        notes |= Note.EXIF_ROTATED
        if exif == "apply":
            return Pixels.of(read_image(data, name, exif)[0]), notes
    return Pixels(frame.height, frame.width, lambda box: _decoded(data, name, frame, box)), notes


def _decoded(data: bytes, name: str, frame: Frame, box: Box) -> np.ndarray:
    """Return a plain JPEG as uint8 [H, W, 4], of which ``box`` is right, decoded by Pillow if need be."""
    pixels = reused(frame.height, frame.width)
    by_boxes = jpeg_region.unavailable_reason() is None
    if jpeg_region.decode(data, frame, box, pixels) if by_boxes else _decode_rows(data, frame, box[3], pixels):
        return pixels
    image, _ = read_image(data, name)  # Pillow says what it makes of it
    return from_image(image)


def _decode_rows(data: bytes, frame: Frame, rows: int, pixels: np.ndarray) -> bool:
    """Do what :func:`volo.data.pixels.jpeg_region.decode` does, for whole rows from the top."""
    shorter = top(data, frame, rows)
    try:
        # Strict takes even a warning for an error; but that the data go on after the last row is what was asked for.
        simplejpeg.decode_jpeg(shorter or data, "RGBX", buffer=pixels, strict=shorter is None)
    except ValueError:
        return False
    return True


def count_notes(notes: Iterable[int]) -> dict[str, int]:
    """Count how many images carry each note, by its lower-case name; notes that do not occur are left out."""
    values = [int(value) for value in notes]
    counts = {note.name.lower(): sum(bool(value & note) for value in values) for note in Note}
    return {name: count for name, count in counts.items() if count}


def _to_rgb(image: Image.Image, suffix: str, exif: str) -> tuple[Image.Image, Note]:
    notes = Note(0)
    if image.format not in SUFFIX_FORMATS.get(suffix, (image.format,)):
        notes |= Note.OTHER_FORMAT
    if getattr(image, "n_frames", 1) > 1:
        notes |= Note.MULTI_FRAME
    image.load()

    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        notes |= Note.EXIF_ROTATED
    if image.mode == "CMYK":
        notes |= Note.CMYK
    if image.mode in ("P", "PA"):
        notes |= Note.PALETTE
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        notes |= Note.ALPHA
        # convert() warns that it drops this; that is meant, and the note says it.
        image.info.pop("transparency", None)

    if image.mode == "F":
        raise ValueError("its values are floats, whose scale is not known; store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        notes |= Note.SIXTEEN_BIT
        image = _eight_bits(image)
    image = image.convert("RGB")
    if exif == "apply" and orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image, notes


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


def _stored_orientation(data: bytes) -> int:
    """Return the orientation that the header of a JPEG speaks of; 1 for none, and where Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception:  # it will be said again, and reported, when the image is decoded
        return 1


def _reason(data: bytes, error: Exception) -> str:
    """One line on why a file cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image (it begins with {data[:12]!r})" if data else "the file is empty"
    return " ".join(str(error).split()) or type(error).__name__

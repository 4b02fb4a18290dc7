"""Decodes image files to 8-bit RGB, and notes what is unusual about them.

The content of a file decides how it is read, not its suffix: the ImageNet training set has a PNG named .JPEG and two
dozen CMYK files. Anything that Pillow cannot decode raises one exception with one line of text.
"""

import io
import math
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from volo.data.pixels import jpeg_region
from volo.data.pixels.crop import Box
from volo.data.pixels.jpeg import Frame, plain_frame, top
from volo.runtime.errors import DataError

# Suffixes of images (torchvision's list), each with the formats that it stands for.
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
# The raster formats to try. Not all of Pillow's: its EPS reader runs Ghostscript on the file.
_READ_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000")
_MOST_KEPT = 64 << 20  # bytes of pixels that each thread keeps for the next image
_MOST_PER_BYTE = 100  # pixels; photographs of the poorest quality have 50
_SPARE = 64  # bytes after the last pixel that render.cpp may read
_memory = threading.local()
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


class UnreadableImage(DataError):
    """A file cannot be read or decoded; the message is one line with path and reason."""


class Note(IntFlag):
    """What is unusual about a readable file."""

    EXIF_ROTATED = 1  # an EXIF orientation other than upright
    CMYK = 2  # converted by Pillow's formula, without a colour profile
    SIXTEEN_BIT = 4  # grey values scaled from 0..65535 to 0..255
    PALETTE = 8
    ALPHA = 16  # transparency, dropped
    MULTI_FRAME = 32  # animation or several pages; the first one is used
    OTHER_FORMAT = 64  # the content has another format than the suffix


def read_image(data: bytes, name: str, exif: str = "ignore") -> tuple[Image.Image, Note]:
    """Decode the content of one file to an RGB image, with notes on what is unusual about it.

    CMYK, palette and transparent images are converted by Pillow's ``convert("RGB")``, as in the published code.

    Args:
        data: The content.
        name: Path of the file, for messages and for the format that its suffix stands for.
        exif: "ignore" keeps the pixels as stored, as the published code does; "apply" turns the image upright by its
            EXIF orientation tag.

    Raises:
        UnreadableImage: The file is empty, truncated or not an image, has more pixels than twice Pillow's limit
            against decompression bombs (or than the limit, in a tiny file), or has sample values without a known scale
            (floats, 32-bit integers).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_READ_FORMATS) as image:
            _require_plausible(image.width * image.height, len(data))
            return _to_rgb(image, os.path.splitext(name)[1].lower(), exif)
    except MemoryError:  # a problem of the machine, not of the file
        raise
    except Exception as error:  # Pillow's readers raise anything from struct.error to SyntaxError on damaged files
        raise UnreadableImage(f"cannot read {name}: {_reason(data, error)}") from error


def _require_plausible(pixels: int, size: int) -> None:
    """Raise ValueError for a tiny file whose header claims more pixels than Pillow's limit, above which it warns.

    Pillow itself refuses from twice the limit on, before that it would fill gigabytes for a few bytes.
    """
    if pixels > (Image.MAX_IMAGE_PIXELS or math.inf) and pixels > _MOST_PER_BYTE * size:
        raise ValueError(
            f"could be a decompression bomb: it claims {pixels:,} pixels in {size:,} bytes. Store it with fewer pixels"
        )


@dataclass(frozen=True, slots=True)
class Header:
    """Size and notes of an image, which can be decoded.

    Args:
        height: H.
        width: W.
        notes: What is unusual about the file.
    """

    height: int
    width: int
    notes: Note

    @property
    def hw(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    def decode(self, box: Box | None) -> np.ndarray:
        """Return the pixels, uint8 [H, W, 4], in memory of :func:`reused`; the fourth channel is undefined.

        Args:
            box: The box that is needed; pixels outside it may be undefined. With None, Pillow decodes the whole image
                to uint8 [H, W, 3].

        Raises:
            UnreadableImage: The data are damaged.
        """
        raise NotImplementedError


def read_header(data: bytes, name: str, exif: str = "ignore") -> Header:
    """Read the size and the notes of an image, so that only the box that a plan needs has to be decoded.

    This holds for plain JPEGs, which most images are. Others are decoded here, because Pillow knows their orientation
    and notes for certain only after decoding. Arguments and errors are those of :func:`read_image`.
    """
    frame = plain_frame(data)
    if frame is None or frame.height * frame.width > (Image.MAX_IMAGE_PIXELS or math.inf):
        return _decoded(data, name, exif)
    suffix = os.path.splitext(name)[1].lower()
    notes = Note(0) if "JPEG" in SUFFIX_FORMATS.get(suffix, "JPEG") else Note.OTHER_FORMAT
    if frame.tagged and _stored_orientation(data) in _UPRIGHT:
        if exif == "apply":
            return _decoded(data, name, exif)
        notes |= Note.EXIF_ROTATED
    return _PlainJpeg(frame.height, frame.width, notes, data, name, frame)


@dataclass(frozen=True, slots=True)
class _PlainJpeg(Header):
    data: bytes
    name: str
    frame: Frame

    def decode(self, box: Box | None) -> np.ndarray:
        # All of these decoders call libjpeg-turbo and give the same bytes. Pillow is slower: it decodes the whole image
        # into new memory.
        if box is not None:
            pixels = reused(self.height, self.width)
            decode = _decode_rows if jpeg_region.unavailable_reason() else jpeg_region.decode
            if decode(self.data, self.frame, box, pixels):
                return pixels
        image, _ = read_image(self.data, self.name)
        return np.asarray(image) if box is None else from_image(image)


@dataclass(frozen=True, slots=True)
class _Decoded(Header):
    image: Image.Image

    def decode(self, box: Box | None) -> np.ndarray:
        return np.asarray(self.image) if box is None else from_image(self.image)


def _decoded(data: bytes, name: str, exif: str) -> _Decoded:
    image, notes = read_image(data, name, exif)
    return _Decoded(image.height, image.width, notes, image)


def from_image(image: Image.Image) -> np.ndarray:
    """Return a copy of an RGB image, uint8 [H, W, 4], in memory of :func:`reused`."""
    pixels, packed = reused(image.height, image.width), np.asarray(image)
    for channel in range(3):  # five times as fast as one assignment of all three
        pixels[..., channel] = packed[..., channel]
    return pixels


def reused(height: int, width: int) -> np.ndarray:
    """Return an uninitialised uint8 [H, W, 4], followed by spare bytes, in memory that this thread's next call reuses.

    Allocating memory for every image would take a tenth of the time of decoding it. Memory of huge images is not kept.
    """
    size = height * width * 4
    if size > _MOST_KEPT:
        return np.empty(size + _SPARE, np.uint8)[:size].reshape(height, width, 4)
    memory = getattr(_memory, "array", None)
    if memory is None or len(memory) < size + _SPARE:
        memory = _memory.array = np.empty(size + size // 4 + _SPARE, np.uint8)
    return memory[:size].reshape(height, width, 4)


def _decode_rows(data: bytes, frame: Frame, box: Box, pixels: np.ndarray) -> bool:
    """Do the same as :func:`volo.data.pixels.jpeg_region.decode`, but decode all rows down to the end of the box."""
    shorter = top(data, frame, box[3])
    try:
        # Strict mode makes a warning an error, and a shortened file always warns of the data after its last row.
        simplejpeg.decode_jpeg(shorter or data, "RGBX", buffer=pixels, strict=shorter is None)
    except ValueError:
        return False
    return True


def count_notes(notes: Iterable[int]) -> dict[str, int]:
    """Count how many images carry each note, by its lower-case name; notes that do not occur are left out."""
    values = [int(value) for value in notes]
    counts = {str(note.name).lower(): sum(bool(value & note) for value in values) for note in Note}
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
        # convert() would warn that it drops this; the note reports it.
        image.info.pop("transparency", None)

    if image.mode == "F":
        raise ValueError("its values are floats of unknown scale. Store it with 8 or 16 bits")
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
        raise ValueError("its 32-bit values exceed 0..65535, so their scale is unknown. Store it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the tags are damaged, the pixels need not be
        return 1


def _stored_orientation(data: bytes) -> int:
    """Return the orientation in the header of a JPEG; 1 if there is none or Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception:  # decoding raises it again, and it is reported then
        return 1


def _reason(data: bytes, error: Exception) -> str:
    """Return in one line why a file cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image (it begins with {data[:12]!r})" if data else "the file is empty"
    return " ".join(str(error).split()) or type(error).__name__

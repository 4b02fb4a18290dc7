"""A box of a JPEG, decoded by jpeg_region.cpp, which is compiled on first use, with the libjpeg-turbo of Pillow itself.

It needs that library's header, jpeglib.h, which is not everywhere; then volo/data/pixels/decode.py decodes whole rows.
"""

import ctypes
import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from volo.data.pixels.jpeg import Frame, plain_frame
from volo.data.pixels.render import Box
from volo.runtime import native as compiled

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3",)
# Layouts of the library, by the versions of libjpeg that libjpeg-turbo stands in for: Pillow's own packages, then those
# of distributions.
_LAYOUTS = (62, 80)
_HEADERS = ("jpeglib.h", "jconfig.h")


def unavailable_reason() -> str | None:
    """Return None where this runs, else why it does not. The first call in a process may build it."""
    library = _library()
    return library if isinstance(library, str) else None


def decode(data: bytes, frame: Frame, box: Box, pixels: np.ndarray) -> bool:
    """Write a box of a plain JPEG to its place in ``pixels``, and whatever around it.

    Args:
        data: Content of the file.
        frame: Its frame.
        box: (left, top, right, bottom) in pixels.
        pixels: uint8 [H, W, 4]; the fourth channel means nothing.

    Returns:
        Whether that went without as much as a warning; if not, Pillow has to say what it makes of the file.
    """
    return _decode(_library(), data, frame, box, pixels)


def _decode(library: ctypes.CDLL, data: bytes, frame: Frame, box: Box, pixels: np.ndarray) -> bool:
    assert pixels.shape == (frame.height, frame.width, 4) and pixels.flags.c_contiguous
    assert 0 <= box[0] < box[2] <= frame.width and 0 <= box[1] < box[3] <= frame.height, (box, frame)
    scan = frame.scan if frame.by_rows else -1  # of several scans all data are read anyhow
    return bool(library.decode_region(data, len(data), scan, pixels.ctypes.data, frame.width, frame.height, *box))


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the library, built if need be, or the sentence that says why there is none."""
    try:
        pillow = ctypes.CDLL(Image.core.__file__)  # finds what is in the libraries that it has loaded, too
        for layout in _LAYOUTS:
            library = compiled.library(_SOURCE, (*_FLAGS, f"-DLAYOUT={layout}"), "jpeg_region")
            library.bind.argtypes, library.bind.restype = [ctypes.c_void_p], ctypes.c_char_p
            library.decode_region.argtypes = [
                *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
                *[ctypes.c_int64] * 6,
            ]
            library.decode_region.restype = ctypes.c_int64
            if missing := library.bind(pillow._handle):
                return f"Pillow's JPEG library has no {missing.decode()}"
            if _is_pillows(library):
                return library
    except (compiled.NoLibrary, OSError) as error:
        remedy = "; a package such as libjpeg-dev has it" if any(name in str(error) for name in _HEADERS) else ""
        return f"what decodes parts of JPEGs cannot be built: {error}{remedy}"
    return f"Pillow's JPEG library is another one than {_HEADERS[0]} speaks of"


def _is_pillows(library: ctypes.CDLL) -> bool:
    """Tell whether boxes of small images of every common kind have Pillow's bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((77, 91), Image.Resampling.BICUBIC)
    box = (26, 40, 33, 51)
    for mode, options in (("RGB", {"subsampling": 0}), ("RGB", {"subsampling": 1}), ("RGB", {}), ("L", {})):
        file = io.BytesIO()
        image.convert(mode).save(file, "JPEG", **options)
        data = file.getvalue()
        with Image.open(file) as exact:
            expected = np.asarray(exact.convert("RGB").crop(box))
        pixels = np.zeros((image.height, image.width, 4), np.uint8)
        if not _decode(library, data, plain_frame(data), box, pixels):
            return False
        if not np.array_equal(pixels[box[1] : box[3], box[0] : box[2], :3], expected):
            return False
    return True

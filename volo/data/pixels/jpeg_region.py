"""Decodes a box of a JPEG with Pillow's own libjpeg-turbo, through jpeg_region.cpp, which is compiled on first use.

This needs the library's header, jpeglib.h. If it is not installed, volo/data/pixels/decode.py decodes whole rows.
"""

import ctypes
import io
from pathlib import Path

import numpy as np
from PIL import Image

from volo.data.pixels.crop import Box
from volo.data.pixels.jpeg import Frame, plain_frame
from volo.runtime import native

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3",)
# ABI of the library, by the version of libjpeg that it emulates: that of Pillow's wheels, then that of distributions.
_LAYOUTS = (62, 80)
_HEADERS = ("jpeglib.h", "jconfig.h")


def unavailable_reason() -> str | None:
    """Return None if this can run, else why it cannot. The first call in a process may build the library."""
    return _library.unavailable_reason()


def decode(data: bytes, frame: Frame, box: Box, pixels: np.ndarray) -> bool:
    """Decode a box of a plain JPEG into the same box of ``pixels``; pixels outside it become undefined.

    Args:
        data: Content of the file.
        frame: Its frame.
        box: (left, top, right, bottom) in pixels.
        pixels: uint8 [H, W, 4]; the fourth channel is undefined.

    Returns:
        Whether there was no error and no warning; otherwise Pillow has to decode the file, or report the error.
    """
    return _decode(_library.get(), data, frame, box, pixels)


def _decode(library: ctypes.CDLL, data: bytes, frame: Frame, box: Box, pixels: np.ndarray) -> bool:
    assert pixels.shape == (frame.height, frame.width, 4) and pixels.flags.c_contiguous
    assert 0 <= box[0] < box[2] <= frame.width and 0 <= box[1] < box[3] <= frame.height, (box, frame)
    scan = frame.scan if frame.by_rows else -1  # with several scans all data are read anyway
    return bool(library.decode_region(data, len(data), scan, pixels.ctypes.data, frame.width, frame.height, *box))


def _load() -> ctypes.CDLL:
    """Return the library for the ABI of Pillow's libjpeg-turbo."""
    try:
        pillow = ctypes.CDLL(Image.core.__file__)  # also finds symbols of the libraries that it links
    except OSError as error:
        raise native.NoLibrary(str(error)) from error
    for layout in _LAYOUTS:
        library = _compiled(layout)
        if missing := library.bind(pillow._handle):
            raise native.NoLibrary(f"Pillow's JPEG library has no function {missing.decode()}")
        if _is_pillows(library):
            return library
    raise native.NoLibrary(f"Pillow's JPEG library does not match {_HEADERS[0]}")


def _compiled(layout: int) -> ctypes.CDLL:
    try:
        library = native.library(_SOURCE, (*_FLAGS, f"-DLAYOUT={layout}"), "jpeg_region")
    except native.NoLibrary as error:
        if any(name in str(error) for name in _HEADERS):
            raise native.NoLibrary(f"{error}. Install a package such as libjpeg-dev") from error
        raise
    library.bind.argtypes, library.bind.restype = [ctypes.c_void_p], ctypes.c_char_p
    library.decode_region.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        *[ctypes.c_int64] * 6,
    ]
    library.decode_region.restype = ctypes.c_int64
    return library


def _is_pillows(library: ctypes.CDLL) -> bool:
    """Return whether a box of a small image has Pillow's bytes, for every common colour sampling."""
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
        frame = plain_frame(data)
        if frame is None or not _decode(library, data, frame, box, pixels):
            return False
        if not np.array_equal(pixels[box[1] : box[3], box[0] : box[2], :3], expected):
            return False
    return True


_library = native.NativeLibrary("The native JPEG decoder", _load)

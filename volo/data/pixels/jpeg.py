"""What is to be known of a JPEG file before it is decoded, and a file that is a little shorter than it says.

Pillow reads headers more thoroughly, but takes a tenth of the time that decoding takes.
"""

import re
from typing import NamedTuple

_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_SCAN = 0xDA
_ALL_COEFFICIENTS = bytes((0, 63, 0))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # that is neither stuffing, a restart nor filling
_TAGS, _PROFILE = 0xE1, 0xE2
_PASSED_OVER = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restarts, comments and what programs left there


class Frame(NamedTuple):
    """Of a plain JPEG: 8 bits, grey or three colours, nothing in its header that Pillow would have to explain.

    Args:
        height: H.
        width: W.
        at: Where the height stands in the file.
        block: Rows of a row of blocks.
        tagged: It has EXIF or XMP tags, which may speak of its orientation.
        by_rows: Rows follow one another in the data; in progressive files, and in several scans, they do not.
        scan: Where the first scan starts in the file.
    """

    height: int
    width: int
    at: int
    block: int
    tagged: bool
    by_rows: bool
    scan: int = 0


def plain_frame(data: bytes) -> Frame | None:
    """Return the frame of a JPEG file, or None for anything that is not plain."""
    if not (data.startswith(_START_OF_IMAGE) and data.endswith(_END_OF_IMAGE)):
        return None
    at, frame, components, tagged = 2, None, 0, False
    while at + 16 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if _BASELINE <= marker <= _PROGRESSIVE:
            # precision, height, width, number of components, then identifier, sampling, number of a table for each
            precision, components = data[at + 4], data[at + 9]
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            if frame or precision != 8 or components not in (1, 3) or not height or not width:
                return None
            samplings = data[at + 11 : at + 10 + 3 * components : 3]
            if not all(1 <= factor <= 4 for sampling in samplings for factor in (sampling >> 4, sampling & 15)):
                return None  # damaged
            rows = max(sampling & 15 for sampling in samplings)
            frame = Frame(height, width, at + 5, 8 * rows, tagged, marker != _PROGRESSIVE)
        elif marker == _SCAN:
            coefficients = at + 5 + 2 * data[at + 4]  # first, last and precision of those in this scan
            if frame and frame.by_rows and data[coefficients : coefficients + 3] != _ALL_COEFFICIENTS:
                return None  # damaged
            by_rows = frame is not None and frame.by_rows and data[at + 4] == components
            return frame and frame._replace(tagged=tagged, by_rows=by_rows, scan=at)
        elif marker not in _PASSED_OVER or (marker == _PROFILE and data[at + 4 : at + 8] == b"MPF\0"):
            return None  # several images in one file are among them
        tagged = tagged or marker == _TAGS
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def top(data: bytes, frame: Frame, rows: int) -> bytes | None:
    """Return ``data`` with a frame header that gives it fewer rows, of which the first ``rows`` decode as before.

    None where all of it has to be decoded, as there is little to save or it would not be right.
    """
    kept = -(-rows // frame.block) * frame.block
    if frame.block > 8:
        kept += frame.block  # colours between two rows of blocks need the next one too
    if not frame.by_rows or kept + 8 >= frame.height:
        return None
    # Damage further down would fail a whole decoding: then it is to do so whatever the crop. Where it breaks no marker
    # it goes unseen.
    after = _MARKER.search(data, frame.scan + 2)
    if after is None or data[after.end() - 1] != _END_OF_IMAGE[1]:
        return None
    return data[: frame.at] + kept.to_bytes(2) + data[frame.at + 2 :]

"""A picture of a training batch with its token labels: shows at a glance whether labels and pixels agree.

B images, N = rows * columns tokens. Each image is drawn as the network gets it, and again beside it with its tokens on
top: the class of each and its probability in percent, one colour per class. Tokens that see nothing of their image
are hatched.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from volo.runtime.text import printable

# Fourteen colours that stay apart from each other and from photographs.
_COLOURS = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4"),
    *("#f032e6", "#bfef45", "#fabed4", "#469990", "#9a6324", "#800000", "#000075"),
)
_OTHER = "#808080"
_MOST_NAMES = 4
# In pixels of the picture: the longer side of an image at least, and what stands around it.
_SIDE, _MARGIN, _TITLE, _LEGEND = 512, 16, 40, 64


@dataclass(frozen=True)
class TokenView:
    """What is drawn over the images.

    Args:
        classes: int [B, N], most likely class of each token.
        shares: float [B, N], its probability.
        valid: bool [B, N], tokens that see the image.
        grid: (rows, columns).
    """

    classes: np.ndarray
    shares: np.ndarray
    valid: np.ndarray
    grid: tuple[int, int]


def draw_batch(
    images: np.ndarray,
    titles: Sequence[str],
    class_names: Sequence[str],
    tokens: TokenView | None = None,
    mix_box: Sequence[int] | None = None,
) -> bytes:
    """Return a PNG of images [B, H, W, 3] in [0, 1], with their token labels, if there are any.

    Args:
        images: As the network gets them, normalisation undone.
        titles: One per image: its own label.
        class_names: Names in index order.
        tokens: Token labels.
        mix_box: MixToken's box (top, left, bottom, right) on the grid, drawn as a dashed frame: inside, the network
            gets the tokens of the reversed batch.
    """
    titles, class_names = ([printable(name) for name in names] for names in (titles, class_names))
    panels = 2 if tokens is not None else 1
    per_row = max(4 // panels, 1)
    scale = math.ceil(_SIDE / max(images.shape[1:3]))  # a whole number, so that the network's pixels stay alike
    height, width = (scale * side for side in images.shape[1:3])
    step_x, step_y = width + _MARGIN, _TITLE + height + (_LEGEND if tokens is not None else 0)
    rows, columns = -(-len(images) // per_row), min(per_row, len(images)) * panels
    canvas = Image.new("RGB", (columns * step_x + _MARGIN, rows * step_y + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas, "RGBA")  # what is drawn is blended by its alpha
    for i, values in enumerate(images):
        row, column = divmod(i, per_row)
        left, top = _MARGIN + panels * column * step_x, row * step_y + _TITLE
        image = Image.fromarray((values * 255).round().astype(np.uint8)).resize(
            (width, height), Image.Resampling.NEAREST
        )
        canvas.paste(image, (left, top))
        draw.text((left + width / 2, top - 10), titles[i], "black", ImageFont.load_default(22), anchor="ms")
        if tokens is not None:
            canvas.paste(image, (left + step_x, top))
            box = (left + step_x, top, left + step_x + width, top + height)
            _draw_tokens(draw, box, tokens, i, class_names, mix_box)
    picture = io.BytesIO()
    canvas.save(picture, format="PNG")
    return picture.getvalue()


def _draw_tokens(
    draw, box: tuple[int, int, int, int], tokens: TokenView, i: int, names: Sequence[str], mix_box
) -> None:
    """Draw the tokens of image ``i`` over ``box`` (left, top, right, bottom), and the names of its classes below."""
    left, top, right, bottom = box
    rows, columns = tokens.grid
    draw.rectangle((left, top, right - 1, bottom - 1), (255, 255, 255, 64))  # paler, so that the names can be read
    lines_x, lines_y = np.linspace(left, right, columns + 1).tolist(), np.linspace(top, bottom, rows + 1).tolist()
    common = [c for c, _ in Counter(tokens.classes[i][tokens.valid[i]].tolist()).most_common(len(_COLOURS))]
    colour_of = dict(zip(common, _COLOURS, strict=False))
    font = ImageFont.load_default(min(20.0, (right - left) / columns / 4))  # a short name fits into a cell
    for n in range(rows * columns):
        row, column = divmod(n, columns)
        cell = (lines_x[column], lines_y[row], lines_x[column + 1] - 1, lines_y[row + 1] - 1)
        if not tokens.valid[i, n]:
            _hatch(draw, cell)
            continue
        index, share = int(tokens.classes[i, n]), float(tokens.shares[i, n])
        colour = ImageColor.getrgb(colour_of.get(index, _OTHER))
        draw.rectangle(cell, (*colour, round(255 * (0.15 + 0.45 * share))))
        centre, text = ((cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2), f"{names[index][:6]}\n{100 * share:.0f}"
        style = {"font": font, "anchor": "mm", "align": "center", "spacing": 2}
        draw.rectangle(draw.multiline_textbbox(centre, text, **style), (0, 0, 0, 90))
        draw.multiline_text(centre, text, "white", **style)
    if mix_box is not None and mix_box[2] > mix_box[0] and mix_box[3] > mix_box[1]:
        _dashed_frame(draw, lines_x[mix_box[1]], lines_y[mix_box[0]], lines_x[mix_box[3]], lines_y[mix_box[2]])
    for k, index in enumerate(common[:_MOST_NAMES]):
        x, y = left + k % 2 * (right - left) / 2, bottom + 8 + k // 2 * 24
        draw.rectangle((x, y, x + 24, y + 14), colour_of[index])
        draw.text((x + 32, y + 7), names[index], "black", ImageFont.load_default(16), anchor="lm")


def _hatch(draw, cell: tuple[float, float, float, float]) -> None:
    """Draw slanted white lines over ``cell`` (left, top, right, bottom)."""
    left, top, right, bottom = cell
    width, height = right - left, bottom - top
    for offset in np.arange(4, width + height, 8):
        start = (left + max(offset - height, 0), top + min(offset, height))
        end = (left + min(offset, width), top + max(offset - width, 0))
        draw.line((*start, *end), "white", 1)


def _dashed_frame(draw, left: float, top: float, right: float, bottom: float) -> None:
    """Draw a frame of white dashes."""
    for x in np.arange(left, right, 16):
        for y in (top, bottom):
            draw.line((x, y, min(x + 10, right), y), "white", 3)
    for y in np.arange(top, bottom, 16):
        for x in (left, right):
            draw.line((x, y, x, min(y + 10, bottom)), "white", 3)

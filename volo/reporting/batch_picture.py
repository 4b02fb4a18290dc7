"""A picture of a training batch with its token labels: shows at a glance whether labels and pixels agree.

B images, N = rows * columns tokens. Each image is drawn as the network gets it, and again beside it with its tokens on
top: the class of each and its probability in percent, one colour per class. Tokens that see nothing of their image
are hatched.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Fourteen colours that stay apart from each other and from photographs.
_COLOURS = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4"),
    *("#f032e6", "#bfef45", "#fabed4", "#469990", "#9a6324", "#800000", "#000075"),
)
_OTHER = "#808080"
_MOST_NAMES = 4


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if tokens is not None else 1
    per_row = max(4 // panels, 1)
    rows, columns = -(-len(images) // per_row), min(per_row, len(images)) * panels
    figure = Figure(figsize=(3.6 * columns, 3.9 * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).reshape(-1)
    for place in axes:
        place.set_axis_off()
    for i, image in enumerate(images):
        place = axes[i * panels]
        place.imshow(image)
        place.set_title(titles[i], fontsize=10)
        if tokens is not None:
            _draw_tokens(axes[i * panels + 1], image, tokens, i, class_names, mix_box)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight", pad_inches=0.1)
    return picture.getvalue()


def _draw_tokens(place, image: np.ndarray, tokens: TokenView, i: int, names: Sequence[str], mix_box) -> None:
    from matplotlib.patches import Patch, Rectangle

    height, width = image.shape[:2]
    rows, columns = tokens.grid
    cell_height, cell_width = height / rows, width / columns
    place.imshow(image, alpha=0.75)
    common = [c for c, _ in Counter(tokens.classes[i][tokens.valid[i]].tolist()).most_common(len(_COLOURS))]
    colour_of = dict(zip(common, _COLOURS, strict=False))
    size = min(7.0, 3.2 * 72 / max(rows, columns) / 4.2)  # so that a short name fits into a cell
    for n in range(rows * columns):
        row, column = divmod(n, columns)
        corner = (column * cell_width - 0.5, row * cell_height - 0.5)
        if not tokens.valid[i, n]:
            place.add_patch(
                Rectangle(corner, cell_width, cell_height, fill=False, hatch="////", edgecolor="white", linewidth=0)
            )
            continue
        index, share = int(tokens.classes[i, n]), float(tokens.shares[i, n])
        colour = colour_of.get(index, _OTHER)
        place.add_patch(
            Rectangle(corner, cell_width, cell_height, facecolor=colour, alpha=0.15 + 0.45 * share, linewidth=0)
        )
        place.text(
            corner[0] + cell_width / 2,
            corner[1] + cell_height / 2,
            f"{names[index][:6]}\n{100 * share:.0f}",
            fontsize=size,
            ha="center",
            va="center",
            color="white",
            bbox={"facecolor": "black", "alpha": 0.35, "linewidth": 0, "pad": 0.3},
        )
    if mix_box is not None and mix_box[2] > mix_box[0] and mix_box[3] > mix_box[1]:
        top, left, bottom, right = mix_box
        place.add_patch(
            Rectangle(
                (left * cell_width - 0.5, top * cell_height - 0.5),
                (right - left) * cell_width,
                (bottom - top) * cell_height,
                fill=False,
                edgecolor="white",
                linestyle="--",
                linewidth=1.5,
            )
        )
    shown = [Patch(color=colour_of[c], label=names[c]) for c in common[:_MOST_NAMES]]
    if shown:
        place.legend(
            handles=shown, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=7, frameon=False, borderpad=0
        )

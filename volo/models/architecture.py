"""The architecture of a VOLO: its fields, their checks, and the named architectures.

A *stage* is a run of equal blocks on one grid; a *grid* is (rows, cols) of tokens. Nothing here needs torch.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

ImageSize = int | Sequence[int]
_PER_STAGE = ("layers", "embed_dims", "num_heads", "mlp_ratios", "outlook_stages", "downsample_after")
_POSITIVE = ("patch_size", "stem_hidden_dim", "outlook_kernel", "outlook_stride")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class Architecture:
    """Every number that shapes the network; the defaults are those of VOLO-D1 ... D5 (arXiv 2106.13112, table 2).

    Args:
        layers: Blocks of each stage; its length is the number of stages, at least 2.
        embed_dims: Channels of each stage; they change only across a downsample.
        num_heads: Attention heads of each stage; they divide the channels.
        mlp_ratios: MLP hidden width over channels, of each stage.
        patch_size: Side of a cell of the first grid in pixels; even, because the stem halves the image first.
        stem_hidden_dim: Channels of the convolutional stem.
        outlook_stages: Which stages are Outlookers; the others are Transformers.
        downsample_after: After which stages the grid is halved. The position embedding follows the first stage
            and its downsample.
        outlook_kernel: Side of the outlook window, in cells.
        outlook_stride: Distance between outlook windows, in cells.
        outlook_padding: Zeros around the grid under outlook windows.
        post_layers: Class-attention blocks.
        qkv_bias: Biases in the query, key and value projections.
        drop_rate: Dropout after the position embedding, in the MLPs and after the attention projections.
        attn_drop_rate: Dropout of attention weights.
        return_mean: Classify the mean of the tokens, without class token, class blocks and (as in the published
            code) token head.
        return_dense: Add the token (auxiliary) head.
        drop_path_outlookers: Apply stochastic depth to the Outlookers too; the published code skips them.

    Raises:
        ValueError: The fields contradict one another.
    """

    layers: tuple[int, ...]
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    patch_size: int = 8
    stem_hidden_dim: int = 64
    outlook_stages: tuple[bool, ...] = (True, False, False, False)
    downsample_after: tuple[bool, ...] = (True, False, False, False)
    outlook_kernel: int = 3
    outlook_stride: int = 2
    outlook_padding: int = 1
    post_layers: int = 2
    qkv_bias: bool = False
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    return_mean: bool = False
    return_dense: bool = True
    drop_path_outlookers: bool = False

    def __post_init__(self):
        for name in _PER_STAGE:
            given = getattr(self, name)
            _require(isinstance(given, list | tuple), f"model.{name} is {given!r}; give a list, one entry per stage")
            object.__setattr__(self, name, tuple(given))  # YAML gives lists; a frozen dataclass holds tuples
        self._check_stages()
        for name in _POSITIVE:
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; at least 1")
        _require(
            self.patch_size % 2 == 0,
            f"model.patch_size is {self.patch_size}; it is even, because the stem halves the image first",
        )
        _require(self.outlook_padding >= 0, f"model.outlook_padding is {self.outlook_padding}; 0 or more")
        _require(
            self.outlook_stride <= self.outlook_kernel,
            f"model.outlook_stride ({self.outlook_stride}) is above model.outlook_kernel "
            f"({self.outlook_kernel}): cells between the windows would get no attention",
        )
        _require(
            self.return_mean or self.post_layers >= 1,
            f"model.post_layers is {self.post_layers}: the class token would see no image. Give at least 1, or "
            "set model.return_mean for a network without class token",
        )
        for name in ("drop_rate", "attn_drop_rate"):
            _require(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; it is in [0, 1)")

    def _check_stages(self) -> None:
        num_stages = len(self.layers)
        _require(num_stages >= 2, f"model.layers has {num_stages} entries; a VOLO has at least 2 stages")
        for name in _PER_STAGE:
            length = len(getattr(self, name))
            _require(
                length == num_stages,
                f"model.{name} has {length} entries, but model.layers has {num_stages}: give one per stage",
            )
        for name in ("layers", "embed_dims", "num_heads", "mlp_ratios"):
            given = getattr(self, name)
            low = 0 if name == "mlp_ratios" else 1
            _require(all(x >= low and x > 0 for x in given), f"model.{name} is {list(given)}; every entry is above 0")
        for stage, (dim, heads) in enumerate(zip(self.embed_dims, self.num_heads, strict=True), start=1):
            _require(
                dim % heads == 0,
                f"model.num_heads: {heads} heads do not divide the {dim} channels of stage {stage} (model.embed_dims)",
            )
        _require(
            not self.downsample_after[-1],
            "model.downsample_after is true for the last stage; a downsample stands between two stages",
        )
        for stage in range(num_stages - 1):
            dim, next_dim = self.embed_dims[stage : stage + 2]
            _require(
                dim == next_dim or self.downsample_after[stage],
                f"model.embed_dims: stages {stage + 1} and {stage + 2} have {dim} and {next_dim} channels, but only "
                f"a downsample changes the width, and model.downsample_after is false for stage {stage + 1}",
            )

    @property
    def has_token_head(self) -> bool:
        return self.return_dense and not self.return_mean

    @property
    def mix_ratio(self) -> int:
        """Cells of the first grid along one side of a final token."""
        return 2 ** sum(self.downsample_after)

    def stage_grids(self, img_size: ImageSize) -> list[tuple[int, int]]:
        """Grid of every stage; the last is the token grid.

        Args:
            img_size: Image side in pixels, or (height, width).

        Raises:
            ValueError: The size does not divide into tokens (the nearest sizes that do are named), or outlook
                windows and grid do not fit each other.
        """
        height, width = image_hw(img_size)
        unit = self.patch_size * self.mix_ratio
        for side, pixels in (("height", height), ("width", width)):
            lower = max(pixels // unit, 1) * unit
            _require(
                pixels >= 1 and pixels % unit == 0,
                f"model.img_size: {side} {pixels} is not divisible by {unit} (patch_size {self.patch_size} x "
                f"downsampling {self.mix_ratio}); the nearest sizes that are: {lower} and {lower + unit}",
            )
        grids = [(height // self.patch_size, width // self.patch_size)]
        for halved in self.downsample_after[:-1]:
            rows, cols = grids[-1]
            grids.append((rows // 2, cols // 2) if halved else (rows, cols))
        for grid, is_outlook in zip(grids, self.outlook_stages, strict=True):
            if is_outlook:
                self._check_windows(grid)
        return grids

    def _check_windows(self, grid: tuple[int, int]) -> None:
        """Attention is predicted from cells pooled by the stride, so there must be one window a pooled cell."""
        kernel, stride, padding = self.outlook_kernel, self.outlook_stride, self.outlook_padding
        windows = tuple((side + 2 * padding - kernel) // stride + 1 for side in grid)
        pooled = tuple(-(-side // stride) for side in grid)
        _require(
            windows == pooled,
            f"model.outlook_padding is {padding}: kernel {kernel} and stride {stride} make "
            f"{windows[0]}x{windows[1]} windows of a {grid[0]}x{grid[1]} grid, but attention is predicted for "
            f"{pooled[0]}x{pooled[1]}. An odd model.outlook_kernel with model.outlook_padding = (kernel - 1) / 2 "
            "always fits",
        )


def image_hw(img_size: ImageSize) -> tuple[int, int]:
    """(height, width) of an image size given as one side or as two."""
    if isinstance(img_size, int):
        return img_size, img_size
    _require(
        len(img_size) == 2 and all(isinstance(side, int) for side in img_size),
        f"model.img_size is {img_size!r}; give one whole number or [height, width]",
    )
    height, width = img_size
    return height, width


# D1 ... D5: table 2 of the paper. The small ones are ours, for 32 x 32 images.
ARCHITECTURES = {
    "volo_d1": Architecture((4, 4, 8, 2), (192, 384, 384, 384), (6, 12, 12, 12), (3, 3, 3, 3)),
    "volo_d2": Architecture((6, 4, 10, 4), (256, 512, 512, 512), (8, 16, 16, 16), (3, 3, 3, 3)),
    "volo_d3": Architecture((8, 8, 16, 4), (256, 512, 512, 512), (8, 16, 16, 16), (3, 3, 3, 3)),
    "volo_d4": Architecture((8, 8, 16, 4), (384, 768, 768, 768), (12, 16, 16, 16), (3, 3, 3, 3)),
    "volo_d5": Architecture((12, 12, 20, 4), (384, 768, 768, 768), (12, 16, 16, 16), (4, 4, 4, 4), stem_hidden_dim=128),
    "volo_tiny": Architecture((2, 2, 2, 1), (96, 192, 192, 192), (3, 6, 6, 6), (3, 3, 3, 3), 4, 32, post_layers=1),
    "volo_nano": Architecture(
        (2, 2, 1, 1), (64, 128, 128, 128), (2, 4, 4, 4), (2.5, 2.5, 2.5, 2.5), 4, 32, post_layers=1
    ),
}


def list_models() -> list[str]:
    """Names that ``create_model`` knows, D1 ... D5 and the small ones."""
    return list(ARCHITECTURES)


def get_architecture(name: str, **changes) -> Architecture:
    """The named architecture, with some of its fields replaced.

    Raises:
        ValueError: Unknown name or field (the nearest valid one is named), or fields that contradict.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"model.name {name!r} is unknown{_nearest(name, ARCHITECTURES)}")
    known = [field.name for field in fields(Architecture)]
    for field in changes:
        if field not in known:
            raise ValueError(f"model.{field} is not a field of the architecture{_nearest(field, known)}")
    return replace(ARCHITECTURES[name], **changes)


def _nearest(given: str, known) -> str:
    close = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
    return (f"; did you mean {' or '.join(close)}?" if close else "") + f" Known: {', '.join(known)}"

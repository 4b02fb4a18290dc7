"""RandAugment (arXiv 1909.13719) as in timm, with every draw explicit.

The operations are those in timm's tables. Which of them an image gets, and with which argument, sign and resampling, is
drawn here from a generator that is passed in; timm draws from the global state of ``random`` and ``numpy.random``. A
drawn :class:`Op` is applied without drawing anything.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

_LEVELS = 10.0  # timm's magnitudes run from 0 to 10
_OPTION = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Op:
    """One operation of timm's table with its arguments.

    Args:
        name: Key of timm's table of operations.
        args: Argument of the operation (degrees, a factor, a threshold, ...); empty if it takes none.
        resample: Resampling of a geometric operation; None for an operation on colours.
    """

    name: str
    args: tuple[float, ...] = ()
    resample: Image.Resampling | None = None

    def apply(self, image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
        """Return the changed image; ``fill`` is the colour of areas that a geometric operation uncovers."""
        if self.name.startswith("Posterize") and self.args[0] <= 0:
            # Keeping 0 bits gives black. Pillow used to do that too; now it refuses.
            return Image.new(image.mode, image.size)
        from timm.data import auto_augment as timm_ops

        geometric = {} if self.resample is None else {"resample": self.resample, "fillcolor": fill}
        return timm_ops.NAME_TO_OP[self.name](image, *self.args, **geometric)


@dataclass(frozen=True)
class RandAugment:
    """The distribution that operations are drawn from.

    Args:
        names: The operations.
        magnitude: Mean magnitude, in [0, 10].
        magnitude_std: Standard deviation of the magnitude; infinity draws it uniformly from 0 to ``magnitude``.
        magnitude_max: Magnitudes are clipped to [0, magnitude_max].
        num_ops: Operations per image.
        prob: Probability that a drawn operation is applied.
        weights: Probability of each of ``names``, which are then drawn without replacement, as timm draws them; None
            if they are equally likely, and drawn with replacement.
    """

    names: tuple[str, ...]
    magnitude: float
    magnitude_std: float
    magnitude_max: float
    num_ops: int
    prob: float
    weights: tuple[float, ...] | None = None

    def draw(self, rng: np.random.Generator, resamples: tuple[Image.Resampling, ...]) -> tuple[Op, ...]:
        """Draw the operations of one image, in order; those not applied are left out."""
        if self.weights is None:
            choices = rng.integers(len(self.names), size=self.num_ops)
        else:
            choices = rng.choice(len(self.names), size=self.num_ops, replace=False, p=self.weights)
        return tuple(
            self._draw_op(rng, self.names[choice], resamples) for choice in choices if rng.random() < self.prob
        )

    def _draw_op(self, rng: np.random.Generator, name: str, resamples: tuple[Image.Resampling, ...]) -> Op:
        if np.isinf(self.magnitude_std):
            magnitude = rng.uniform(0, self.magnitude)
        else:
            magnitude = rng.normal(self.magnitude, self.magnitude_std)
        magnitude = min(max(magnitude, 0.0), self.magnitude_max)
        sign = 1 if rng.random() < 0.5 else -1
        resample = resamples[rng.integers(len(resamples))]
        argument = _ARGUMENT[name]
        args = () if argument is None else (argument(magnitude / _LEVELS, sign),)
        return Op(name, args, resample if name in _GEOMETRIC else None)


def parse_rand_augment(text: str) -> RandAugment | None:
    """Read timm's notation, such as 'rand-m9-mstd0.5-inc1'; None for 'none'.

    After 'rand', in any order and each at most once, with these defaults: m (magnitude, 10), n (operations per image,
    2), p (probability of each, 0.5), mstd (standard deviation of the magnitude, 0; above 100 the magnitude is uniform
    from 0 to m), mmax (largest magnitude, 10), inc (0; 1 selects the variants that get stronger with the magnitude);
    or, instead of inc, tweights (timm's weighted set, in which nine in ten operations are geometric).

    Raises:
        ValueError: The text is not valid; timm ignores some misspellings.
    """
    if text == "none":
        return None
    variant, *sections = text.split("-")
    values: dict[str, float] = {}
    weighted = "tweights" in sections
    if weighted:
        sections.remove("tweights")
    for section in sections:
        match = _OPTION.fullmatch(section)
        if match is None or match[1] in values or (match[1] in ("m", "n", "mmax", "inc") and "." in match[2]):
            raise _refused(text, f"{section!r} is unknown or given twice")
        values[match[1]] = float(match[2])
    if variant != "rand":
        raise _refused(text, "it must begin with 'rand'")
    if values.get("inc", 0) not in (0, 1):
        raise _refused(text, "inc must be 0 or 1")
    if weighted and "inc" in values:
        raise _refused(text, "tweights and inc exclude each other")
    if weighted and values.get("n", 2) > 15:
        raise _refused(text, "tweights draws without replacement from 15 operations, so n must be at most 15")
    if values.get("n", 2) < 1 or values.get("p", 0.5) > 1 or values.get("mmax", _LEVELS) < 1:
        raise _refused(text, "n and mmax must be at least 1, p at most 1")

    from timm.data import auto_augment as timm_ops  # takes seconds to import, and evaluation does not need it

    std = values.get("mstd", 0.0)
    names = timm_ops._RAND_INCREASING_TRANSFORMS if values.get("inc") else timm_ops._RAND_TRANSFORMS
    weights = None
    if weighted:
        names, weights = zip(*timm_ops._RAND_WEIGHTED_0.items(), strict=True)
        weights = tuple(weight / sum(weights) for weight in weights)
    assert set(names) <= set(_ARGUMENT), "this timm has operations that are not known here"
    return RandAugment(
        names=tuple(names),
        magnitude=values.get("m", _LEVELS),
        magnitude_std=float("inf") if std > 100 else std,
        magnitude_max=values.get("mmax", _LEVELS),
        num_ops=int(values.get("n", 2)),
        prob=values.get("p", 0.5),
        weights=weights,
    )


def _refused(text: str, reason: str) -> ValueError:
    return ValueError(
        f"augment.rand_augment is {text!r}: {reason}. Give 'none' or timm's notation with m, n, p, mstd, mmax, inc "
        "and tweights, such as 'rand-m9-mstd0.5-inc1'"
    )


# The argument of each operation, from level = magnitude / 10 and a drawn sign.
_ARGUMENT: dict[str, Callable[[float, int], float] | None] = {
    "AutoContrast": None,
    "Equalize": None,
    "Invert": None,
    "Rotate": lambda level, sign: sign * level * 30,  # degrees
    "ShearX": lambda level, sign: sign * level * 0.3,
    "ShearY": lambda level, sign: sign * level * 0.3,
    "TranslateXRel": lambda level, sign: sign * level * 0.45,  # of the width
    "TranslateYRel": lambda level, sign: sign * level * 0.45,  # of the height
    "Posterize": lambda level, sign: int(level * 4),  # bits kept
    "PosterizeIncreasing": lambda level, sign: 4 - int(level * 4),
    "Solarize": lambda level, sign: min(256, int(level * 256)),  # values from this one on are inverted
    "SolarizeIncreasing": lambda level, sign: 256 - min(256, int(level * 256)),
    "SolarizeAdd": lambda level, sign: min(128, int(level * 110)),  # added to values below 128
}
for _name in ("Color", "Contrast", "Brightness", "Sharpness"):
    _ARGUMENT[_name] = lambda level, sign: level * 1.8 + 0.1  # 1 leaves the image as it is
    _ARGUMENT[_name + "Increasing"] = lambda level, sign: max(0.1, 1.0 + sign * level * 0.9)

_GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}

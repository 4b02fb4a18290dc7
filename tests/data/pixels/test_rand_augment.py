"""RandAugment against timm: the same pixels, and the same distribution of operations and arguments."""

import collections
import random

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp
from timm.data import auto_augment as timm_ops

from volo.config import AugmentConfig
from volo.data.pixels.rand_augment import _ARGUMENT, _GEOMETRIC, Op, parse_rand_augment

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
FILL = (124, 116, 104)
PUBLISHED = AugmentConfig().rand_augment
ALL_NAMES = sorted({*timm_ops._RAND_TRANSFORMS, *timm_ops._RAND_INCREASING_TRANSFORMS})


class Fixed:
    """A generator with a fixed magnitude, sign and choice."""

    def __init__(self, magnitude: float, sign: int, choice: int):
        self.magnitude, self.sign, self.choice = magnitude, sign, choice

    def normal(self, mean, std):
        return self.magnitude

    def random(self):
        return 0.25 if self.sign > 0 else 0.75

    def integers(self, high):
        return self.choice


def timm_apply(name: str, image: Image.Image, magnitude: float, sign: int, resample, monkeypatch) -> Image.Image:
    monkeypatch.setattr(timm_ops, "_randomly_negate", lambda value: sign * value)
    hparams = {"img_mean": FILL, "interpolation": resample}
    return timm_ops.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)(image)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_operation_has_timms_pixels(make_picture, monkeypatch, name):
    image = make_picture(3, 41, 33)
    policy = parse_rand_augment(PUBLISHED)
    for magnitude in (0.0, 0.3, 4.9, 8.7, 9.999):
        for sign in (1, -1):
            for choice, resample in enumerate((BILINEAR, BICUBIC)):
                op = policy._draw_op(Fixed(magnitude, sign, choice), name, (BILINEAR, BICUBIC))
                assert op.resample == (resample if name in _GEOMETRIC else None)
                ours = np.asarray(op.apply(image, FILL))
                if name.startswith("Posterize") and op.args[0] == 0:
                    assert not ours.any()
                    continue
                theirs = timm_apply(name, image, magnitude, sign, resample, monkeypatch)
                np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_arguments_are_timms(monkeypatch, name):
    for magnitude in np.linspace(0, 10, 101):
        for sign in (1, -1):
            monkeypatch.setattr(timm_ops, "_randomly_negate", lambda value, sign=sign: sign * value)
            level_fn = timm_ops.LEVEL_TO_ARG[name]
            theirs = level_fn(magnitude, {}) if level_fn else ()
            ours = (_ARGUMENT[name](magnitude / 10, sign),) if _ARGUMENT[name] else ()
            assert ours == pytest.approx(theirs, rel=1e-15, abs=0)


def test_posterize_to_no_bits_is_black(make_picture):
    image = make_picture(0)
    for bits in (0, -1):  # mmax above 10 gives negative numbers
        assert not np.asarray(Op("PosterizeIncreasing", (bits,)).apply(image, FILL)).any()


def test_the_published_recipe_never_raises(make_picture):
    policy, rng = parse_rand_augment(PUBLISHED), np.random.default_rng(0)
    images = [make_picture(i, 12 + i, 20 - i) for i in range(8)]
    zero_bits = 0
    for i in range(4000):
        image = images[i % 8]
        for op in policy.draw(rng, (BILINEAR, BICUBIC)):
            zero_bits += op == Op("PosterizeIncreasing", (0,))
            image = op.apply(image, FILL)
        assert image.size == images[i % 8].size and image.mode == "RGB"
    assert zero_bits > 0  # timm raises here with this Pillow


def test_frequencies():
    policy, rng, count = parse_rand_augment(PUBLISHED), np.random.default_rng(1), 10_000
    plans = [policy.draw(rng, (BILINEAR, BICUBIC)) for _ in range(count)]
    lengths = collections.Counter(map(len, plans))
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert abs(lengths[number] / count - share) < 0.02
    ops = [op for plan in plans for op in plan]
    names = collections.Counter(op.name for op in ops)
    assert set(names) == set(timm_ops._RAND_INCREASING_TRANSFORMS)
    expected = len(ops) / len(names)
    assert sum((n - expected) ** 2 / expected for n in names.values()) < 42.6  # chi squared, 14 d.o.f., 1e-4
    # Drawn with replacement: an operation can occur twice in a plan.
    assert any(len(plan) == 2 and plan[0].name == plan[1].name for plan in plans)
    geometric = [op.resample for op in ops if op.name in _GEOMETRIC]
    assert abs(geometric.count(BICUBIC) / len(geometric) - 0.5) < 0.05
    assert all(op.resample is None for op in ops if op.name not in _GEOMETRIC)


@pytest.mark.parametrize("text", [PUBLISHED, "rand-m4-mstd1-n3-tweights"])
def test_operations_and_arguments_have_timms_distribution(monkeypatch, text):
    """Compared, for each operation, with the arguments that timm passes to its pixel functions."""
    random.seed(0)
    np.random.seed(0)
    theirs, image = collections.defaultdict(list), Image.new("RGB", (4, 4))
    for name in timm_ops._RAND_INCREASING_TRANSFORMS:
        recorded = theirs[name]
        monkeypatch.setitem(
            timm_ops.NAME_TO_OP, name, lambda image, *args, recorded=recorded, **_: recorded.append(args) or image
        )
    transform = timm_ops.rand_augment_transform(text, {"img_mean": FILL})
    for _ in range(6000):
        transform(image)
    policy, rng = parse_rand_augment(text), np.random.default_rng(0)
    ours = collections.defaultdict(list)
    for _ in range(6000):
        for op in policy.draw(rng, (BILINEAR, BICUBIC)):
            ours[op.name].append(op.args)
    for name, drawn in theirs.items():
        assert abs(len(ours[name]) - len(drawn)) < 5 * np.sqrt(2 * len(drawn)) + 5, name
        if drawn and drawn[0]:
            a, b = np.array(ours[name])[:, 0], np.array(drawn)[:, 0]
            assert ks_2samp(a, b).pvalue > 1e-4, name


def test_only_the_given_generator_is_used():
    policy = parse_rand_augment("rand-m9-mstd0.5-n4")
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    draws = [policy.draw(np.random.default_rng(7), (BILINEAR, BICUBIC)) for _ in range(2)]
    assert draws[0] == draws[1] and len(draws[0]) > 0
    for op in draws[0]:
        op.apply(Image.new("RGB", (9, 9)), FILL)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize(
    "text",
    [
        "rand",
        PUBLISHED,
        "rand-m9-mstd0.5-inc0",
        "rand-n3-p0.7-m4",
        "rand-mmax15-m12-mstd101",
        "rand-inc1-p1-m0",
        "rand-tweights-m3-n15",
    ],
)  # fmt: skip
def test_notation_is_read_as_in_timm(text):
    reference = timm_ops.rand_augment_transform(text, {"img_mean": FILL})
    op = reference.ops[0]
    policy = parse_rand_augment(text)
    assert list(policy.names) == [op.name for op in reference.ops]
    assert (policy.magnitude, policy.magnitude_std) == (op.magnitude, op.magnitude_std)
    assert policy.magnitude_max == (op.magnitude_max or 10)
    assert (policy.num_ops, policy.prob) == (reference.num_layers, op.prob)
    weights = None if reference.choice_weights is None else list(reference.choice_weights)
    assert policy.weights == (weights if weights is None else pytest.approx(weights))


def test_uniform_magnitudes():
    policy, rng = parse_rand_augment("rand-m8-mstd101-p1"), np.random.default_rng(0)
    ops = [op for _ in range(4000) for op in policy.draw(rng, (BICUBIC,)) if op.name == "Rotate"]
    magnitudes = np.abs([op.args[0] for op in ops]) / 3
    assert magnitudes.max() < 8 and magnitudes.mean() == pytest.approx(4, abs=0.4)


@pytest.mark.parametrize(
    "text",
    [
        "", "None", "augmix-m5", "original", "rand-m9-inc2", "rand-m9.5", "rand-mstd", "rand-x3", "rand-m9-m8",
        "rand-n0", "rand-p2", "rand-tweights-inc1", "rand-tweights-n16", "rand-t3a", "rand-m-9",
        "rand-mmax0", "rand-m9-", "randm9",
    ],
)  # fmt: skip
def test_other_notation_is_refused(text):
    with pytest.raises(ValueError, match="augment.rand_augment is .*rand-m9-mstd0.5-inc1"):
        parse_rand_augment(text)


def test_none_is_off():
    assert parse_rand_augment("none") is None

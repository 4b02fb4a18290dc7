"""D1 ... D5 against timm's independent implementation: keys, order, shapes, logits, feature maps."""

import pytest
import timm
import torch

from volo.models import create_model

# Parameters at every published resolution, as in the published tables.
PARAMETERS = {
    ("volo_d1", 224): 26_632_040,
    ("volo_d1", 384): 26_777_960,
    ("volo_d2", 224): 58_678_336,
    ("volo_d2", 384): 58_872_896,
    ("volo_d3", 224): 86_325_072,
    ("volo_d3", 448): 86_626_128,
    ("volo_d4", 224): 192_961_520,
    ("volo_d4", 448): 193_413_104,
    ("volo_d5", 224): 295_455_584,
    ("volo_d5", 448): 295_907_168,
    ("volo_d5", 512): 296_091_488,
}
NAMES = ["volo_d1", *(pytest.param(f"volo_d{n}", marks=pytest.mark.slow) for n in (2, 3, 4, 5))]


@pytest.fixture(autouse=True)
def the_same_images_each_time():
    torch.manual_seed(0)


def twins(name, random_state, img_size=224, **options):
    """Our model and timm's, on one set of random weights, in evaluation mode; the weights are shared memory."""
    with torch.device("meta"):
        ours = create_model(name, img_size=img_size, **options)
        theirs = timm.create_model(f"{name}_224", img_size=img_size, **options)
    state = random_state(theirs.state_dict())
    for model in (ours, theirs):
        model.load_state_dict(state, assign=True)
        model.eval()
    return ours, theirs


@pytest.mark.parametrize("name", NAMES)
def test_keys_order_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(f"{name}_224")
    shapes = [[(k, v.shape, v.dtype) for k, v in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    parameters = [[k for k, _ in m.named_parameters()] for m in (ours, theirs)]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize(("name", "img_size"), PARAMETERS)
def test_parameter_counts(name, img_size):
    with torch.device("meta"):
        model = create_model(name, img_size=img_size)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, img_size]
    assert model.grid_size == (img_size // 16, img_size // 16)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_logits_at_224(name, random_state):
    ours, theirs = twins(name, random_state)
    images = torch.randn(1, 3, 224, 224)
    expected = theirs(images)
    assert expected.std() > 0.5  # the logits are no constant that anything would match
    for kernel in ("eager", "native"):
        ours.set_kernel(kernel)
        assert (ours(images) - expected).abs().max() < 1e-5, kernel


@pytest.mark.slow
@torch.inference_mode()
def test_d1_at_384(random_state):
    ours, theirs = twins("volo_d1", random_state, img_size=384)
    images = torch.randn(1, 3, 384, 384)
    assert (ours(images) - theirs(images)).abs().max() < 1e-5


@pytest.mark.slow
@torch.inference_mode()
def test_d1_at_a_size_that_is_not_square(random_state):
    ours, theirs = twins("volo_d1", random_state, img_size=(160, 112), num_classes=11, in_chans=1)
    images = torch.randn(1, 1, 160, 112)
    assert ours.grid_size == (10, 7)
    assert ours.pos_embed.shape == (1, 10, 7, 384)
    assert ours.forward_features(images).shape == (1, 1 + 70, 384)
    fine, coarse = ours.forward_intermediates(images)
    assert fine.shape == (1, 192, 20, 14)
    assert coarse.shape == (1, 384, 10, 7)
    expected = theirs(images)
    for kernel in ("eager", "native"):
        ours.set_kernel(kernel)
        assert (ours(images) - expected).abs().max() < 1e-5, kernel


@torch.inference_mode()
def test_features_and_intermediates(random_state):
    ours, theirs = twins("volo_d1", random_state, img_size=(64, 96))
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images))
    maps = theirs.forward_intermediates(images, intermediates_only=True)  # one for each of the four stages
    fine, coarse = ours.forward_intermediates(images)
    # Un-normalised, with values up to 50: the folded stem rounds otherwise.
    torch.testing.assert_close(fine, maps[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(coarse, maps[3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": True},
        {"patch_size": 4, "post_layers": 1},
        {"outlook_stages": (False, False, False)},
        {"outlook_stages": (True, True, False)},
    ],
)
@torch.inference_mode()
def test_ablations(fields, make_small):
    """Other architectures than D1 ... D5, odd grids among them (48 pixels are 3 tokens of 16)."""
    ours = make_small((48, 80), **fields).eval()
    arch = ours.architecture
    theirs = timm.models.volo.VOLO(
        layers=arch.layers,
        img_size=(48, 80),
        num_classes=7,
        patch_size=arch.patch_size,
        stem_hidden_dim=arch.stem_hidden_dim,
        embed_dims=arch.embed_dims,
        num_heads=arch.num_heads,
        mlp_ratio=arch.mlp_ratios,
        downsamples=arch.downsample_after,
        outlook_attention=arch.outlook_stages,
        qkv_bias=arch.qkv_bias,
        post_layers=("ca",) * arch.post_layers,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 48, 80)
    for kernel in ("eager", "native"):
        ours.set_kernel(kernel)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)

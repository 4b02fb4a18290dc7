"""Models by name and architectures by field: what is allowed, and what an error says."""

import pytest
import torch

import volo
from volo.models import VOLO, Architecture, create_model, get_architecture, list_models

FOUR = {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (2, 4, 4, 4), "mlp_ratios": (3,) * 4}


def test_names():
    assert list_models()[:5] == ["volo_d1", "volo_d2", "volo_d3", "volo_d4", "volo_d5"]
    assert {"volo_tiny", "volo_nano"} <= set(list_models())
    assert volo.create_model is create_model


@pytest.mark.parametrize(("name", "low", "high"), [("volo_tiny", 2e6, 4e6), ("volo_nano", 0.85e6, 0.95e6)])
def test_small_models_on_small_images(name, low, high):
    model = create_model(name, img_size=32, num_classes=10)
    assert low < sum(p.numel() for p in model.parameters()) < high
    assert model.grid_size == (4, 4)
    out = model(torch.randn(2, 3, 32, 32))
    assert out.tokens.shape == (2, 16, 10)


def test_unknown_name_and_field_name_the_nearest():
    with pytest.raises(ValueError, match="'volo_d11' is unknown; did you mean volo_d1"):
        create_model("volo_d11")
    with pytest.raises(ValueError, match="'resnet50' is unknown.*Known: volo_d1, volo_d2"):
        create_model("resnet50")
    with pytest.raises(ValueError, match="model.embed_dim .*did you mean embed_dims"):
        create_model("volo_d1", embed_dim=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="model.zzz .*layers, embed_dims"):
        get_architecture("volo_d1", zzz=1)


def test_fields_may_be_lists_as_yaml_gives_them():
    arch = Architecture(**{key: list(value) for key, value in FOUR.items()}, outlook_stages=[True, False, False, False])
    assert arch == Architecture(**FOUR)
    assert hash(arch) == hash(Architecture(**FOUR))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 1)}, "model.embed_dims has 4 entries, but model.layers has 2"),
        ({"layers": 4}, "model.layers is 4; give a list"),
        ({"layers": (4,)}, "at least 2 stages"),
        ({"layers": (1, 0, 1, 1)}, r"model.layers is \[1, 0, 1, 1\]; every entry is above 0"),
        ({"mlp_ratios": (3, 3, 3, 0)}, "model.mlp_ratios"),
        ({"num_heads": (3, 4, 4, 4)}, "3 heads do not divide the 8 channels of stage 1"),
        ({"embed_dims": (8, 16, 32, 32)}, "stages 2 and 3 have 16 and 32 channels.*false for stage 2"),
        ({"downsample_after": (True, False, False, True)}, "true for the last stage"),
        ({"outlook_stages": (True, False)}, "model.outlook_stages has 2 entries"),
        ({"patch_size": 7}, "model.patch_size is 7; it is even"),
        ({"patch_size": 0}, "model.patch_size is 0"),
        ({"stem_hidden_dim": 0}, "model.stem_hidden_dim is 0"),
        ({"outlook_padding": -1}, "model.outlook_padding is -1"),
        ({"outlook_stride": 4}, r"model.outlook_stride \(4\) is above model.outlook_kernel \(3\)"),
        ({"post_layers": 0}, "model.post_layers is 0.*model.return_mean"),
        ({"drop_rate": 1.0}, "model.drop_rate is 1.0"),
        ({"attn_drop_rate": -0.1}, "model.attn_drop_rate is -0.1"),
    ],
)
def test_contradictions_name_the_option(changes, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**(FOUR | changes))


@pytest.mark.parametrize(
    ("img_size", "message"),
    [
        (225, "height 225 is not divisible by 16.*nearest sizes that are: 224 and 240"),
        ((224, 239), "width 239 is not divisible by 16.*224 and 240"),
        (15, "height 15.*16 and 32"),
        (17, "height 17.*16 and 32"),
        (0, "height 0"),
        (-16, "height -16"),
        ((224, 224, 3), "give one whole number or"),
        ((224.0, 224), "give one whole number or"),
    ],
)
def test_sizes_that_do_not_divide(img_size, message):
    with pytest.raises(ValueError, match=message):
        create_model("volo_d1", img_size=img_size)


def test_the_divisor_follows_from_patch_and_downsampling():
    arch = get_architecture("volo_tiny")
    assert arch.stage_grids((24, 40)) == [(6, 10), (3, 5), (3, 5), (3, 5)]
    with pytest.raises(ValueError, match="height 36 is not divisible by 8.*nearest sizes that are: 32 and 40"):
        arch.stage_grids(36)
    flat = get_architecture("volo_tiny", downsample_after=(False,) * 4, embed_dims=(192,) * 4, num_heads=(6,) * 4)
    assert flat.stage_grids(36) == [(9, 9)] * 4


@pytest.mark.parametrize(
    "fields",
    [
        {"outlook_kernel": 5, "outlook_padding": 2},
        {"outlook_kernel": 3, "outlook_stride": 1},
        {"outlook_kernel": 2, "outlook_stride": 2, "outlook_padding": 0},
        {"outlook_kernel": 3, "outlook_stride": 3},
    ],
)
def test_outlook_windows_that_fit(fields):
    model = create_model("volo_tiny", img_size=(32, 24), num_classes=3, **fields).eval()
    assert model(torch.randn(1, 3, 32, 24)).shape == (1, 3)


def test_outlook_windows_that_do_not_fit():
    with pytest.raises(ValueError, match="outlook_padding is 1: kernel 5 and stride 2 make 3x3 windows of a 8x8"):
        create_model("volo_tiny", img_size=32, outlook_kernel=5)


def test_numbers_out_of_range():
    arch = Architecture(**FOUR)
    with pytest.raises(ValueError, match="num_classes is 0"):
        VOLO(arch, num_classes=0)
    with pytest.raises(ValueError, match="model.drop_path_rate is 1.0"):
        create_model("volo_d1", drop_path_rate=1.0)

"""Teachers: what they say of cells, held against their own layers, and what images they are given.

B images, C classes, h x w cells, D channels.
"""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from volo.models import create_model
from volo.token_labels.generation.teacher import Teacher, timm_logits, volo_logits
from volo.token_labels.generation.teacher_factory import make_teacher
from volo.token_labels.generation.teacher_input import TeacherInput

CLASSES = tuple(f"class {i}" for i in range(7))
SMALL_VOLO = {
    "layers": (1, 1),
    "embed_dims": (16, 24),
    "num_heads": (2, 3),
    "mlp_ratios": (3, 3),
    "outlook_stages": (True, False),
    "downsample_after": (True, False),
    "stem_hidden_dim": 8,
}


def randomise(model: nn.Module) -> nn.Module:
    """Give every weight and statistic a value of its own, in float64."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else tensor + 0.05 * noise)
    return model.double().eval()


def cells_and_image(model: nn.Module, images: torch.Tensor, classify=timm_logits):
    teacher = Teacher("it", model, classify, 7, TeacherInput(images.shape[-2:], False, 1, "bicubic"))
    return teacher(images)


def random_images(*hw: int) -> torch.Tensor:
    return torch.randn(3, 3, *hw, generator=torch.Generator().manual_seed(1)).double()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "fc"), ("test_efficientnet", "classifier")])
def test_a_cnn_is_its_classifier_as_a_1x1_convolution_and_the_mean_of_its_cells_is_its_prediction(name, layer):
    model = randomise(timm.create_model(name, num_classes=7))
    images = random_images(96, 160)
    cells, image = cells_and_image(model, images)
    linear = getattr(model, layer)
    with torch.no_grad():
        convolved = F.conv2d(model.forward_features(images), linear.weight[:, :, None, None], linear.bias)
        close(cells, convolved.permute(0, 2, 3, 1))
        close(cells.mean((1, 2)), model(images))
        close(image, model(images))
    assert cells.shape == (3, 3, 5, 7)


def test_a_norm_behind_the_pooling_is_applied_to_each_cell():
    model = randomise(timm.create_model("test_convnext", num_classes=7))
    images = random_images(96, 64)
    cells, image = cells_and_image(model, images)
    with torch.no_grad():
        features = model.forward_features(images).permute(0, 2, 3, 1)  # [B, h, w, D]
        norm, linear = model.head.norm, model.head.fc
        normed = F.layer_norm(features, features.shape[-1:], norm.weight, norm.bias, norm.eps)
        close(cells, linear(normed))
        close(image, model(images))


def test_tokens_of_a_vit_with_mean_pooling_average_to_its_prediction():
    model = randomise(timm.create_model("test_vit", num_classes=7, img_size=(48, 80), global_pool="avg", fc_norm=False))
    images = random_images(48, 80)
    cells, image = cells_and_image(model, images)
    with torch.no_grad():
        close(cells.mean((1, 2)), model(images))
        close(image, model(images))
    assert cells.shape == (3, 3, 5, 7)


def test_tokens_of_a_vit_with_a_class_token_go_through_its_head():
    model = randomise(timm.create_model("test_vit", num_classes=7, img_size=(48, 80)))
    images = random_images(48, 80)
    cells, image = cells_and_image(model, images)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 1:]
        close(cells, model.head(tokens).reshape(3, 3, 5, 7))
        close(image, model(images))


def test_a_token_goes_through_both_heads_of_a_distilled_model():
    sizes = {"patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = randomise(VisionTransformerDistilled(img_size=(48, 80), num_classes=7, **sizes))
    images = random_images(48, 80)
    cells, image = cells_and_image(model, images)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 2:]
        close(cells, ((model.head(tokens) + model.head_dist(tokens)) / 2).reshape(3, 3, 5, 7))
        close(image, model(images))


def test_a_model_with_channels_last_features():
    sizes = {"patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    model = randomise(SwinTransformer(img_size=(16, 32), num_classes=7, **sizes))
    images = random_images(16, 32)
    cells, image = cells_and_image(model, images)
    with torch.no_grad():
        close(cells, model.head.fc(model.forward_features(images)))
        close(cells.mean((1, 2)), model(images))
    assert cells.shape == (3, 4, 8, 7)


def test_volo_labels_by_its_token_head():
    model = randomise(create_model("volo_d1", img_size=(32, 48), num_classes=7, **SMALL_VOLO))
    images = random_images(32, 48)
    cells, image = cells_and_image(model, images, volo_logits)
    with torch.no_grad():
        close(image, model(images))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        cls, tokens = model(images)
    close(cells, tokens.reshape(3, 2, 3, 7))
    close(image, cls + 0.5 * cells.flatten(1, 2).amax(1))


@pytest.mark.parametrize("fields", [{"return_mean": True}, {"return_dense": False}])
def test_a_volo_without_token_head_labels_by_its_head(fields):
    model = randomise(create_model("volo_d1", img_size=32, num_classes=7, **SMALL_VOLO, **fields))
    images = random_images(32, 32)
    cells, image = cells_and_image(model, images, volo_logits)
    with torch.no_grad():
        features = model.forward_features(images)
        close(cells, model.head(features[:, -4:]).reshape(3, 2, 2, 7))
        close(image, model(images))
    if "return_mean" in fields:
        close(cells.mean((1, 2)), image)


def test_timms_volo_gives_the_same_cells_as_ours():
    ours = randomise(create_model("volo_d1", img_size=32, num_classes=7, **SMALL_VOLO))
    fields = {name: value for name, value in SMALL_VOLO.items() if not name.startswith(("outlook", "down", "mlp"))}
    switches = {"outlook_attention": (True, False), "downsamples": (True, False)}
    theirs = timm.models.volo.VOLO(img_size=32, num_classes=7, **fields, **switches).double().eval()
    theirs.load_state_dict(ours.state_dict())
    images = random_images(32, 32)
    for a, b in zip(cells_and_image(ours, images, volo_logits), cells_and_image(theirs, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "message"),
    [("coat_tiny", "no single feature map"), ("pit_ti_224", "no grid"), ("test_resnet", "one cell")],
)
def test_a_teacher_without_a_map_is_refused(name, message):
    size = (32, 32) if name == "test_resnet" else None
    teacher = make_teacher(f"timm:{name}", CLASSES, random_weights=True, image_hw=size)
    with pytest.raises(ValueError, match=message):
        teacher.check(torch.device("cpu"))


def test_the_input_is_that_of_the_teachers_configuration():
    cnn = make_teacher("timm:dm_nfnet_f0", CLASSES, random_weights=True)
    assert cnn.input == TeacherInput((256, 256), True, 32, "bicubic")  # the size it is tested at, not trained at
    vit = make_teacher("timm:test_vit", CLASSES, random_weights=True, image_hw=(48, 80))
    assert vit.input == TeacherInput((48, 80), False, 16, "bicubic")
    assert vit.mean == (0.5, 0.5, 0.5)
    assert vit.check(torch.device("cpu")) == (3, 5)


def test_random_weights_are_the_same_each_time_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    teachers = [make_teacher("timm:test_resnet", CLASSES, random_weights=True) for _ in range(2)]
    assert torch.rand(1) == expected
    assert teachers[0].fingerprint() == teachers[1].fingerprint()
    with torch.no_grad():
        next(teachers[1].model.parameters()).view(-1)[0] += 1e-3
    assert teachers[0].fingerprint() != teachers[1].fingerprint()


# ----------------------------------------------------------------------------------------------------- the images


@given(st.integers(8, 3000), st.integers(8, 3000), st.sampled_from([(224, 16), (576, 32), (96, 32)]))
def test_the_input_for_a_whole_image_has_its_aspect_and_the_number_of_pixels_asked_for(height, width, size):
    side, stride = size
    rows, cols = TeacherInput((side, side), True, stride, "bicubic").whole_image_hw(height, width)
    assert rows % stride == 0 and cols % stride == 0 and rows > 0 and cols > 0
    aspect = min(max(width / height, 0.25), 4)
    # Each side is rounded to a whole cell.
    assert abs(rows - side / math.sqrt(aspect)) <= stride / 2 + 1e-9 or rows == stride
    assert abs(cols - side * math.sqrt(aspect)) <= stride / 2 + 1e-9 or cols == stride


def test_a_square_image_gets_exactly_the_size_asked_for():
    assert TeacherInput((576, 576), True, 32, "bicubic").whole_image_hw(500, 500) == (576, 576)
    assert TeacherInput((576, 576), False, 32, "bicubic").whole_image_hw(375, 500) == (576, 576)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(50, 37), (37, 50), (40, 40), (31, 33), (200, 21)])
def test_center_crop_is_pillows_resize_and_centre_crop(width, height):
    side = 32
    shorter = min(width, height)
    scaled = (
        side if width == shorter else side * width // height,
        side if height == shorter else side * height // width,
    )
    resized = noise(width, height).resize(scaled, Image.Resampling.BICUBIC)
    left, top = (int(round((length - side) / 2)) for length in scaled)
    expected = np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
    given_size = TeacherInput((side, side), True, 16, "bicubic")
    np.testing.assert_array_equal(given_size.prepare(noise(width, height), "center_crop"), expected)


def test_the_whole_image_is_resized_and_nothing_is_cut_off():
    given_size = TeacherInput((32, 32), True, 8, "bilinear")
    expected = noise(60, 30).resize((48, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        given_size.prepare(noise(60, 30), "whole_image"), np.asarray(expected).transpose(2, 0, 1)
    )

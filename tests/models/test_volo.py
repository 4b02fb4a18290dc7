"""The network itself: outputs in both modes, MixToken, initialisation, decay, stochastic depth, compilation."""

import pytest
import torch
import torch._dynamo
from timm.optim import param_groups_weight_decay
from torch import nn
from torch._dynamo.testing import CompileCounter

from volo.models import TokenLogits, create_model


def freeze_statistics(model):
    """Training mode with the BatchNorms of evaluation, so that one image does not change another's features."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def box_of(*sides):
    return torch.tensor(sides)


# --- outputs ---------------------------------------------------------------------------------------------


def test_evaluation_is_class_logits_plus_half_the_largest_token_logits(make_small):
    model, images = make_small(), torch.randn(3, 3, 32, 32)
    cls, tokens = freeze_statistics(model)(images)
    assert cls.shape == (3, 7)
    assert tokens.shape == (3, 4, 7)
    torch.testing.assert_close(model.eval()(images), cls + 0.5 * tokens.max(dim=1).values)


def test_logits_are_the_heads_of_the_features(make_small):
    model, images = make_small(), torch.randn(2, 3, 32, 32)
    cls, tokens = freeze_statistics(model)(images)
    features = model.forward_features(images)
    torch.testing.assert_close(cls, model.head(features[:, 0]))
    torch.testing.assert_close(tokens, model.aux_head(features[:, 1:]))


def test_without_token_head(make_small):
    model, images = make_small(return_dense=False), torch.randn(2, 3, 32, 32)
    assert not [key for key in model.state_dict() if key.startswith("aux_head")]
    out = freeze_statistics(model)(images, box_of(0, 0, 1, 1))
    assert isinstance(out, TokenLogits)
    assert out.tokens is None
    torch.testing.assert_close(freeze_statistics(model)(images).cls, model.eval()(images))


def test_mean_of_tokens_instead_of_class_token(make_small):
    model, images = make_small(return_mean=True), torch.randn(2, 3, 32, 32)
    assert not [k for k in model.state_dict() if k.startswith(("cls_token", "post_network", "aux_head"))]
    out = freeze_statistics(model)(images)
    assert out.tokens is None
    features = model.forward_features(images)
    assert features.shape == (2, 4, 24)
    torch.testing.assert_close(out.cls, model.head(features.mean(1)))
    torch.testing.assert_close(model.eval()(images), out.cls)
    assert model.no_weight_decay() == {"pos_embed"}


def test_every_parameter_gets_a_gradient(make_small):
    model = make_small(qkv_bias=True)
    cls, tokens = model.train()(torch.randn(3, 3, 32, 32), box_of(0, 0, 2, 1))
    (cls.square().sum() + tokens.square().sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_class_logits_alone_and_token_logits_alone_reach_the_stem(make_small):
    for part in (0, 1):
        model = make_small()
        model.train()(torch.randn(2, 3, 32, 32))[part].square().sum().backward()
        assert model.patch_embed.conv[0].weight.grad.abs().sum() > 0


def test_downsampling_more_than_once():
    model = create_model(
        "volo_d1",
        img_size=(96, 64),
        num_classes=5,
        layers=(1, 1, 1),
        embed_dims=(8, 16, 32),
        num_heads=(1, 2, 4),
        mlp_ratios=(2, 2, 2),
        outlook_stages=(True, True, False),
        downsample_after=(True, True, False),
    )
    images = torch.randn(2, 3, 96, 64)
    assert model.grid_size == (3, 2)  # 8 pixels a patch, halved twice
    assert model.pos_embed.shape == (1, 6, 4, 16)  # after the first stage and its downsample
    assert [m.shape[1:] for m in model.forward_intermediates(images)] == [(8, 12, 8), (16, 6, 4), (32, 3, 2)]
    assert model(images, box_of(0, 0, 3, 1)).tokens.shape == (2, 6, 5)


@pytest.mark.parametrize("downsample", [True, False])
def test_position_embedding_follows_the_first_stage_and_its_downsample(downsample, make_small):
    dims = {} if downsample else {"embed_dims": (24, 24, 24), "num_heads": (3, 3, 3)}
    model = make_small(downsample_after=(downsample, False, False), **dims).eval()
    seen = []
    model.network[1 + downsample].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(2, 3, 32, 32)
    model(images)
    x = model.patch_embed(images)
    for stage in model.network[: 1 + downsample]:
        x = stage(x)
    torch.testing.assert_close(seen[0], x + model.pos_embed)


def test_bfloat16_autocast(make_small):
    model, images = make_small().train(), torch.randn(4, 3, 32, 32)
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, box_of(0, 0, 0, 0))
    out.cls.sum().backward()
    torch.testing.assert_close(out.cls.float(), exact.cls, atol=0.15, rtol=0.05)


def test_channels_last_images_give_the_same(make_small):
    model, images = make_small().eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), model(images))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_folded_norms_of_evaluation_change_nothing(batch, memory_format, make_small):
    model, images = make_small().eval(), torch.randn(batch, 3, 32, 32)
    stem = model.patch_embed
    as_written = stem.proj(stem.conv(images)).permute(0, 2, 3, 1)  # the layers one after the other
    model, images = model.to(memory_format=memory_format), images.to(memory_format=memory_format)
    folded = stem(images)
    assert folded.is_contiguous()
    torch.testing.assert_close(folded, as_written, rtol=0, atol=1e-5)
    logits = model(images)
    stem.forward = lambda images: as_written
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-4)


def test_folding_keeps_nothing_from_earlier_weights(make_small):
    model, images = make_small().eval(), torch.randn(2, 3, 32, 32)
    before = model(images)
    with torch.no_grad():
        model.patch_embed.conv[1].running_mean += 1
    assert not torch.allclose(model(images), before)


def test_wrong_images_are_refused(make_small):
    model = make_small((32, 48)).eval()
    for shape in [(1, 3, 48, 32), (1, 3, 32, 32), (1, 1, 32, 48), (3, 32, 48)]:
        with pytest.raises(ValueError, match=r"the model takes \[B, 3, 32, 48\].*img_size"):
            model(torch.zeros(shape))
        with pytest.raises(ValueError, match="img_size"):
            model.forward_intermediates(torch.zeros(shape))


# --- MixToken --------------------------------------------------------------------------------------------


def by_slices(model, images, box):
    """The published code's way: copy, assign slices of the flipped batch, flip the token logits back."""
    top, left, bottom, right = box
    x = model.patch_embed(images)
    mixed = x.clone()
    mixed[:, 2 * top : 2 * bottom, 2 * left : 2 * right] = x.flip(0)[:, 2 * top : 2 * bottom, 2 * left : 2 * right]
    x = model.network[1](model.network[0](mixed)) + model.pos_embed
    for stage in model.network[2:]:
        x = stage(x)
    B, H, W, D = x.shape
    x = torch.cat([model.cls_token.expand(B, 1, D), x.reshape(B, H * W, D)], 1)
    for block in model.post_network:
        x = block(x)
    x = model.norm(x)
    tokens = model.aux_head(x[:, 1:]).reshape(B, H, W, -1)
    unmixed = tokens.clone()
    unmixed[:, top:bottom, left:right] = tokens.flip(0)[:, top:bottom, left:right]
    return model.head(x[:, 0]), unmixed.reshape(B, H * W, -1)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (1, 0, 3, 4), (2, 3, 3, 5), (0, 0, 3, 5), (1, 2, 1, 4)])
def test_mixing_equals_slicing(batch, box, make_small):
    model = make_small((48, 80)).train()  # 3 x 5 tokens
    images = torch.randn(batch, 3, 48, 80)
    expected_cls, expected_tokens = by_slices(model, images, box)
    cls, tokens = model(images, torch.tensor(box))
    torch.testing.assert_close(cls, expected_cls)
    torch.testing.assert_close(tokens, expected_tokens)


def test_a_box_of_zeros_mixes_nothing(make_small):
    model, images = make_small().train(), torch.randn(3, 3, 32, 32)
    for ours, plain in zip(model(images, torch.zeros(4, dtype=torch.int64)), model(images), strict=True):
        assert torch.equal(ours, plain)


def test_a_box_over_the_whole_grid_only_flips_the_class_logits(make_small):
    """All embeddings swapped is the batch reversed; un-mixed, every token is again with its own image."""
    model, images = make_small((48, 80)).train(), torch.randn(3, 3, 48, 80)
    plain, swapped = model(images), model(images, box_of(0, 0, 3, 5))
    torch.testing.assert_close(swapped.cls, plain.cls.flip(0))
    torch.testing.assert_close(swapped.tokens, plain.tokens)


def test_batch_of_one_and_the_middle_of_an_odd_batch_mix_with_themselves(make_small):
    model = freeze_statistics(make_small())
    images = torch.randn(3, 3, 32, 32)
    box = box_of(0, 1, 2, 2)
    torch.testing.assert_close(model(images[:1], box).tokens, model(images[:1]).tokens)
    mixed, plain = model(images, box), model(images)
    torch.testing.assert_close(mixed.tokens[1], plain.tokens[1])
    torch.testing.assert_close(mixed.cls[1], plain.cls[1])
    assert (mixed.tokens[0] - plain.tokens[0]).abs().max() > 1e-3


def test_mixing_in_evaluation_or_with_another_shape_is_refused(make_small):
    model, images = make_small(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="mix_box is for training"):
        model.eval()(images, box_of(0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"mix_box is \[2, 4\]"):
        model.train()(images, torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.slow
def test_compiles_once_for_all_boxes(make_small):
    torch._dynamo.reset()
    model, images = make_small(drop_path_rate=0.1).train(), torch.randn(2, 3, 32, 32)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # else eager and compiled draw differently; the rate was there to be built
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for box in [(0, 0, 0, 0), (0, 0, 1, 2), (1, 1, 2, 2), (0, 0, 2, 2)]:
        ours, eager = compiled(images, torch.tensor(box)), model(images, torch.tensor(box))
        torch.testing.assert_close(ours.cls, eager.cls)
        torch.testing.assert_close(ours.tokens, eager.tokens)
        ours.tokens.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_in_whole_with_stochastic_depth_and_in_evaluation(make_small):
    torch._dynamo.reset()
    model, images = make_small(drop_path_rate=0.3, drop_rate=0.1, attn_drop_rate=0.1), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled.train()(images, box_of(0, 0, 1, 1)).cls.isfinite().all()
    torch.testing.assert_close(compiled.eval()(images), model(images))


# --- initialisation, weight decay, stochastic depth ------------------------------------------------------


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("volo_tiny", img_size=64, num_classes=500)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # About 30,000 values or more, so the sample std is within 2 %.
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(module.weight.mean().item()) < 1e-3, name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Conv2d):  # PyTorch's default: uniform within 1/sqrt(fan in)
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    # Cut at an absolute 2, which is 100 standard deviations: nothing is cut.
    assert model.head.weight.abs().max() > 0.06


def test_weights_follow_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(create_model("volo_nano", img_size=32, num_classes=10).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_weight_decay_groups_of_d1():
    with torch.device("meta"):
        model = create_model("volo_d1")
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    exempt, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert (exempt["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert (len(decayed["params"]), sum(p.numel() for p in decayed["params"])) == (93, 26_488_512)
    assert (len(exempt["params"]), sum(p.numel() for p in exempt["params"])) == (158, 143_528)


def drop_path_rates(**options):
    with torch.device("meta"):
        model = create_model("volo_d1", **options)
    rates = []
    for stage in model.network:
        if isinstance(stage, nn.Sequential):
            for block in stage:
                inside = {m.drop_prob for m in block.modules() if hasattr(m, "drop_prob")}
                assert len(inside) == 1
                rates.append(inside.pop())
    assert not [m for m in model.post_network.modules() if getattr(m, "drop_prob", 0)]
    return rates


def test_stochastic_depth_of_d1():
    spared = drop_path_rates(drop_path_rate=0.1)
    assert spared[:4] == [0, 0, 0, 0]
    assert spared[4:] == pytest.approx([0.1 * i / 17 for i in range(4, 18)])
    assert (round(spared[4], 4), spared[-1]) == (0.0235, pytest.approx(0.1))
    everywhere = drop_path_rates(drop_path_rate=0.1, drop_path_outlookers=True)
    assert everywhere == pytest.approx([0.1 * i / 17 for i in range(18)])


def test_stochastic_depth_drops_whole_samples_and_rescales(make_small):
    model = make_small(drop_path_rate=0.5, layers=(1, 1, 1)).train()
    block = model.network[-1][0]  # the last block: rate 0.5
    torch.manual_seed(0)
    x = torch.randn(400, 1, 1, 24)
    attended = x + 2 * block.attn(block.norm1(x))
    kept = {False: 0, True: 0}
    for given, dropped, doubled, out in zip(x, x, attended, block(x), strict=True):
        options = {}
        for attn_kept, middle in ((False, dropped), (True, doubled)):
            options[attn_kept, False] = middle
            options[attn_kept, True] = middle + 2 * block.mlp(block.norm2(middle))
        matches = [key for key, value in options.items() if torch.allclose(out, value, atol=1e-5)]
        assert len(matches) == 1, given
        kept[matches[0][0]] += matches[0][0] == matches[0][1]
    # The two branches draw apart: they agree in half of the samples, 200 +- 10.
    assert 150 < kept[False] + kept[True] < 250


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate"])
def test_dropouts_are_wired(rate, make_small):
    """Every part that should draw does so in training, and evaluation does not change."""
    model, plain = make_small(**{rate: 0.3}), make_small().eval()
    grid, sequence = torch.randn(2, 4, 4, 16), torch.randn(2, 5, 24)
    parts = [
        (model.network[0][0].attn, grid),
        (model.network[2][0].attn, sequence[:, None]),
        (model.post_network[0].attn, sequence),
    ]
    if rate == "drop_rate":
        parts += [(model.pos_drop, grid), (model.network[0][0].mlp, grid), (model.post_network[0].mlp, sequence)]
    for part, x in parts:
        part.train()
        assert not torch.equal(part(x), part(x)), part
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), plain(images))


# --- heads -----------------------------------------------------------------------------------------------


def test_reset_classifier(make_small):
    torch.manual_seed(0)
    model = make_small(num_classes=7).double().eval()
    features = model.forward_features(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    model.reset_classifier(300)
    assert model.num_classes == 300
    for head in (model.head, model.aux_head):
        assert head.weight.shape == (300, 24)
        assert head.weight.dtype == torch.float64
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not head.bias.any()
    images = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    assert model(images).shape == (1, 300)
    torch.testing.assert_close(model.forward_features(images), features)
    without = make_small(return_dense=False)
    without.reset_classifier(3)
    assert without.aux_head is None
    with pytest.raises(ValueError, match="num_classes is 0"):
        model.reset_classifier(0)

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain import model as model_module
from fasttrain.data.dataset import Dataset
from fasttrain.model import (
    BatchNorm2d,
    CompactNet,
    CustomResNet,
    build_model_for,
    mean_flop_per_image,
    multiply_adds,
    training_flop_per_image,
)
from fasttrain.optim import build_optimizer
from fasttrain.recipe import Recipe
from fasttrain.report.network_table import block_shapes, summary


def pixels(count: int) -> torch.Tensor:
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return images.to(memory_format=torch.channels_last)


def test_parameters_are_the_assignments() -> None:
    parameters = [p.numel() for p in CustomResNet().parameters()]
    assert sum(parameters) == 6_573_130


def test_shapes_after_every_block_are_the_assignments() -> None:
    assert block_shapes(CustomResNet()) == [
        ("PrepLayer", (1, 64, 32, 32)),
        ("Layer 1, X", (1, 128, 16, 16)),
        ("Layer 1, R1", (1, 128, 16, 16)),
        ("Layer 1, X + R1", (1, 128, 16, 16)),
        ("Layer 2", (1, 256, 8, 8)),
        ("Layer 3, X", (1, 512, 4, 4)),
        ("Layer 3, R2", (1, 512, 4, 4)),
        ("Layer 3, X + R2", (1, 512, 4, 4)),
        ("Max Pooling", (1, 512, 1, 1)),
        ("Reshape before FC", (1, 512)),
        ("After FC", (1, 10)),
    ]


def test_cost_is_113_8_tflop_an_epoch() -> None:
    assert multiply_adds(CustomResNet()) == 379_261_952
    assert training_flop_per_image(CustomResNet()) * 50_000 == pytest.approx(113.8e12, rel=1e-3)


def test_summary_shows_the_assignments_totals_and_leaves_model_and_rng_alone() -> None:
    model = CustomResNet()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    text = summary(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    for line in (
        "Total params: 6,573,130",
        "Trainable params: 6,573,130",
        "Total mult-adds (M): 379.27",
        "Forward/backward pass size (MB): 4.65",
        "Params size (MB): 26.29",
        "Estimated Total Size (MB): 30.96",
        "Mult-adds per image, forward: 379,261,952",
        "Training FLOP per image: 2.276 G",
        "Training FLOP per epoch of 50,000 images: 113.8 T",
    ):
        assert line in text
    for column in ("Input Shape", "Kernel Shape", "Output Shape", "Param #", "Trainable"):
        assert column in text
    assert "Units." not in text


def test_dropout_modules_stay_at_rate_zero_and_take_the_recipes_rate() -> None:
    rates = [m.p for m in CustomResNet(dropout=0.1).modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.1] * 8
    assert len([m for m in CustomResNet().modules() if isinstance(m, nn.Dropout)]) == 8


def test_weights_and_activations_are_channels_last() -> None:
    model = CustomResNet()
    layouts = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU):
            module.register_forward_hook(
                lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pixels(2))
    assert len(layouts) == 24 and all(layouts)


def test_residual_sums_carry_their_input() -> None:
    """With the residual branches silenced, a block passes its input through: the sum is really there."""
    model = CustomResNet().eval()
    for branch in (model.res1, model.res2):
        branch[5].weight.data.zero_()  # the last BatchNorm's scale
        branch[5].bias.data.zero_()
    seen = {}
    model.layer1.register_forward_hook(lambda _, __, out: seen.update(before=out.clone()))
    model.layer2.register_forward_pre_hook(lambda _, inputs: seen.update(after=inputs[0].clone()))
    model(pixels(1))
    assert torch.equal(seen["before"], seen["after"])


def test_width_multiplies_every_layers_channels() -> None:
    wide = dict(block_shapes(CustomResNet(width=96)))
    assert wide["PrepLayer"] == (1, 96, 32, 32) and wide["Layer 3, X + R2"] == (1, 768, 4, 4)
    ratio = multiply_adds(CustomResNet(width=128)) / multiply_adds(CustomResNet())
    assert ratio == pytest.approx(4, rel=0.01)


def test_gelu_takes_the_place_of_every_relu_and_changes_no_weight() -> None:
    torch.manual_seed(0)
    smooth = CustomResNet(width=8, activation="gelu").eval()
    torch.manual_seed(0)
    plain = CustomResNet(width=8).eval()
    kinds = [type(module) for module in smooth.modules()]
    assert kinds.count(nn.GELU) == 8 and nn.ReLU not in kinds
    smooth.load_state_dict(plain.state_dict())
    assert (smooth.prep(smooth.normalize(pixels(2))) < 0).any()
    assert not torch.allclose(smooth(pixels(2)), plain(pixels(2)))


@pytest.mark.parametrize("resolution", [16, 24, 32, 64, 120, 128, 200, 256])
def test_every_resolution_ends_in_one_pixel(resolution: int) -> None:
    model = CustomResNet(resolution=resolution, width=8)
    shapes = dict(block_shapes(model))
    assert shapes["Max Pooling"] == (1, 64, 1, 1)
    left = shapes["Layer 3, X + R2"][2]
    block_NCHW = torch.zeros(1, 64, left, left)
    block_NCHW[0, 0, -1, -1] = 1
    assert model.pool(block_NCHW)[0, 0, 0, 0] == 1  # the last pooling leaves nothing out
    stem = resolution // 2 if resolution >= 128 else resolution
    assert shapes["PrepLayer"] == (1, 8, stem, stem)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in CustomResNet(width=8).parameters()
    )
    images = torch.randint(256, (2, 3, resolution, resolution), dtype=torch.uint8)
    assert model.eval()(images).shape == (2, 10)
    flop = training_flop_per_image(CustomResNet(resolution=64)) / training_flop_per_image(CustomResNet())
    assert flop == pytest.approx(4, rel=0.01)


def test_a_network_takes_smaller_images_as_the_one_that_was_made_for_them() -> None:
    model, smaller = CustomResNet(width=8).eval(), CustomResNet(width=8, resolution=24).eval()
    smaller.load_state_dict(model.state_dict())
    images = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    assert torch.equal(model(images), smaller(images))
    assert training_flop_per_image(model, 24) == training_flop_per_image(smaller)


def test_number_of_classes_is_the_last_layers() -> None:
    assert CustomResNet(num_classes=7)(pixels(1)).shape == (1, 7)


def test_pixels_are_normalised_with_the_mean_and_std_that_a_state_carries() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    trained, restored = CustomResNet(mean=mean, std=std).eval(), CustomResNet().eval()
    restored.load_state_dict(trained.state_dict())
    images = pixels(2)
    shape = (1, 3, 1, 1)
    expected = (images.double() / 255 - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)
    for model in (trained, restored):
        normalized = model.normalize(images)
        torch.testing.assert_close(normalized, expected.float(), rtol=1e-5, atol=1e-5)
        assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(trained(images), restored(images))
    assert torch.equal(trained(images), trained(images.half()))  # whatever type the pixels come in
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trained.normalize(images).dtype == torch.float32  # rounded once, by the first convolution


def test_dirac_lets_every_convolution_pass_its_input_on_and_draws_nothing_else_otherwise() -> None:
    torch.manual_seed(0)
    plain = CustomResNet(width=8)
    torch.manual_seed(0)
    model = CustomResNet(width=8, init="dirac")
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        images = torch.randn(2, conv.in_channels, 6, 6)
        assert torch.equal(conv(images)[:, : conv.in_channels], images)
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.prep[0].weight[3:], plain.prep[0].weight[3:])
    assert torch.equal(model.fc.weight, plain.fc.weight)


def test_bn_momentum_is_the_share_of_a_batch_in_every_running_mean() -> None:
    model = CustomResNet(width=8, bn_momentum=0.4)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.4}


def test_a_state_carries_the_scale_of_its_logits() -> None:
    torch.manual_seed(0)
    plain = CustomResNet(width=8).eval()
    torch.manual_seed(0)
    scaled = CustomResNet(width=8, logit_scale=0.25).eval()
    images = pixels(2)
    expected = plain(images) / 4
    assert torch.equal(scaled(images), expected)
    plain.load_state_dict(scaled.state_dict())
    assert torch.equal(plain(images), expected)


def test_batch_norm_is_torchs_but_keeps_a_counter_that_it_was_given() -> None:
    """State dicts keep torch's keys, so those of before still load, and torch's own layers load ours."""
    generator = torch.Generator().manual_seed(0)
    torchs, ours = torch.nn.BatchNorm2d(4, momentum=0.3), BatchNorm2d(4, momentum=0.3)
    images = torch.randn(8, 4, 5, 5, generator=generator)
    for _ in range(2):
        assert torch.equal(ours(images), torchs(images))
    assert torch.equal(ours.running_mean, torchs.running_mean)
    assert torch.equal(ours.running_var, torchs.running_var)
    assert ours.num_batches_tracked == 0 and ours.state_dict().keys() == torchs.state_dict().keys()
    ours.load_state_dict(torchs.state_dict())
    ours(images)
    assert ours.num_batches_tracked == 2
    assert torch.equal(ours.eval()(images), ours(images))
    torchs.load_state_dict(ours.state_dict())


def smooth_images(count: int, side: int) -> np.ndarray:
    """Images whose neighbouring pixels and channels are alike, as in photographs: (N, H, W, 3) uint8."""
    noise = np.random.default_rng(0).normal(size=(count, side, side, 3))
    rows, everything = noise.cumsum(1), noise.cumsum(1).cumsum(2)
    pixels = 128 + 4 * (everything + rows) + 12 * noise.sum(3, keepdims=True)
    return pixels.clip(0, 255).astype(np.uint8)


def test_a_compact_networks_first_layer_decorrelates_patches_and_is_not_trained() -> None:
    images = smooth_images(64, 16)
    model = CompactNet(width=8, resolution=16)
    model.whiten(images)
    normalized = model.normalize(torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        outputs = model.whitening(normalized).permute(1, 0, 2, 3).flatten(1).double().numpy()
    assert outputs.shape[0] == 24 and np.array_equal(outputs[12:], -outputs[:12])
    moments = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    patches = np.lib.stride_tricks.sliding_window_view(normalized.numpy(), (2, 2), axis=(2, 3))
    variances = np.linalg.eigvalsh(np.cov(patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12).T, bias=True))
    assert variances.max() / variances.min() > 20  # there was something to decorrelate
    assert np.abs(moments - np.diag(np.diag(moments))).max() < 1e-3
    assert 0.9 < np.diag(moments).min() <= np.diag(moments).max() <= 1.0 + 1e-3
    trained = {id(p) for group in build_optimizer(model, Recipe(), 0.1).param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) not in trained} == {"whitening.weight"}


def test_a_compact_networks_logits_are_those_of_its_layers_written_out() -> None:
    model = CompactNet(num_classes=7, width=8, activation="gelu", logit_scale=0.5).eval()
    state = model.state_dict()

    def conv(x: torch.Tensor, name: str, padding: int) -> torch.Tensor:
        return nn.functional.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return nn.functional.gelu((x - mean) / (var + 1e-5).sqrt() * scale + shift)

    images = pixels(3)
    x = nn.functional.gelu(conv((images.float() / 255 - 0.5) / 0.25, "whitening", 0))
    for group, side in (("group1", 15), ("group2", 7), ("group3", 3)):
        x = norm(nn.functional.max_pool2d(conv(x, f"{group}.0", 1), 2), f"{group}.2")
        x = norm(conv(x, f"{group}.5", 1), f"{group}.6")
        assert x.shape[2:] == (side, side)
    expected = 0.5 * nn.functional.linear(x.amax((2, 3)), state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_a_compact_network_takes_a_third_of_the_operations_and_none_for_what_is_not_trained() -> None:
    model = CompactNet()
    assert sum(p.numel() for p in model.parameters()) == 1_972_802
    sides = {"whitening": 31, "group1.0": 31, "group1.5": 15, "group2.0": 15, "group2.5": 7, "group3.0": 7}
    sides |= {"group3.5": 3, "fc": 1}
    counts = {name: model.get_submodule(name).weight.numel() * side**2 for name, side in sides.items()}
    assert multiply_adds(model) == sum(counts.values())
    assert training_flop_per_image(model) == 6 * sum(counts.values()) - 4 * counts["whitening"]
    assert 0.3 < training_flop_per_image(model) / training_flop_per_image(CustomResNet()) < 0.32
    recipe = Recipe(early_scale=0.5, early_share=0.5)
    halves = [training_flop_per_image(model, size) for size in (16, 32)]
    assert mean_flop_per_image(model, recipe, 10) == sum(halves) / 2


@pytest.mark.parametrize("resolution", [16, 20, 24, 32, 64, 128, 200])
def test_a_compact_network_takes_every_resolution(resolution: int) -> None:
    model = CompactNet(width=8, resolution=resolution).eval()
    images = torch.randint(256, (2, 3, resolution, resolution), dtype=torch.uint8)
    assert model(images).shape == (2, 10)
    shapes = dict(block_shapes(model))
    assert shapes["Whitening"][2] == (resolution - 1 if resolution < 128 else resolution // 2)
    assert shapes["Max Pooling"] == (1, 32, 1, 1)


def test_the_network_for_a_dataset_has_the_statistics_of_its_training_images(dataset: Dataset) -> None:
    torch.manual_seed(0)
    model = build_model_for(dataset, Recipe(network="compact", width=8))
    assert isinstance(model, CompactNet) and model.mean.tolist() == pytest.approx(
        [255 * mean for mean in dataset.mean]
    )
    expected = CompactNet(width=8, mean=dataset.mean, std=dataset.std)
    assert len(dataset.train.images) <= 2000
    expected.whiten(dataset.train.images)
    assert torch.equal(model.whitening.weight, expected.whitening.weight)
    assert not torch.equal(model.whitening.weight, CompactNet(width=8).whitening.weight)


def test_the_first_layer_is_derived_from_some_images_all_over_the_set(dataset: Dataset, monkeypatch) -> None:
    """Patches take a dozen times the memory of their image, and a folder's images are sorted by class."""
    monkeypatch.setattr(model_module, "WHITENING_PIXELS", 3 * 32 * 32 + 1)
    found = build_model_for(dataset, Recipe(network="compact", width=8))
    expected = CompactNet(width=8, mean=dataset.mean, std=dataset.std)
    third = -(-len(dataset.train.images) // 3)
    expected.whiten(dataset.train.images[[0, third, 2 * third]])
    assert torch.equal(found.get_submodule("whitening").weight, expected.whitening.weight)

"""Heads and their invariances; the WideResNet against the published naming, computed independently."""

import common
import models

import pytest
import torch
import torch.nn.functional as F

HEADS = {"fn": (True, False), "wn": (False, True), "both": (True, True), "neither": (False, False)}


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, generator=generator), torch.rand(4, 1, generator=generator) * 5 + 0.1


@pytest.mark.parametrize("name", HEADS)
def test_feature_and_weight_normalization_give_their_invariances(features, name):
    z, factor = features
    fn, wn = HEADS[name]
    head = models.HEHead(6, 3, fn=fn, wn=wn, angular=False)
    before = head(z)
    assert torch.allclose(head(z * factor), before, atol=1e-6) == fn
    head.weight.data *= torch.tensor([[0.3], [2.0], [7.0]])
    assert torch.allclose(head(z), before, atol=1e-6) == wn


def test_cosines_are_bounded_and_modified_he_gives_angles(features):
    z, _ = features
    torch.manual_seed(0)
    he = models.HEHead(6, 3, fn=True, wn=True, angular=False)
    torch.manual_seed(0)
    mhe = models.HEHead(6, 3, fn=True, wn=True, angular=True)
    assert he(z).abs().max() <= 1 and he.bias is None
    torch.testing.assert_close(mhe(z), -torch.acos(he(z)))
    assert torch.equal(mhe(z).argmax(1), he(z).argmax(1))


@pytest.mark.parametrize("arch, channels, size", [
    ("small_cnn", 1, 8), ("small_cnn", 1, 28), ("small_cnn", 3, 32), ("resnet18", 3, 32), ("resnet18", 1, 28),
    ("preactresnet18", 3, 32), ("wrn-10-1", 3, 32), ("wrn-16-2", 3, 64), ("resnet32", 3, 32), ("alexnet", 3, 32),
    ("alexnet", 1, 28),
])  # fmt: skip
def test_every_backbone_gives_features_logits_and_gradients(arch, channels, size):
    torch.manual_seed(0)
    model = models.build_model(
        arch, 7, channels, image_size=size, head="he", mean=[0.5] * channels, std=[0.2] * channels
    )
    x = torch.rand(2, channels, size, size)
    logits, z = model(x, with_features=True)
    assert logits.shape == (2, 7) and z.shape == (2, model.feature_dim)
    model.eval()
    torch.testing.assert_close(model(x), model.fc(model.features(x)))
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arch, size, padding, pooled", [
    ("small_cnn", 28, 0, (2, 4)), ("dsphere_mnist", 28, 1, (2, 4, 6)), ("dsphere_cifar", 32, 1, (3, 6, 9)),
    ("alexnet", 32, 1, (1, 2, 5)),
])  # fmt: skip
def test_a_plain_network_is_convolutions_relus_and_poolings(arch, size, padding, pooled):
    """Pooled after these of its convolutions; then fully connected layers, the last of small_cnn followed by tanh."""
    torch.manual_seed(0)
    options = {"activation": "tanh"} if arch == "small_cnn" else {}
    model = models.build_model(arch, 10, 1, image_size=size, **options)
    state = {key: 2 * value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    out = x = torch.rand(2, 1, size, size)
    layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    for number, name in enumerate([name for name in layers if name.startswith("conv")], 1):
        stride = 2 if arch == "alexnet" and number == 1 else 1
        out = F.relu(F.conv2d(out, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding))
        out = F.max_pool2d(out, 2) if number in pooled else out
    out = out.flatten(1)
    hidden = [name for name in layers if name.startswith("hidden")]
    for name in hidden:
        last = arch == "small_cnn" and name == hidden[-1]
        out = (torch.tanh if last else F.relu)(F.linear(out, state[f"{name}.weight"], state[f"{name}.bias"]))
    torch.testing.assert_close(model.features(x), out)
    assert out.std() > 0.01


@pytest.mark.parametrize("arch, depth, stages", [("resnet18", 2, 4), ("resnet32", 5, 3)])
def test_a_resnet_is_that_of_its_paper(arch, depth, stages):
    torch.manual_seed(0)
    model = models.build_model(arch, 10).eval()
    state = model.state_dict()
    for name, value in state.items():
        if "bn" in name or "shortcut.1" in name:
            value.copy_(torch.rand(value.shape) + 0.5)

    def normed(out, convolution, norm, stride=1):
        weight = state[f"{convolution}.weight"]
        out = F.conv2d(out, weight, stride=stride, padding=weight.shape[-1] // 2)
        running = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(out, *running, state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = torch.rand(2, 3, 32, 32)
    out = F.relu(normed(x, "conv1", "bn1"))
    for stage in range(stages):
        for block in range(depth):
            name, stride = f"layers.{stage}.{block}", 2 if stage and not block else 1
            branch = F.relu(normed(out, f"{name}.conv1", f"{name}.bn1", stride))
            branch = normed(branch, f"{name}.conv2", f"{name}.bn2")
            projected = stage and not block  # where the shape changes
            out = F.relu(
                branch + (normed(out, f"{name}.shortcut.0", f"{name}.shortcut.1", stride) if projected else out)
            )
    torch.testing.assert_close(model.features(x), out.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_normalization_is_the_models_first_layer():
    plain = models.build_model("small_cnn", 10, 3)
    shifted = models.build_model("small_cnn", 10, 3, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3])
    shifted.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(shifted(x), plain(by_hand))


def test_amp_changes_the_backbones_precision_and_not_the_logits_dtype(small_model):
    x = torch.rand(8, 1, 8, 8)
    exact = small_model(x)
    small_model.amp = True
    rough = small_model(x)
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)
    small_model.amp = False
    with torch.autocast("cpu", torch.bfloat16):  # that of the evaluation's --amp
        assert small_model.features(x).dtype == torch.float32 and not torch.equal(exact, small_model(x).float())


@pytest.mark.parametrize("arch", ["wrn-11-2", "wrn-4-2", "wrn-28", "resnet", "wrn-34-0", "wrn--34-10", "wrn-9999-9999"])
def test_an_unknown_or_illegal_arch_is_a_value_error(arch):
    with pytest.raises(ValueError, match="arch"):
        models.build_model(arch, 10)


@pytest.mark.parametrize(
    "head, fn, wn", [("mhe", False, True), ("mhe", True, False), ("linear", False, True), ("cos", True, True)]
)
def test_a_head_without_meaning_is_a_value_error(head, fn, wn):
    with pytest.raises(ValueError, match="head"):
        models.build_model("wrn-10-1", 10, head=head, fn=fn, wn=wn)


def test_options_build_the_same_model_again():
    model = models.build_model(
        "wrn-10-1", 5, 1, image_size=8, head="he", wn=False, scale=3.0, margin=0.1, mean=[0.5], std=[0.3]
    )
    twin = models.build_model(**model.options)
    twin.load_state_dict(model.state_dict())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(model.eval()(x), twin.eval()(x)) and (twin.scale, twin.margin) == (3.0, 0.1)


# The published TRADES / MART / HE WideResNet, from its names and the equations alone.


def published_names(blocks):
    """Parameter and buffer names of a WideResNet with `blocks` blocks a stage, in no particular order."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", *(f"bn1.{part}" for part in norm)}
    for stage in (1, 2, 3):
        for block in range(blocks):
            prefix = f"block{stage}.layer.{block}"
            names |= {f"{prefix}.{layer}.{part}" for layer in ("bn1", "bn2") for part in norm}
            names |= {f"{prefix}.conv1.weight", f"{prefix}.conv2.weight"}
        names.add(f"block{stage}.layer.0.convShortcut.weight")
    return names


def published_forward(state, x, blocks, he):
    def norm_relu(out, name):
        running = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.relu(F.batch_norm(out, *running, state[f"{name}.weight"], state[f"{name}.bias"]))

    out = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            active = norm_relu(out, f"{name}.bn1")
            if block == 0:
                out = F.conv2d(active, state[f"{name}.convShortcut.weight"], stride=stride)
            branch = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = out + F.conv2d(norm_relu(branch, f"{name}.bn2"), state[f"{name}.conv2.weight"], padding=1)
    z = F.avg_pool2d(norm_relu(out, "bn1"), 8).flatten(1)
    if he:
        return F.normalize(z) @ F.normalize(state["fc.weight"]).T
    return F.linear(z, state["fc.weight"], state["fc.bias"])


def test_wrn_34_10_has_the_published_parameter_names_and_count():
    with torch.device("meta"):
        model = models.build_model("wrn-34-10", 10)
    assert set(model.state_dict()) == published_names(5) | {"fc.weight", "fc.bias"}
    assert sum(p.numel() for p in model.parameters()) == 46_160_474


@pytest.mark.parametrize("head", ["linear", "he"])
@pytest.mark.parametrize("prefix, entry", [("", None), ("module.", None), ("", "state_dict"), ("module.", "net")])
def test_a_published_state_dict_loads_and_gives_the_same_logits(tmp_path, head, prefix, entry):
    torch.manual_seed(0)
    state = models.build_model("wrn-16-2", 10, head=head).state_dict()
    for key in state:
        if "running_var" in key:
            state[key].uniform_(0.5, 2.0)
        elif "bn" in key and "num_batches" not in key:
            state[key].normal_(0.5, 0.5)
    unused = {f"sub_block1.{key.removeprefix('block1.')}": value for key, value in state.items() if "block1." in key}
    published = {prefix + key: value for key, value in (state | unused).items()}
    torch.save({entry: published, "epoch": 76} if entry else published, tmp_path / "published.pt")
    model, _ = common.load_checkpoint(tmp_path / "published.pt", arch="wrn-16-2", head=head, num_classes=10)
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(model(x), published_forward(state, x, blocks=2, he=head == "he"))


@pytest.mark.parametrize("arch", ["small_cnn", "preactresnet18", "wrn-10-1"])
def test_the_last_activation_bounds_the_features(arch):
    features = {}
    for activation in models.ACTIVATIONS:
        torch.manual_seed(0)
        model = models.build_model(arch, 10, 1, image_size=28, activation=activation)
        features[activation] = model.features(10 * torch.rand(4, 1, 28, 28))
    assert features["relu"].min() >= 0 > features["tanh"].min() and features["tanh"].abs().max() <= 1
    assert (features["leaky_relu"] <= features["relu"]).all() and not torch.equal(features["prelu"], features["relu"])


def test_features_can_be_projected():
    model = models.build_model("alexnet", 10, 1, image_size=28, feature_dim=3)
    z = model.features(torch.rand(2, 1, 28, 28))
    assert z.shape == (2, 3) and model.fc.in_features == 3 and models.build_model(**model.options).feature_dim == 3


@pytest.mark.parametrize("arch", models.IMAGENET_ARCHS)
def test_imagenet_networks_have_torchvisions_names_and_shapes(arch):
    with torch.device("meta"):
        ours = models.build_model(arch, 1000, image_size=224)
        published = models.import_torchvision().models.get_model(arch)
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, published)]
    assert shapes[0] == shapes[1] and ours.feature_dim == 2048


def test_a_torchvision_checkpoint_gives_the_same_logits_and_takes_an_he_head():
    torch.manual_seed(0)
    published = models.import_torchvision().models.get_model("resnet50", num_classes=7).eval()
    ours, x = models.build_model("resnet50", 7, image_size=64).eval(), torch.rand(2, 3, 64, 64)
    ours.load_state_dict(published.state_dict())
    torch.testing.assert_close(ours(x), published(x), rtol=1e-4, atol=1e-5)
    hyperspherical = models.build_model("resnet50", 7, image_size=64, head="he").eval()
    hyperspherical.load_state_dict({k: v for k, v in published.state_dict().items() if k != "fc.bias"})
    z = hyperspherical.features(x)
    torch.testing.assert_close(hyperspherical(x), models.cosine(z, published.fc.weight), rtol=1e-4, atol=1e-5)
    for channels, size in ((1, 224), (3, 32)):
        with pytest.raises(ValueError, match="at least 64 pixels"):
            models.build_model("resnet50", 7, channels, image_size=size)

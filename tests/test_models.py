"""Heads and their invariances; the WideResNet against the published naming, computed independently."""

import re

import common
import eval_all
import models

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("fn, wn", [(True, False), (False, True), (True, True), (False, False)])
def test_feature_and_weight_normalization_give_their_invariances(fn, wn):
    torch.manual_seed(0)
    z, head = torch.randn(4, 6), models.HEHead(6, 3, fn=fn, wn=wn, angular=False)
    before = head(z)
    assert torch.allclose(head(z * torch.tensor([[0.2], [1.5], [3.0], [5.0]])), before, atol=1e-6) == fn
    head.weight.data *= torch.tensor([[0.3], [2.0], [7.0]])
    assert torch.allclose(head(z), before, atol=1e-6) == wn
    assert head.bias is None


@pytest.mark.parametrize("arch, size, padding, pooled", [
    ("small_cnn", 28, 0, (2, 4)), ("dsphere_mnist", 28, 1, (2, 4, 6)), ("dsphere_cifar", 32, 1, (3, 6, 9)),
    ("alexnet", 32, 1, (1, 2, 5)), ("alexnet", 28, 1, (1, 2, 5)), ("small_cnn", 8, 1, (2, 4)),
])  # fmt: skip
def test_a_plain_network_is_convolutions_relus_and_poolings(arch, size, padding, pooled):
    """Pooled after these of its convolutions; then fully connected layers, the last of small_cnn followed by tanh."""
    torch.manual_seed(0)
    small = arch == "small_cnn"
    model = models.build_model(arch, 10, 1, image_size=size, activation="tanh" if small else "relu")
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
        last = torch.tanh if small and name == hidden[-1] else F.relu
        out = last(F.linear(out, state[f"{name}.weight"], state[f"{name}.bias"]))
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
            if stage and not block:  # the shape changes
                out = normed(out, f"{name}.shortcut.0", f"{name}.shortcut.1", stride)
            out = F.relu(branch + out)
    torch.testing.assert_close(model.features(x), out.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_normalization_is_the_models_first_layer_and_options_build_the_same_model_again():
    options = dict(image_size=8, head="he", wn=False, scale=3.0, margin=0.1, feature_dim=3)
    plain = models.build_model("wrn-10-1", 5, **options).eval()
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    shifted = models.build_model("wrn-10-1", 5, **options, mean=mean, std=std).eval()
    twin = models.build_model(**shifted.options).eval()
    for model in (shifted, twin):
        model.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 8, 8)
    by_hand = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(shifted(x), plain(by_hand))
    assert torch.equal(twin(x), shifted(x)) and (twin.scale, twin.margin) == (3.0, 0.1)
    assert twin.features(x).shape == (2, 3) and twin.fc.in_features == twin.feature_dim == 3


def test_amp_changes_the_backbones_precision_and_not_the_logits_dtype(small_model):
    x = torch.rand(8, 1, 8, 8)
    exact, small_model.amp = small_model(x), True
    rough = small_model(x)
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)
    small_model.amp = False
    with torch.autocast("cpu", torch.bfloat16):  # that of the evaluation's --amp
        assert small_model.features(x).dtype == torch.float32 and not torch.equal(exact, small_model(x).float())
    for arch in ("small_cnn", "dsphere_mnist"):
        tanh = models.build_model(arch, 3, 1, image_size=8, activation="tanh")
        tanh.amp, last = True, [*tanh.hidden.modules()][-1]
        last.weight.data, last.bias.data = torch.zeros_like(last.weight), torch.full_like(last.bias, 5.0)
        tanh.features(x).mean(0).sum().backward()
        torch.testing.assert_close(last.bias.grad, 1 - last.bias.tanh() ** 2, rtol=0.01, atol=0)  # in bfloat16 it is 0


@pytest.mark.parametrize("complaint, options", [
    ("arch", dict(arch="wrn-11-2")), ("arch", dict(arch="wrn-4-2")), ("arch", dict(arch="wrn-28")),
    ("arch", dict(arch="wrn-34-0")), ("arch", dict(arch="wrn--34-10")), ("arch", dict(arch="wrn-9999-9999")),
    ("arch", dict(arch="resnet")), ("head", dict(head="cos")), ("head", dict(head="linear", wn=False)),
    ("needs both", dict(head="mhe", fn=False)), ("needs both", dict(head="mhe", wn=False)),
    ("correlation", dict(arch="dsphere_mnist", head="sphere")), ("correlation", dict(head="he", correlation="cosine")),
    ("correlation", dict(arch="dsphere_mnist", head="sphere", correlation="dot")),
    ("no network of D-SphereNet", dict(head="sphere", correlation="cosine")), ("no network", dict(hidden=2)),
    ("correlation", dict(arch="dsphere_mnist", head="sphere", correlation="cosine@2")),
    ("at least 64 pixels", dict(arch="resnet50")), ("color", dict(arch="resnet50", image_size=224, in_channels=1)),
])  # fmt: skip
def test_what_cannot_be_built_is_a_value_error(complaint, options):
    with pytest.raises(ValueError, match=complaint):
        models.build_model(**(dict(arch="wrn-10-1", num_classes=10) | options))


def test_a_released_default_never_changes():
    """Files leave out what is at its default: a new option is added here, with a default that changes nothing."""
    released = dict(image_size=32, in_channels=3, head="linear", fn=True, wn=True, scale=1.0, margin=0.0)
    released |= dict(activation="relu", feature_dim=None, center_norm=1.0, correlation="inner", manifold="sphere")
    required = {"arch", "num_classes"}
    defaults = {key: value for key, value in models.DEFAULTS.items() if key not in required}
    released |= dict(hidden=None, normalize_embedding=False, mean=None, std=None)
    assert defaults == released and required < models.DEFAULTS.keys()


# The published TRADES / MART / HE WideResNet, from its names and the equations alone.
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
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in norm)}
    for stage in (1, 2, 3):
        names.add(f"block{stage}.layer.0.convShortcut.weight")
        for block in (f"block{stage}.layer.{i}" for i in range(5)):
            names |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
            names |= {f"{block}.{layer}.{part}" for layer in ("bn1", "bn2") for part in norm}
    assert set(model.state_dict()) == names and sum(p.numel() for p in model.parameters()) == 46_160_474


@pytest.mark.parametrize("head, prefix, entry", [
    ("linear", "", None), ("he", "module.", None), ("linear", "", "state_dict"), ("he", "module.", "net"),
    ("linear", "", "model"), ("he", "module.", "model_state_dict"),
])  # fmt: skip
def test_a_published_state_dict_loads_and_gives_the_same_logits(tmp_path, capsys, head, prefix, entry):
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
    model, _ = eval_all.load_published(tmp_path / "published.pt", arch="wrn-16-2", head=head)
    x, err = torch.rand(3, 3, 32, 32), capsys.readouterr().err
    torch.testing.assert_close(model(x), published_forward(state, x, blocks=2, he=head == "he"))
    assert f"not used: {prefix}sub_block1.layer.0.bn1.weight, " in err and err.count("\n") == 1


PUBLISHED_NAMES = {  # ours -> those of the authors' repositories
    "resnet18": [(r"^layers\.(\d)", lambda match: f"layer{int(match[1]) + 1}"), (r"^fc", "linear")],
    "preactresnet18": [
        (r"^block(\d)\.layer", r"layer\1"),
        ("convShortcut", "shortcut.0"),
        (r"^bn1", "bn"),
        ("^fc", "linear"),
    ],
}


@pytest.mark.parametrize("arch", PUBLISHED_NAMES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.model."])
def test_the_published_names_of_resnets_load(tmp_path, capsys, arch, prefix):
    torch.manual_seed(0)
    ours = models.build_model(arch, 4).eval()

    def published(name):
        for old, new in PUBLISHED_NAMES[arch]:
            name = re.sub(old, new, name)
        return prefix + name

    state = {published(name): value for name, value in ours.state_dict().items() if "num_batches" not in name}
    torch.save(state | {"mu": torch.zeros(3), "sigma": torch.ones(3)}, tmp_path / "net.pt")
    assert f"{prefix}layer1.0.conv1.weight" in state and f"{prefix}linear.weight" in state
    model, _ = eval_all.load_published(tmp_path / "net.pt", arch=arch)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), ours(x)) and not model.training
    assert "not used: mu, sigma" in capsys.readouterr().err


@pytest.mark.parametrize("saved, read, complaint", [
    (dict(arch="wrn-16-1"), dict(arch="wrn-10-1"), "unexpected: block1.layer.1"),  # more layers than are built
    (dict(arch="wrn-10-1"), dict(arch="wrn-16-1"), "missing"),
    (dict(arch="resnet34"), dict(arch="resnet18"), "unexpected: layer1.2.conv1"),
    (dict(arch="wrn-10-1"), dict(arch="wrn-10-1", head="he"), "fc.bias"),  # a linear head
    (dict(arch="wrn-10-1"), dict(arch="wrn-10-2"), "size mismatch"), (dict(arch="wrn-10-1"), dict(arch="vgg"), "vgg"),
    (dict(arch="wrn-10-1"), dict(arch="wrn-10-1", heads="he"), "heads"),
])  # fmt: skip
def test_a_published_file_of_another_network_is_refused(tmp_path, saved, read, complaint):
    resnet34 = saved["arch"] == "resnet34"  # under the published names
    state = models.build_model(**(saved | {"arch": "resnet18"} if resnet34 else saved), num_classes=3).state_dict()
    if resnet34:
        state |= {name.replace("layers.0.1.", "layer1.2."): value for name, value in state.items()}
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(common.UserError, match=f"(?s)net.pt: not the weights of .*{complaint}"):
        eval_all.load_published(tmp_path / "net.pt", **read)


@pytest.mark.parametrize("arch", models.IMAGENET_ARCHS[::2])
def test_a_torchvision_checkpoint_gives_the_same_logits(arch):
    torch.manual_seed(0)
    published = models.import_torchvision().models.get_model(arch, num_classes=7).eval()
    ours, x = models.build_model(arch, 7, image_size=64).eval(), torch.rand(2, 3, 64, 64)
    ours.load_state_dict(published.state_dict())
    torch.testing.assert_close(ours(x), published(x), rtol=1e-4, atol=1e-5)

"""Backbones, heads and build_model. Nothing here knows a dataset, an attack or a training loop.

Every model maps images in [0, 1], (B, C, H, W), to logits, (B, K):

    x -> normalize -> embed -> z = features(x), (B, d) -> fc (the head) -> logits

The heads are those of Pang et al. 2020, "Boosting Adversarial Training with Hypersphere Embedding" (HE):
`linear` is W z + b, `he` is cos(theta) (Eq. 5), `mhe` is -theta (Sec. 3.5). Scale and margin belong to the loss.
"""

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("linear", "he", "mhe")
WRN = re.compile(r"wrn-(\d{1,3})-(\d{1,2})")


def arccos(cos: Tensor) -> Tensor:
    """theta in radians for cosines of any shape. Within the dtype's eps of +-1 the slope is 0 instead of infinite."""
    limit = 1 - torch.finfo(cos.dtype).eps
    return torch.acos(cos.clamp(-limit, limit))


def cosine(z: Tensor, weight: Tensor) -> Tensor:
    """cos(theta_k) = <W~_k, z~>, (B, K), for features z (B, d) and class weights (K, d)."""
    return F.linear(F.normalize(z, dim=1), F.normalize(weight, dim=1))


class Normalize(nn.Module):
    """(x - mean) / std per channel. Not in the state dict: the checkpoint keeps both among the model's options."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class HEHead(nn.Linear):
    """Hypersphere embedding: no bias, feature (fn) and weight (wn) normalization, each on its own (HE, Eq. 4 and 5)."""

    def __init__(self, feature_dim: int, num_classes: int, fn: bool, wn: bool, angular: bool):
        super().__init__(feature_dim, num_classes, bias=False)
        self.fn, self.wn, self.angular = fn, wn, angular

    def forward(self, z: Tensor) -> Tensor:
        z = F.normalize(z, dim=1) if self.fn else z
        weight = F.normalize(self.weight, dim=1) if self.wn else self.weight
        logits = F.linear(z, weight)
        return -arccos(logits) if self.angular else logits


class Classifier(nn.Module):
    """What every backbone shares. `build_model` sets `normalize`, `fc`, `scale`, `margin` and `options`.

    `amp` runs the backbone in bfloat16; the head and whatever follows it stay in the dtype of the images.
    """

    feature_dim: int
    amp = False

    def embed(self, x: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) -> features (B, d)."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """z, (B, d): the penultimate features, before any normalization of them."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            x_normalized = self.normalize(x).contiguous(memory_format=torch.channels_last)
            return self.embed(x_normalized).to(x.dtype)

    def forward(self, x: Tensor, with_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, K), and with them z (B, d) where a loss needs both."""
        z = self.features(x)
        logits = self.fc(z)
        return (logits, z) if with_features else logits


class SmallCNN(Classifier):
    """The four-convolution network of Carlini & Wagner 2017 (Table I), without its dropout.

    Gray images get the MNIST form (32, 32, 64, 64, fc 200, 200), color images the CIFAR form (64, 64, 128, 128, fc 256,
    256). Its convolutions are unpadded; images under 16 pixels, which would shrink to nothing, are padded by 1.
    """

    def __init__(self, in_channels: int, image_size: int):
        super().__init__()
        width, hidden = (32, 200) if in_channels == 1 else (64, 256)
        padding = 1 if image_size < 16 else 0
        layers = []
        for c_in, c_out in ((in_channels, width), (width, 2 * width)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=padding), nn.ReLU()]
            layers += [nn.Conv2d(c_out, c_out, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
            image_size = (image_size - 4 + 4 * padding) // 2
        if image_size < 1:
            raise ValueError("arch small_cnn needs images of at least 4 pixels")
        self.conv = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            nn.Linear(2 * width * image_size**2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.feature_dim = hidden

    def embed(self, x: Tensor) -> Tensor:
        return self.hidden(self.conv(x).flatten(1))


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """The post-activation residual block of He et al. 2016a."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class PreActBlock(nn.Module):
    """The pre-activation residual block of He et al. 2016b, under the names of the published WideResNet checkpoints."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, c_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv3x3(c_out, c_out)
        self.convShortcut = None
        if stride != 1 or c_in != c_out:
            self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv1(out)
        return shortcut + self.conv2(F.relu(self.bn2(out), inplace=True))


def stage(block: type[nn.Module], c_in: int, c_out: int, depth: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(block(c_out if i else c_in, c_out, 1 if i else stride) for i in range(depth)))


class ResNet(Classifier):
    """ResNet with the CIFAR stem: one 3x3 convolution of stride 1, no pooling; then a stage for each width."""

    def __init__(self, in_channels: int, widths: list[int], depth: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, widths[0]), nn.BatchNorm2d(widths[0])
        ins = [widths[0], *widths]
        self.layers = nn.Sequential(
            *(stage(BasicBlock, ins[i], width, depth, stride=2 if i else 1) for i, width in enumerate(widths))
        )
        self.feature_dim = widths[-1]

    def embed(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layers(out).mean((2, 3))


class PreActResNet(Classifier):
    """Pre-activation ResNet with the CIFAR stem; with stages of 16W, 32W and 64W it is the WideResNet wrn-D-W.

    Its parameter names are those of the published TRADES, MART and HE checkpoints (block1.layer.0.bn1, ..., bn1, fc).
    """

    def __init__(self, in_channels: int, stem: int, widths: list[int], depth: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, stem)
        self.blocks = [f"block{i + 1}" for i in range(len(widths))]
        ins = [stem, *widths]
        for i, name in enumerate(self.blocks):
            layer = stage(PreActBlock, ins[i], widths[i], depth, stride=2 if i else 1)
            self.add_module(name, nn.Sequential(OrderedDict(layer=layer)))
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.feature_dim = widths[-1]

    def embed(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for name in self.blocks:
            out = getattr(self, name)(out)
        return F.relu(self.bn1(out), inplace=True).mean((2, 3))


def make_backbone(arch: str, in_channels: int, image_size: int) -> Classifier:
    """The backbone called `arch`, without its head. Raises ValueError for an unknown name or an illegal size."""
    if arch == "small_cnn":
        return SmallCNN(in_channels, image_size)
    if arch == "resnet18":
        return ResNet(in_channels, [64, 128, 256, 512], depth=2)
    if arch == "preactresnet18":
        return PreActResNet(in_channels, 64, [64, 128, 256, 512], depth=2)
    if wrn := WRN.fullmatch(arch):
        depth, width = map(int, wrn.groups())
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"arch {arch!r}: the depth of wrn-D-W is 6n + 4 (10, 16, 22, 28, 34, ...), its width >= 1")
        return PreActResNet(in_channels, 16, [16 * width, 32 * width, 64 * width], depth=(depth - 4) // 6)
    raise ValueError(f"unknown arch {arch!r}: choose small_cnn, resnet18, preactresnet18 or wrn-D-W such as wrn-34-10")


def make_head(head: str, feature_dim: int, num_classes: int, fn: bool, wn: bool) -> nn.Module:
    """The layer from z (B, d) to logits (B, K). Raises ValueError for a combination that has no meaning."""
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}: choose one of {', '.join(HEADS)}")
    if head != "he" and not (fn and wn):
        why = "has nothing to normalize" if head == "linear" else "takes the arccos of a cosine and needs both"
        raise ValueError(f"fn and wn can be switched off for head he alone: {head} {why}")
    if head == "linear":
        return nn.Linear(feature_dim, num_classes)
    return HEHead(feature_dim, num_classes, fn, wn, angular=head == "mhe")


def build_model(
    arch: str,
    num_classes: int,
    in_channels: int = 3,
    *,
    image_size: int = 32,
    head: str = "linear",
    fn: bool = True,
    wn: bool = True,
    scale: float = 1.0,
    margin: float = 0.0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Classifier:
    """A fresh model on square images of `image_size` pixels; `build_model(**model.options)` builds the same again.

    scale (s) and margin (m) are those of the training loss: they change no logit here, and tell an attack what the
    model was trained with. fn and wn normalize features and weights of head `he`. Raises ValueError with what is wrong.
    """
    options = dict(locals())
    model = make_backbone(arch, in_channels, image_size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.normalize = Normalize(mean or [0.0] * in_channels, std or [1.0] * in_channels)
    model.fc = make_head(head, model.feature_dim, num_classes, fn, wn)
    model.scale, model.margin, model.options = scale, margin, options
    return model

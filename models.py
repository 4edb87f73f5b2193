"""Backbones, heads and build_model. Nothing here knows a dataset, an attack or a training loop.

Every model maps images in [0, 1], (B, C, H, W), to logits, (B, K):

    x -> normalize -> embed -> project -> z = features(x), (B, d) -> fc (the head) -> logits

The heads: `linear` is W z + b; `he` is cos(theta) and `mhe` is -theta (HE, Pang et al. 2020, Eq. 5 and Sec. 3.5); `mmc`
is minus half the squared distance to fixed centers (MMC, Pang et al. 2020); `sphere` is ||z|| * g(W_k, z), `sphere_wm`
|a| * g(W_k, z) (D-SphereNet, 2018, Eq. 4 and 6). Scale and margin belong to the loss.
"""

import inspect
import math
import re
from collections import OrderedDict
from contextlib import nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("linear", "he", "mhe", "mmc", "sphere", "sphere_wm")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "prelu": nn.PReLU, "leaky_relu": nn.LeakyReLU, "none": nn.Identity}
ARCHS = (
    "small_cnn, dsphere_mnist, dsphere_cifar, alexnet, resnet18, resnet32, preactresnet18, wrn-D-W (wrn-34-10); for "
    "ImageNet torchvision's resnet50, resnet152, wide_resnet50_2, wide_resnet101_2"
)
IMAGENET_ARCHS = ("resnet50", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
SQUARE_ARCHS = ("small_cnn", "dsphere_mnist", "dsphere_cifar", "alexnet", *IMAGENET_ARCHS)
WRN = re.compile(r"wrn-(\d{1,3})-(\d{1,2})")


def import_torchvision() -> ModuleType:
    """torchvision, even if its C++ operators do not load with this torch: its datasets and networks need none of them.

    It is imported on first use, because most runs do not need it. Raises ImportError if it is not installed.
    """
    try:
        import torchvision.transforms.v2
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        import torchvision.transforms.v2
    return torchvision


def arccos(cos: Tensor) -> Tensor:
    """theta in radians for cosines of any shape. Within the dtype's eps of +-1 the slope is 0 instead of infinite."""
    limit = 1 - torch.finfo(cos.dtype).eps
    return torch.acos(cos.clamp(-limit, limit))


def cosine(z: Tensor, weight: Tensor) -> Tensor:
    """cos(theta_k) = <W~_k, z~>, (B, K), for features z (B, d) and class weights (K, d)."""
    return F.linear(F.normalize(z, dim=1), F.normalize(weight, dim=1))


# g(w, x) of D-SphereNet, Sec. 4.1: cos(theta), truncated: min(1, ||x||) * cos(theta), and these functions of
# cos(theta). Linear and sigmoid are of Liu et al. 2017. The quadratic one is cut at -1, where it has no gradient: for
# a = 1 at angles over 114 degrees.
SIGMOID_K = 0.5
ANGULAR_FUNCTIONS = {
    "linear": lambda cos: 1 - arccos(cos) * (2 / math.pi),
    "sigmoid": lambda cos: (
        (2 * ((math.pi / 2 - arccos(cos)) / SIGMOID_K).sigmoid() - 1) / math.tanh(math.pi / 4 / SIGMOID_K)
    ),
    "quadratic": lambda cos, a=1.0: (1 - a * (1 - cos).square()).clamp(min=-1),  # quadratic@0.5 has a = 0.5
}
CORRELATIONS = ("cosine", "truncated", *ANGULAR_FUNCTIONS)
CORRELATION = "|".join(["inner", *CORRELATIONS]) + r"(@\d+\.?\d*)?"  # quadratic comes last
TINY = 1e-8  # added to the squared norm: a zero patch has correlation 0 and a finite gradient


def sphere_weight(weight: Tensor, manifold: str) -> Tensor:
    """Kernels (K, ...) of length 1: in L2 on the sphere, in L1 on the simplex (our reading of Sec. 4.4)."""
    flat = F.normalize(weight.flatten(1), p=2 if manifold == "sphere" else 1, dim=1)
    return flat.view_as(weight)


def channel_sum(x: Tensor, manifold: str) -> Tensor:
    """The sum over the channels of x^2 on the sphere, of |x| on the simplex, (B, 1, ...), in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x.square() if manifold == "sphere" else x.abs()).sum(1, keepdim=True)


def correlate(product: Tensor, content: Tensor, correlation: str, manifold: str) -> Tensor:
    """g from <w~, x> (B, K, ...), in its dtype, and the `channel_sum` over each x, (B, 1, ...)."""
    norm = (content + TINY).sqrt() if manifold == "sphere" else content + TINY**0.5
    factor = (norm.clamp(max=1) if correlation == "truncated" else 1) / norm
    name, _, a = correlation.partition("@")
    if name in ANGULAR_FUNCTIONS:  # in float32: an angle near 0 needs more digits than bfloat16 has
        return ANGULAR_FUNCTIONS[name](product * factor, *([float(a)] if a else [])).to(product.dtype)
    return product * factor.to(product.dtype)


class SphereConv2d(nn.Conv2d):
    """A convolution with <w, x> replaced by g(w, x), in [-1, 1] but for rounding: kernel w, input patch x (Eq. 1).

    The norm of a patch is one more convolution: of x^2, summed over the channels, with ones.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, *, correlation: str, manifold: str
    ):
        super().__init__(c_in, c_out, kernel, stride, padding, bias=False)
        self.correlation, self.manifold = correlation, manifold

    def forward(self, x: Tensor) -> Tensor:
        product = F.conv2d(x, sphere_weight(self.weight, self.manifold), None, self.stride, self.padding)
        with torch.autocast(x.device.type, enabled=False):
            content = channel_sum(x, self.manifold)
            ones = content.new_ones(1, 1, *self.kernel_size)
            content = F.conv2d(content, ones, None, self.stride, self.padding)
            return correlate(product, content, self.correlation, self.manifold)


class SphereLinear(nn.Linear):
    """A linear layer with <w, x> replaced by g(w, x), in [-1, 1] but for rounding (Eq. 1)."""

    def __init__(self, d_in: int, d_out: int, *, correlation: str, manifold: str):
        super().__init__(d_in, d_out, bias=False)
        self.correlation, self.manifold = correlation, manifold

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, sphere_weight(self.weight, self.manifold))
        return correlate(product, channel_sum(x, self.manifold), self.correlation, self.manifold)


class SphereHead(SphereLinear):
    """Logits ||z|| * g(W_k, z) (W-Softmax, Eq. 4), or |a| * g(W_k, z) with one learned a (weight multiplier, Eq. 6)."""

    def __init__(self, feature_dim: int, num_classes: int, weight_multiplier: bool, correlation: str, manifold: str):
        super().__init__(feature_dim, num_classes, correlation=correlation, manifold=manifold)
        self.multiplier = nn.Parameter(torch.tensor(10.0)) if weight_multiplier else None

    def forward(self, z: Tensor) -> Tensor:
        length = z.norm(dim=1, keepdim=True) if self.multiplier is None else self.multiplier.abs()
        return length * super().forward(z)


def nearest_cosine(weight: Tensor) -> Tensor:
    """max over j != i of <W~_i, W~_j>, (K,): how near each class's nearest other one is, for class weights (K, d)."""
    gram = cosine(weight, weight)
    return gram.masked_fill(torch.eye(len(gram), dtype=torch.bool, device=gram.device), -1.0).amax(1)


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


def max_mahalanobis_centers(num_classes: int, feature_dim: int, norm: float) -> Tensor:
    """K vectors (K, d) of length `norm` whose pairwise cosines are all -1 / (K - 1) (Pang et al. 2018, Alg. 1).

    Vector k has its last nonzero coordinate at k, so that each new one is fixed by its products with those before it.
    Raises ValueError where K > d + 1: so many do not fit.
    """
    if num_classes > feature_dim + 1:
        raise ValueError(f"head mmc: {num_classes} centers need at least {num_classes - 1} feature dimensions")
    centers = torch.zeros(num_classes, max(feature_dim, num_classes), dtype=torch.float64)
    for k in range(num_classes):
        for j in range(k):
            product = centers[k, :j] @ centers[j, :j]
            centers[k, j] = (-1 / (num_classes - 1) - product) / centers[j, j]
        centers[k, k] = (1 - centers[k, :k].square().sum()).clamp(min=0).sqrt()
    return norm * centers[:, :feature_dim].float()


class MMCHead(nn.Module):
    """Logits -||z - mu_k||^2 / 2 for fixed centers: the largest is the nearest center (MMC, Eq. 8)."""

    def __init__(self, feature_dim: int, num_classes: int, center_norm: float):
        super().__init__()
        self.register_buffer("centers", max_mahalanobis_centers(num_classes, feature_dim, center_norm))

    def forward(self, z: Tensor) -> Tensor:
        return -(z[:, None] - self.centers).square().sum(2) / 2


class UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class Classifier(nn.Module):
    """What every backbone shares. `build_model` sets all that is not the backbone's own: normalize, activation (the
    last one, where the backbone takes a choice), project, fc, scale, margin and options.

    `amp` runs the backbone in bfloat16; the head and whatever follows it stay in the dtype of the images.
    """

    feature_dim: int
    amp = False

    def embed(self, x: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) -> features (B, d)."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """z, (B, d): the penultimate features, before any normalization of them."""
        # without amp an autocast of the caller stays in force
        with torch.autocast(x.device.type, torch.bfloat16) if self.amp else nullcontext():
            x_normalized = self.normalize(x).contiguous(memory_format=torch.channels_last)
            return self.project(self.embed(x_normalized)).to(x.dtype)

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
        self.hidden = nn.Sequential(nn.Linear(2 * width * image_size**2, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.feature_dim = hidden

    def embed(self, x: Tensor) -> Tensor:
        return self.activation(self.hidden(self.conv(x).flatten(1)).to(x.dtype))  # in bfloat16 tanh is 1 from 3.5 on


class SphereCNN(Classifier):
    """The CNNs of D-SphereNet's Table 4; `correlation` inner gives its plain baseline, convolutions with a bias.

    widths are those of the three stages, each of `depth` 3x3 convolutions and a 2x2 max-pooling; then fc `hidden`.
    """

    def __init__(self, in_channels: int, image_size: int, widths: list, depth: int, hidden: int, correlation, manifold):
        super().__init__()
        if image_size < 8:
            raise ValueError("the networks of D-SphereNet need images of at least 8 pixels")
        inner = correlation == "inner"
        kind = {} if inner else {"correlation": correlation, "manifold": manifold}
        conv, linear = (nn.Conv2d, nn.Linear) if inner else (SphereConv2d, SphereLinear)
        layers = []
        for c_in, c_out in zip([in_channels, *widths], widths, strict=False):
            for i in range(depth):
                layers += [conv(c_out if i else c_in, c_out, 3, padding=1, **kind), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.conv = nn.Sequential(*layers)
        self.hidden = linear(widths[-1] * (image_size // 8) ** 2, hidden, **kind)
        self.feature_dim = hidden

    def embed(self, x: Tensor) -> Tensor:
        return self.activation(self.hidden(self.conv(x).flatten(1)).to(x.dtype))  # saturates less than in bfloat16


class AlexNet(Classifier):
    """Krizhevsky et al. 2012 sized for 28 and 32 pixels: five 3x3 convolutions, three poolings, fc 1024, 1024; ours."""

    def __init__(self, in_channels: int, image_size: int):
        super().__init__()
        if image_size < 16:
            raise ValueError("arch alexnet needs images of at least 16 pixels")
        self.conv = nn.Sequential(
            *(nn.Conv2d(in_channels, 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        side = (image_size + 1) // 2 // 2 // 2 // 2
        self.hidden = nn.Sequential(nn.Linear(256 * side**2, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
        self.feature_dim = 1024

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
        return self.activation(self.bn1(out).to(x.dtype)).mean((2, 3))


class ImageNetResNet(Classifier):
    """torchvision's bottleneck ResNet `arch`, with its 7x7 stem and under its parameter names (layer1.0.conv1, ...)."""

    def __init__(self, arch: str, in_channels: int, image_size: int):
        super().__init__()
        if in_channels != 3 or image_size < 64:
            raise ValueError(f"arch {arch} needs color images of at least 64 pixels")
        published = import_torchvision().models.get_model(arch)
        self.feature_dim = published.fc.in_features
        self.stages = [name for name, _ in published.named_children() if name != "fc"]
        for name in self.stages:
            self.add_module(name, getattr(published, name))

    def embed(self, x: Tensor) -> Tensor:
        for name in self.stages:
            x = getattr(self, name)(x)
        return x.flatten(1)


def make_backbone(arch: str, in_channels: int, image_size: int, hidden, correlation: str, manifold: str) -> Classifier:
    """The backbone called `arch`, without its head. Raises ValueError for an unknown name or an illegal size."""
    if arch in SQUARE_ARCHS and not isinstance(image_size, int):
        raise ValueError(f"arch {arch} needs square images, not {image_size}")
    if arch == "small_cnn":
        return SmallCNN(in_channels, image_size)
    if arch == "dsphere_mnist":
        return SphereCNN(in_channels, image_size, [32, 64, 128], 2, hidden or 256, correlation, manifold)
    if arch == "dsphere_cifar":
        return SphereCNN(in_channels, image_size, [64, 128, 256], 3, hidden or 512, correlation, manifold)
    if arch == "alexnet":
        return AlexNet(in_channels, image_size)
    if arch == "resnet32":
        return ResNet(in_channels, [16, 32, 64], depth=5)
    if arch == "resnet18":
        return ResNet(in_channels, [64, 128, 256, 512], depth=2)
    if arch in IMAGENET_ARCHS:
        return ImageNetResNet(arch, in_channels, image_size)
    if arch == "preactresnet18":
        return PreActResNet(in_channels, 64, [64, 128, 256, 512], depth=2)
    if wrn := WRN.fullmatch(arch):
        depth, width = map(int, wrn.groups())
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"arch {arch!r}: the depth of wrn-D-W is 6n + 4 (10, 16, 22, 28, 34, ...), its width >= 1")
        return PreActResNet(in_channels, 16, [16 * width, 32 * width, 64 * width], depth=(depth - 4) // 6)
    raise ValueError(f"unknown arch {arch!r}: choose {ARCHS}")


def make_head(head: str, feature_dim: int, num_classes: int, options: dict) -> nn.Module:
    """The layer from z (B, d) to logits (B, K). Raises ValueError for a combination that has no meaning."""
    fn, wn = options["fn"], options["wn"]
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}: choose one of {', '.join(HEADS)}")
    if head != "he" and not (fn and wn):
        why = "takes the arccos of a cosine and needs both" if head == "mhe" else "has nothing to normalize"
        raise ValueError(f"fn and wn can be switched off for head he alone: {head} {why}")
    if head == "linear":
        return nn.Linear(feature_dim, num_classes)
    if head == "mmc":
        return MMCHead(feature_dim, num_classes, options["center_norm"])
    if head in ("sphere", "sphere_wm"):
        return SphereHead(feature_dim, num_classes, head == "sphere_wm", options["correlation"], options["manifold"])
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
    activation: str = "relu",
    feature_dim: int | None = None,
    center_norm: float = 1.0,
    correlation: str = "inner",
    manifold: str = "sphere",
    hidden: int | None = None,
    normalize_embedding: bool = False,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Classifier:
    """A fresh model on images of `image_size` pixels, or (H, W); `build_model(**model.options)` builds the same again.

    scale (s) and margin (m) are those of the training loss: they change no logit here, and tell an attack what the
    model was trained with. fn and wn normalize features and weights under head he. activation is the last one before z,
    for small_cnn and the pre-activation networks. feature_dim projects z linearly to so many dimensions. center_norm is
    the length of the centers of head mmc. correlation and manifold are D-SphereNet's g, for its networks and heads,
    hidden is the width of their last layer. normalize_embedding scales what feature_dim projects to length 1 (HT-SCE).
    All convolutions are initialized here: load pretrained weights afterwards. Raises ValueError with what is wrong.
    """
    options = dict(locals())
    if not re.fullmatch(CORRELATION, correlation) or manifold not in ("sphere", "simplex"):
        raise ValueError(f"correlation {correlation!r} on {manifold!r}: one of {CORRELATION}, on sphere or simplex")
    if any(values is not None and len(values) != in_channels for values in (mean, std)):
        raise ValueError(f"mean and std need a value for each of {in_channels} channels")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if (correlation == "inner") == (head in ("sphere", "sphere_wm")):
        raise ValueError(f"head {head} and correlation {correlation} do not go together")
    model = make_backbone(arch, in_channels, image_size, hidden, correlation, manifold)
    if (correlation != "inner" or hidden) and not isinstance(model, SphereCNN):
        raise ValueError(f"arch {arch!r} is no network of D-SphereNet: choose dsphere_mnist or dsphere_cifar")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.normalize = Normalize(mean or [0.0] * in_channels, std or [1.0] * in_channels)
    if activation != "relu" and not isinstance(model, SmallCNN | PreActResNet | SphereCNN):
        raise ValueError(f"arch {arch!r} takes no other last activation than relu")
    model.activation = ACTIVATIONS[activation]()
    model.project = nn.Identity()
    if feature_dim is not None:
        model.project, model.feature_dim = nn.Linear(model.feature_dim, feature_dim), feature_dim
    if normalize_embedding:
        model.project = nn.Sequential(UnitLength(), model.project)
    model.fc = make_head(head, model.feature_dim, num_classes, options)
    model.scale, model.margin, model.options = scale, margin, options
    return model


# A file leaves out the options that have these values: a released default never changes.
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(build_model).parameters.items()}

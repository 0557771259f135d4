"""Convolutional networks: torchvision's classifiers without their last linear layer.

Parameter names are torchvision's own, as in the original implementation, whose ResNet-50 is
torchvision's with `fc` taken away: its checkpoints load unchanged.

Legend for shapes: B pictures, C channels, D embedding size, E channels of the last feature map,
N = h x w its places.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbone.vit import AttentionRows, Features

# How the names of a family begin -> the least side in pixels of a picture that it can take.
FAMILIES: Mapping[str, int] = MappingProxyType(
    {
        "alexnet": 63,
        "convnext_": 32,
        "densenet": 29,
        "efficientnet_": 1,
        "googlenet": 15,
        "inception_v3": 75,
        "mnasnet": 1,
        "mobilenet_": 1,
        "regnet_": 1,
        "resnet": 1,
        "resnext": 1,
        "shufflenet_": 1,
        "vgg": 32,
        "wide_resnet": 1,
    }
)

# Their classifiers for training from labels hang on inner layers; they are no part of the backbone.
_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: MappingProxyType({"aux_logits": False, "init_weights": True})
        for name in ("googlenet", "inception_v3")
    }
)
_AFTER_THE_MAP = ("avgpool", "dropout", "classifier", "fc")


class ConvNet(nn.Module):
    """A torchvision classifier up to the input of its last linear layer.

    Its parts are torchvision's, under their own names and freshly initialised. Dropout is taken
    away: it belongs to training with labels, and would be noise in DINO's teacher.

    Args:
        name: one of `convnets()`.
        in_channels: C; where it is not 3 the first convolution is made anew, alike but for that.
        drop_path_rate: stochastic depth of the last block in networks that have it (ConvNeXt,
            EfficientNet); earlier blocks rise to it linearly. Without meaning in others.

    Attributes:
        embed_dim: D, what the last linear layer took.
        token_dim: E; it differs from D where other linear layers come first (VGG, MobileNetV3).
        smallest_side: the least height and width in pixels of a picture.

    Raises:
        ValueError: a name that is no convolutional classifier's.
    """

    def __init__(self, name: str, *, in_channels: int = 3, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        if not is_convnet(name):
            raise ValueError(f"{name!r} is none of torchvision's convolutional classifiers")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate} is not in [0, 1)")
        # Imported here: it takes seconds, and whoever serves a ViT does without.
        from torchvision.models import get_model

        network = get_model(name, weights=None, **_OPTIONS.get(name, {}))
        if in_channels != 3:
            _change_first_convolution(network, in_channels)
        _set_drop_rates(network, drop_path_rate)
        self.name = name
        self.in_channels = in_channels
        self.smallest_side = smallest_side(name)
        self.token_dim = _map_channels(network)
        self.embed_dim = _remove_last_linear(network)
        for child, module in network.named_children():
            self.add_module(child, module)

    def forward(
        self, pictures: Tensor, *, last_blocks: int = 1, attention: AttentionRows = "none"
    ) -> Features:
        """Runs the network on pictures [B, C, H, W] of any size from `smallest_side` up.

        The answer has a ViT's form: `cls` is the pooled embedding [B, D], `patches` the last
        feature map before pooling as tokens [B, N, E], `grid` its (h, w). `blocks` is empty and
        `attention` None: a convolutional network has neither.

        Raises:
            ValueError: attention or several blocks are asked for, or the pictures do not fit.
        """
        if attention != "none":
            raise ValueError(
                f"attention is {attention!r}, but {self.name} is a convolutional network: it has "
                "none; take a ViT"
            )
        if last_blocks != 1:
            raise ValueError(
                f"last_blocks is {last_blocks}, but {self.name} is a convolutional network: it "
                "has its last feature map alone, last_blocks = 1"
            )
        self._check(pictures)
        x = pictures
        children = dict(self.named_children())
        for child, module in children.items():
            if child not in _AFTER_THE_MAP:
                x = module(x)
        if self.name.startswith("densenet"):
            x = F.relu(x)  # torchvision's forward has it outside of the modules
        patches, grid = x.flatten(2).transpose(1, 2), (x.shape[-2], x.shape[-1])

        x = children["avgpool"](x) if "avgpool" in children else x.mean((2, 3), keepdim=True)
        if not self.name.startswith("convnext"):  # its classifier begins with a norm of maps
            x = x.flatten(1)
        for child in ("classifier", "fc"):
            if child in children:
                x = children[child](x)
        return Features(x, patches, grid, (), None)

    def forward_cls(self, batches: Sequence[Tensor]) -> Tensor:
        """The embeddings [sum of B, D] of several batches, each [B, C, H, W] of a size of its own.

        One pass for each: as in the original, a BatchNorm sees pictures of one size at a time.
        """
        return torch.cat([self(pictures).cls for pictures in batches])

    def _check(self, pictures: Tensor) -> None:
        if pictures.ndim != 4 or pictures.shape[1] != self.in_channels:
            raise ValueError(
                f"pictures have shape {list(pictures.shape)}, "
                f"not [batch, {self.in_channels}, height, width]"
            )
        height, width = pictures.shape[-2:]
        if min(height, width) < self.smallest_side:
            raise ValueError(
                f"pictures of {height} x {width} pixels are too small for {self.name}: "
                f"it needs {self.smallest_side} on each side"
            )


class ParametersOnMeta(TorchFunctionMode):
    """A context in which a network is built with its parameters' shapes alone.

    `torch.device("meta")` does not serve: RegNet calculates its widths with tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sends `torch.empty`, with which every large tensor begins, to the meta device."""
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def convnets() -> list[str]:
    """The names that `ConvNet` takes, sorted.

    Detectors, segmenters, networks for video, quantised ones and transformers are not among them.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return sorted(name for name in names if name.startswith(tuple(FAMILIES)))


def is_convnet(name: str) -> bool:
    """Whether a `ConvNet` has this name; those of ViTs are told without torchvision's help."""
    return name.startswith(tuple(FAMILIES)) and name in convnets()


def smallest_side(name: str) -> int:
    """The least side in pixels of a picture that the `ConvNet` of this name can take."""
    return next(side for family, side in FAMILIES.items() if name.startswith(family))


def _change_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Other channels for the same kernel, stride, padding and bias, drawn as ResNet draws it."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.in_channels = in_channels
    first.weight = nn.Parameter(torch.empty(first.out_channels, in_channels, *first.kernel_size))
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")


def _set_drop_rates(network: nn.Module, drop_path_rate: float) -> None:
    from torchvision.ops import StochasticDepth

    paths = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    for i, path in enumerate(paths):
        path.p = drop_path_rate * i / max(len(paths) - 1, 1)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _map_channels(network: nn.Module) -> int:
    """Channels of the last feature map: what the first linear layer of the classifier takes."""
    _, first = _linear_layers(network)[0]
    pool = getattr(network, "avgpool", None)
    places = pool(torch.zeros(1, 1, 1, 1)).numel() if pool is not None else 1  # 7 x 7 in VGG
    return first.in_features // places


def _remove_last_linear(network: nn.Module) -> int:
    """Puts the identity in the place of the last linear layer; returns what that one took."""
    place, last = _linear_layers(network)[-1]
    network.set_submodule(place, nn.Identity())
    return last.in_features


def _linear_layers(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those of the classifier, by their places in the network."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in _AFTER_THE_MAP
    ]

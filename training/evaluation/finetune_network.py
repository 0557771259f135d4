"""A backbone with a linear classifier: how it is made, how fast each layer learns, its files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from backbone import classifier as linear
from backbone.architectures import Backbone
from backbone.artifact import Artifact, write_artifact
from backbone.vit import VisionTransformer
from training.distributed import World
from training.evaluation.finetune_data import from_timm
from training.tables import ConfigError

BACKBONE, HEAD = "backbone.safetensors", "classifier.safetensors"


class Classifier(nn.Module):
    """Pictures [B, C, H, W] -> logits [B, classes]: a linear layer on the CLS after the norm."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits, before the softmax."""
        logits: Tensor = self.head(self.backbone.forward_cls([pictures]))
        return logits

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Tells timm which layer a parameter belongs to, by its name.

        The embedding of patches and positions is the lowest layer, then come the blocks; what is
        not named here, the last norm and the head, is the highest (arXiv 2106.08254). A
        convolutional network is one layer.
        """
        if not isinstance(self.backbone, VisionTransformer):
            return {"stem": r"backbone\."}
        return {
            "stem": r"backbone\.(?:cls_token|pos_embed|patch_embed)",
            "blocks": r"backbone\.blocks\.(\d+)",
        }


def make_classifier(
    artifact: Artifact,
    classes: int,
    *,
    drop_path: float,
    seed: int,
    from_scratch: bool,
    here: World,
) -> Classifier:
    """The artifact's network, or with `from_scratch` one like it, with a new head, on the device.

    Raises:
        ConfigError: a network with BatchNorm and several processes without CUDA.
    """
    torch.manual_seed(seed)  # the same weights on every process
    backbone = artifact.architecture.build(drop_path_rate=drop_path)
    if not from_scratch:
        backbone.load_state_dict(dict(artifact.weights))
    classifier = Classifier(backbone, classes).to(here.device)
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in classifier.modules())
    if here.size > 1 and normed:
        if here.device.type != "cuda":
            raise ConfigError(
                f"{artifact.architecture.name} has BatchNorm, whose statistics over several "
                "processes exist on CUDA alone: use one process"
            )
        convert = cast(Any, nn.SyncBatchNorm.convert_sync_batchnorm)
        classifier = convert(classifier)
    return classifier


def layer_groups(
    classifier: Classifier, *, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer, each with its `lr_scale` and `weight_decay`.

    The scale is 1 in the head and `layer_decay` times that of the layer above in each below. CLS,
    positions, biases and one-dimensional parameters do not decay.

    Raises:
        ConfigError: a layer decay for a convolutional network, whose layers are not counted.
    """
    if layer_decay != 1.0 and not isinstance(classifier.backbone, VisionTransformer):
        raise ConfigError(
            f"--layer-decay {layer_decay}: only ViTs have blocks to count; take 1, its default "
            "for a convolutional network"
        )
    groups: list[dict[str, Any]] = from_timm("optim").param_groups_layer_decay(
        classifier,
        weight_decay=weight_decay,
        no_weight_decay_list=("backbone.cls_token", "backbone.pos_embed"),
        layer_decay=layer_decay,
    )
    return groups


def publish(
    classifier: Classifier,
    described: Artifact,
    classes: Sequence[str],
    out: Path,
    *,
    base_lr: float,
    top1: float,
) -> str:
    """Writes the backbone as an artifact and its head beside it; returns the fingerprint.

    Args:
        described: what the artifact says beside its weights.
        base_lr: the highest learning rate, for 256 pictures a step.
        top1: in percent, on the validation pictures.

    Raises:
        ArtifactError: weights that are not finite.
        OSError: a file cannot be written.
    """
    artifact = replace(described, weights=classifier.backbone.state_dict())
    fingerprint = write_artifact(artifact, out / BACKBONE)
    head = linear.Classifier(
        weight=classifier.head.weight.detach(),
        bias=classifier.head.bias.detach(),
        classes=tuple(classes),
        descriptor="cls",
        fingerprint=fingerprint,
        preprocess=described.preprocess,
        base_lr=base_lr,
        top1=top1,
    )
    linear.write_classifier(head, out / HEAD)
    return fingerprint

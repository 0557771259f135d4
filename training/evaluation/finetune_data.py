"""What a fine-tuning learns from: augmented views, mixed batches, each drawn from its own key."""

import hashlib
import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbone.preprocess import IMAGENET_MEAN, Preprocess
from training.data import RunSampler
from training.decoding import decode
from training.evaluation.features import View, content_and_name
from training.evaluation.finetune_protocol import Protocol
from training.evaluation.labelled import Labelled
from training.plan import Plan
from training.tables import ConfigError
from training.workers import worker_settings


def from_timm(module: str) -> Any:
    """A module of timm, which is an optional extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(f"timm.{module}")
    except ImportError as error:
        raise ConfigError(
            f"finetune takes its augmentations from timm, which cannot be imported ({error}); "
            "pip install '.[evaluation]'"
        ) from error


@contextmanager
def drawn_from(key: str) -> Iterator[None]:
    """Inside, what the generators of Python, NumPy and torch (CPU) draw follows from `key` alone.

    timm draws from those. Outside they go on as if nothing had been drawn.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")  # NumPy takes 32 bits
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def training_view(preprocess: Preprocess, protocol: Protocol) -> View:
    """Random crop, flip, RandAugment and random erasing: RGB picture -> [C, S, S], normalised.

    Raises:
        ConfigError: timm is missing, or does not know the policy `protocol.auto_augment`.
    """
    timm = from_timm("data")
    policy = protocol.auto_augment
    fill = preprocess.mean if len(preprocess.mean) == 3 else IMAGENET_MEAN
    try:
        crop, colours, _ = timm.create_transform(
            protocol.image_size,
            is_training=True,
            scale=(protocol.min_scale, 1.0),
            color_jitter=None,
            auto_augment=None if policy == "none" else policy,
            interpolation="bicubic",
            mean=fill,
            separate=True,
        )
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"--auto-augment {policy!r} is none of timm's policies ({error}); take one such as "
            "rand-m9-mstd0.5-inc1, or none"
        ) from error
    _keep_a_bit(colours)
    erase = timm.random_erasing.RandomErasing(protocol.erasing, mode="pixel", device="cpu")

    def view(picture: Image.Image) -> Tensor:
        erased: Tensor = erase(preprocess.to_tensor(colours(crop(picture))))
        return erased

    return view


def training_loader(
    train: Labelled,
    view: View,
    plan: Plan,
    *,
    start: int,
    stop: int,
    device: torch.device,
    workers: int,
) -> DataLoader[Any]:
    """Views [B, C, S, S] and labels [B] of the steps `start` to `stop`.

    They depend on seed, epoch and picture alone: not on workers, nor on where a run went on.

    Raises:
        DataError: while iterating: a picture that cannot be read; it is named.
    """
    return DataLoader(
        _Views(train, view, plan.seed),
        batch_sampler=RunSampler(plan, start=start, stop=stop),
        pin_memory=device.type == "cuda",
        **worker_settings(workers),
    )


class Mixer:
    """Pictures [B, C, S, S] and labels [B] -> mixed pictures, and targets [B, classes] for them.

    Each batch is mixed by mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899), half of the time
    each where both are on, with itself in the opposite order. Targets are smoothed.
    """

    def __init__(self, protocol: Protocol, classes: int) -> None:
        self._timm = from_timm("data.mixup")
        self._classes, self._smoothing = classes, protocol.label_smoothing
        self._mixup: Any = None
        if protocol.mixes:
            self._mixup = self._timm.Mixup(
                mixup_alpha=protocol.mixup,
                cutmix_alpha=protocol.cutmix,
                label_smoothing=protocol.label_smoothing,
                num_classes=classes,
            )

    def __call__(self, pictures: Tensor, labels: Tensor, key: str) -> tuple[Tensor, Tensor]:
        """Mixes, in place; every choice follows from `key`."""
        if self._mixup is None:
            targets: Tensor = self._timm.mixup_target(
                labels, self._classes, smoothing=self._smoothing
            )
            return pictures, targets
        with drawn_from(key):
            pictures, targets = self._mixup(pictures, labels)
        return pictures, targets


def _keep_a_bit(colours: Any) -> None:
    """Lets a policy's posterizing keep 1 bit where it would keep none.

    At its greatest magnitude timm asks for 0 bits: a black picture with older versions of Pillow,
    and an error with newer ones.
    """
    for stage in colours.transforms:
        policy = (op for part in getattr(stage, "policy", ()) for op in part)
        for op in (*getattr(stage, "ops", ()), *policy):
            if op.name.startswith("Posterize"):
                op.aug_fn = partial(_posterize, op.aug_fn)


def _posterize(whole: Callable[..., Any], picture: Image.Image, bits: int, **more: Any) -> Any:
    return whole(picture, max(1, bits), **more)


class _Views(Dataset[tuple[Tensor, int]]):
    """(epoch, index) -> the view of that picture in that epoch, and its label."""

    def __init__(self, train: Labelled, view: View, seed: int) -> None:
        self._train, self._view, self._seed = train, view, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, i = key
        picture = decode(*content_and_name(self._train.pictures, i))
        with drawn_from(f"{self._seed}/{epoch}/{i}"):
            return self._view(picture), int(self._train.labels[i])

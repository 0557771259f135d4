"""The numbers of a fine-tuning: those of DeiT (arXiv 2012.12877, section 6) by default."""

from dataclasses import dataclass

from training.schedules import cosine
from training.tables import ConfigError

LR_BATCH = 512
"""Learning rates are given for a batch of so many pictures over all processes."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every setting that a fine-tuning depends on, but for its data, model and arithmetic.

    Attributes:
        image_size: side of a view in pixels.
        batch_size: of each process.
        processes: how many take part.
        warmup_epochs: over which the learning rate rises from 0.
        init_lr, min_lr: the highest learning rate and the one that the cosine ends at, both for a
            batch of `LR_BATCH`: they are scaled linearly with batch_size x processes.
        layer_decay: the learning rate's factor from each layer to the one below it (arXiv
            2106.08254); 1 gives all layers the same.
        drop_path: stochastic depth of the last block; see `Architecture.build`.
        mixup, cutmix: alpha of the Beta distribution that proportions are drawn from; 0 is off.
        erasing: probability with which a rectangle of a view is made noise.
        auto_augment: timm's name of a policy; "none" is off.
        min_scale: least share of a picture's area that a crop takes.
        clip_grad: greatest norm of all gradients together; 0 does not clip.
        from_scratch: starts from random weights, Table 6's comparison.

    Raises:
        ConfigError: names the option, its value and the rule.
    """

    image_size: int
    epochs: int
    batch_size: int
    processes: int
    warmup_epochs: float
    init_lr: float
    min_lr: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    label_smoothing: float
    mixup: float
    cutmix: float
    erasing: float
    auto_augment: str
    min_scale: float
    clip_grad: float
    seed: int
    from_scratch: bool

    def __post_init__(self) -> None:
        rules = {
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, "from 0 to below --epochs"),
            "init_lr": (0 < self.init_lr < float("inf"), "above 0"),
            "min_lr": (0 <= self.min_lr <= self.init_lr, "from 0 to --init-lr"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "0 or more"),
            "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
            "drop_path": (0 <= self.drop_path < 1, "from 0 to below 1"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "from 0 to below 1"),
            "mixup": (0 <= self.mixup < float("inf"), "0 or more"),
            "cutmix": (0 <= self.cutmix < float("inf"), "0 or more"),
            "erasing": (0 <= self.erasing <= 1, "from 0 to 1"),
            "min_scale": (0 < self.min_scale <= 1, "above 0 and at most 1"),
            "clip_grad": (0 <= self.clip_grad < float("inf"), "0 or more"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
            "batch_size": (
                not self.mixes or self.batch_size % 2 == 0,
                "even, for pictures are mixed in pairs (or --mixup 0 --cutmix 0)",
            ),
        }
        for field, (kept, rule) in rules.items():
            if not kept:
                option = field.replace("_", "-")
                raise ConfigError(f"--{option} {getattr(self, field)}: must be {rule}")

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def lr(self) -> float:
        """The highest learning rate for this batch, of the last layer."""
        return self._scaled(self.init_lr)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine."""
        return cosine(
            step,
            base=self.lr,
            final=self._scaled(self.min_lr),
            total_steps=self.epochs * steps_per_epoch,
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
        )

    def _scaled(self, lr: float) -> float:
        return lr * self.batch_size * self.processes / LR_BATCH

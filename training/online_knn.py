"""k-NN of student and teacher on labelled pictures while a run goes on.

A loss that rises says little; this curve tells whether the features get better. The evaluation is
`training.evaluation.knn`'s, at the size of the recipe's global crops, shared by all processes.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone.preprocess import Preprocess
from training.augmentations import normalise
from training.config import ConfigError, Recipe
from training.decoding import decode
from training.distributed import World, all_reduce_sum
from training.evaluation.knn import classify
from training.evaluation.labelled import class_indices
from training.inspection import plain_backbone
from training.precision import autocast, autocast_dtype
from training.rows import RowFile
from training.sources import DataError, Pictures, class_labels, open_pictures
from training.workers import worker_settings

COLUMNS = ("step", "epoch", "network", "top1", "top5")
_KEPT_BYTES = 2**30  # decoded pictures of a process that are kept between two evaluations
_SIMILARITIES = 2**26  # that are computed at once: 256 MiB


class _Part(NamedTuple):
    """This process's share of a labelled set; every process has as many, the last ones none."""

    pictures: Pictures
    labels: Tensor
    places: list[int]


class OnlineKnn:
    """Evaluates student and teacher, and writes `knn.csv` in the run's folder.

    Pictures are decoded at the first evaluation and kept as 8-bit crops where they take at most
    1 GiB, else read anew each time. Those that cannot be read are left out, and said.

    Args:
        recipe: with `knn.train` and `knn.val`.

    Raises:
        DataError: pictures outside class folders, classes in `knn.val` that `knn.train` lacks,
            fewer pictures than `knn.k`.
        ConfigError: pictures with a count of channels that cannot be made from picture files.
    """

    def __init__(self, recipe: Recipe, here: World) -> None:
        self._recipe, self._here = recipe, here
        channels = recipe.data.channels
        if channels not in (1, 3, 4):
            raise ConfigError(
                f"knn.train = {list(recipe.knn.train)!r}: labelled pictures are read with 1, 3 or "
                f"4 channels, and data.channels = {channels}; leave knn.train and knn.val out"
            )
        preprocess = Preprocess.in_proportion(
            recipe.crops.global_size, patch_size=recipe.architecture.patch_size
        )
        # Means of 0 and deviations of 1/255 give the crop's 8-bit values.
        raw = replace(preprocess, mean=(0.0,) * channels, std=(1 / 255,) * channels)
        self._view = raw.centre_crop
        self._shape = (channels, preprocess.crop, preprocess.crop)

        train, val = open_pictures(recipe.knn.train), open_pictures(recipe.knn.val)
        self._classes, (train_labels, val_labels) = class_indices(
            class_labels(train, where="knn.train"), class_labels(val, where="knn.val")
        )
        absent = sorted(set(val_labels.tolist()) - set(train_labels.tolist()))
        if absent:
            names = [self._classes[i] for i in absent[:3]]
            raise DataError(f"knn.val has {len(absent)} classes that knn.train lacks, e.g. {names}")
        if recipe.knn.k > len(train_labels):
            raise DataError(f"knn.k = {recipe.knn.k}: knn.train holds {len(train_labels)} pictures")
        self._train = _Part(train, train_labels, _share(len(train_labels), here))
        self._val = _Part(val, val_labels, _share(len(val_labels), here))
        crops = (len(self._train.places) + len(self._val.places)) * channels * preprocess.crop**2
        self._keeps = crops <= _KEPT_BYTES
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._path = Path(recipe.run_dir) / "knn.csv"

    @property
    def asked(self) -> Pictures:
        """The pictures of `knn.val`."""
        return self._val.pictures

    @torch.no_grad()  # inference mode cannot put shards together
    def measure(
        self, step: int, epoch: int, backbones: Mapping[str, nn.Module]
    ) -> dict[str, float]:
        """Top-1 and top-5 in percent, by the tags of TensorBoard: `knn/teacher_top1`.

        Every process must call it. The run does not notice: see `training.inspection`.

        Args:
            step: the steps done.
            epoch: the epoch that they ended in.
            backbones: by name; the student's and the teacher's.

        Raises:
            DataError: fewer pictures than `knn.k` can be read.
        """
        device = self._here.device
        plain = {
            name: plain_backbone(backbone, self._recipe.architecture, device)
            for name, backbone in backbones.items()
        }
        banks, found = self._features(self._train, "train", plain)
        queries, asked = self._features(self._val, "val", plain)
        found, labels = _from_all(found, self._here), _labels(self._train, self._here)
        k = self._recipe.knn.k
        if int(found.sum()) < k:
            raise DataError(f"knn.k = {k}: only {int(found.sum())} of knn.train can be read")
        truth = self._val.labels.to(device)[self._val.places][asked]
        results: dict[str, dict[str, float]] = {}
        for name in plain:
            bank = _from_all(banks[name], self._here)[found]
            top1, top5, count = self._hits(bank, labels[found], queries[name][asked], truth)
            results[name] = {"top1": 100.0 * top1 / count, "top5": 100.0 * top5 / count}
        if self._here.is_main:
            # What a run measured after this step before it was resumed gives way.
            rows = RowFile(self._path, COLUMNS, start=step - 1)
            for name, scores in results.items():
                rows.write({"step": step, "epoch": epoch, "network": name, **scores})
            rows.close()
        return {
            f"knn/{name}_{score}": value
            for name, scores in results.items()
            for score, value in scores.items()
        }

    def _hits(
        self, bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor
    ) -> tuple[float, float, float]:
        """Right answers among the first and the first five, and queries, of all processes."""
        sums = torch.zeros(3, dtype=torch.float64, device=bank.device)
        chunk = max(1, _SIMILARITIES // len(bank))
        for some, right in zip(torch.split(queries, chunk), torch.split(truth, chunk), strict=True):
            ranked = classify(bank, labels, some, k=self._recipe.knn.k, classes=len(self._classes))
            hits = ranked[:, :5] == right[:, None]
            sums += torch.stack(
                (hits[:, 0].sum(), hits.any(dim=1).sum(), sums.new_tensor(len(some)))
            )
        top1, top5, count = all_reduce_sum(sums).tolist()
        if not count:
            raise DataError("none of the pictures of knn.val can be read")
        return top1, top5, count

    def _features(
        self, part: _Part, title: str, networks: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """L2-normalised features [places, D] of each network, and which places were read."""
        recipe, device = self._recipe, self._here.device
        dtype = autocast_dtype(recipe.precision, device)
        mean, std = (
            torch.tensor(values, device=device).reshape(-1, 1, 1)
            for values in (recipe.data.mean, recipe.data.std)
        )
        features: dict[str, list[Tensor]] = {name: [] for name in networks}
        read: list[Tensor] = []
        for crops, good in self._batches(part, title):
            pictures = normalise(crops.to(device, non_blocking=True), mean, std)
            for name, network in networks.items():
                with autocast(device, dtype):
                    cls: Tensor = network(pictures).cls
                features[name].append(F.normalize(cls.float(), dim=1))
            read.append(good.to(device))
        return {name: torch.cat(parts) for name, parts in features.items()}, torch.cat(read)

    def _batches(self, part: _Part, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """8-bit crops [B, C, S, S] with whether each was read, in the order of the places."""
        if title in self._kept:
            yield from self._kept[title]
            return
        loader = DataLoader(
            _Views(part, self._view, self._shape),
            batch_size=min(256, 4 * self._recipe.batch_size),
            collate_fn=_collate,
            pin_memory=self._here.device.type == "cuda",
            generator=torch.Generator(),  # a loader draws seeds: not from the run's numbers
            **worker_settings(self._recipe.data.workers),
        )
        unread: list[str] = []
        kept: list[tuple[Tensor, Tensor]] = []
        for crops, good, said in tqdm(
            loader, desc=f"k-NN {title}", leave=False, disable=not self._here.is_main
        ):
            unread += said
            if self._keeps:
                kept.append((crops, good))
            yield crops, good
        if unread:
            tqdm.write(
                f"k-NN leaves out {len(unread)} of knn.{title}: {unread[0]}", file=sys.stderr
            )
        if self._keeps:
            self._kept[title] = kept


class _Views(Dataset[tuple[Tensor, bool, str]]):
    def __init__(
        self,
        part: _Part,
        view: Callable[[Image.Image], Tensor],
        shape: tuple[int, int, int],
    ) -> None:
        self._part, self._view, self._shape = part, view, shape

    def __len__(self) -> int:
        return len(self._part.places)

    def __getitem__(self, i: int) -> tuple[Tensor, bool, str]:
        """The crop, whether the picture was read, and why not."""
        place, pictures = self._part.places[i], self._part.pictures
        nothing = torch.zeros(self._shape, dtype=torch.uint8)
        if place < 0:
            return nothing, False, ""
        try:
            picture = decode(pictures.read(place), pictures.names[place])
        except (DataError, OSError) as error:
            return nothing, False, str(error)
        return self._view(picture).round().to(torch.uint8), True, ""


def _collate(samples: list[tuple[Tensor, bool, str]]) -> tuple[Tensor, Tensor, list[str]]:
    crops, good, said = zip(*samples, strict=True)
    return torch.stack(crops), torch.tensor(good), [words for words in said if words]


def _share(count: int, here: World) -> list[int]:
    """Every process's places in equal number: rank, rank + size, ...; -1 where none is left.

    Networks whose weights are in shards, and gathering, need every process to do as much.
    """
    most = -(-count // here.size)
    places = [here.rank + i * here.size for i in range(most)]
    return [place if place < count else -1 for place in places]


def _labels(part: _Part, here: World) -> Tensor:
    return _from_all(part.labels.to(here.device)[part.places], here)


def _from_all(own: Tensor, here: World) -> Tensor:
    """What each process has, [n, ...], one after the other on every process, [size * n, ...]."""
    if here.size == 1:
        return own
    values = own.new_zeros(
        (here.size, *own.shape), dtype=torch.promote_types(own.dtype, torch.uint8)
    )
    values[here.rank] = own
    return all_reduce_sum(values).flatten(0, 1).to(own.dtype)

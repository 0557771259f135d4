"""DINO pretraining as a textbook tells it: correct, and with none of the means to be fast.

What `benchmarks/training.py` compares the project's training with. The method, the network and
the optimizer's settings are the same; each part is written as one reads it in the paper and in
common implementations: a forward for each resolution, a cross-entropy for each pair of crops, an
EMA parameter by parameter, clipping with a host's look at every norm, torchvision's augmentations
picture by picture in the loader's workers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from backbone.preprocess import IMAGENET_MEAN, IMAGENET_STD


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        if self.drop_path == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_path
        mask = keep + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * mask.floor_()


class Vit(nn.Module):
    def __init__(self, size: int, patch: int, dim: int, depth: int, heads: int, drop: float):
        super().__init__()
        self.patch = patch
        self.side = size // patch
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        nn.init.trunc_normal_(self.pos, std=0.02)
        nn.init.trunc_normal_(self.cls, std=0.02)
        rates = torch.linspace(0, drop, depth).tolist()
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1] // self.patch
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1)
        pos = self.pos
        if side != self.side:
            grid = pos[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(side, side), mode="bicubic")
            pos = torch.cat((pos[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
        x = x + pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Head(nn.Module):
    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        layers = [nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(2048, 256))
        last = nn.utils.parametrizations.weight_norm(nn.Linear(256, k, bias=False))
        last.parametrizations.weight.original0.data.fill_(1)
        last.parametrizations.weight.original0.requires_grad = False
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class MultiCropWrapper(nn.Module):
    """Runs the backbone once for each resolution, the head once for all."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        sizes = torch.tensor([crop.shape[-1] for crop in crops])
        _, counts = torch.unique_consecutive(sizes, return_counts=True)
        outputs, start = [], 0
        for end in counts.cumsum(0).tolist():
            outputs.append(self.backbone(torch.cat(tuple(crops[start:end]))))
            start = end
        return self.head(torch.cat(outputs))


class DinoLoss(nn.Module):
    """A cross-entropy for each pair of crops."""

    center: Tensor

    def __init__(self, k: int, crops: int) -> None:
        super().__init__()
        self.crops = crops
        self.register_buffer("center", torch.zeros(1, k))

    def forward(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        students = (student / 0.1).chunk(self.crops)
        teachers = F.softmax((teacher - self.center) / temperature, dim=-1).detach().chunk(2)
        total, terms = torch.zeros((), device=student.device), 0
        for i, q in enumerate(teachers):
            for v, s in enumerate(students):
                if v == i:
                    continue
                total = total + torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
                terms += 1
        with torch.no_grad():
            self.center = self.center * 0.9 + teacher.mean(dim=0, keepdim=True) * 0.1
        return total / terms


class Textbook:
    """Student, teacher, loss and optimizer, and one step of them."""

    def __init__(
        self,
        make_backbone: Callable[[float], nn.Module],
        dim: int,
        *,
        k: int,
        crops: int,
        drop_path: float,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.student = MultiCropWrapper(make_backbone(drop_path), Head(dim, k)).to(device)
        self.teacher = MultiCropWrapper(make_backbone(0.0), Head(dim, k)).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        self.loss = DinoLoss(k, crops).to(device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, weight_decay=0.04)
        self.dtype = dtype

    def step(self, crops: Sequence[Tensor]) -> float:
        with torch.autocast(crops[0].device.type, self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                teacher = self.teacher(crops[:2])
            student = self.student(crops)
            loss = self.loss(student, teacher, 0.04)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm(2)
                coefficient = 3.0 / (norm + 1e-6)
                if coefficient < 1:
                    parameter.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for ours, theirs in pairs:
                theirs.data.mul_(0.996).add_((1 - 0.996) * ours.detach().data)
        return loss.item()


class MultiCrop(Dataset[list[Tensor]]):
    """Files -> crops, by torchvision's transforms, one picture at a time."""

    def __init__(
        self, files: Sequence[Path], *, size: int, local: int, count: int, local_scale: float = 0.4
    ) -> None:
        self.files = files
        flip_and_jitter = [
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
        ]
        end = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

        def crop(side: int, scale: tuple[float, float], *steps: nn.Module) -> transforms.Compose:
            first = transforms.RandomResizedCrop(
                side, scale, interpolation=transforms.InterpolationMode.BICUBIC
            )
            return transforms.Compose([first, *flip_and_jitter, *steps, *end])

        def blur(p: float) -> nn.Module:
            kernel = transforms.GaussianBlur(9 if size > 100 else 5, sigma=(0.1, 2.0))
            return transforms.RandomApply([kernel], p=p)

        big = (local_scale, 1.0)
        solarize = transforms.RandomSolarize(128, 0.2)
        self.crops = [crop(size, big, blur(1.0)), crop(size, big, blur(0.1), solarize)]
        self.crops += [crop(local, (0.05, local_scale), blur(0.5))] * count

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[Tensor]:
        with self.files[i].open("rb") as file:
            picture = Image.open(file).convert("RGB")
        return [crop(picture) for crop in self.crops]


def loader(dataset: MultiCrop, *, batch: int, workers: int) -> DataLoader[list[Tensor]]:
    return DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
    )  # fmt: skip

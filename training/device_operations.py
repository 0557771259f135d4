"""Pillow's operations on batches of 8-bit crops, on any device.

Crops are float32 [n, C, H, W] that hold whole numbers from 0 to 255, before and after each
operation: what Pillow rounds or cuts off is rounded or cut off here. `strength`, float32
[n, 1, 1, 1], is each crop's own. Nothing here waits for the device.

Sources: the arithmetic of Pillow's resize, blend, convert and box blur; the box blur's radius is of
Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering".
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from training.augmentations import SOLARIZE_THRESHOLD

_BLUR_PASSES = 3


def brightness(crops: Tensor, strength: Tensor) -> Tensor:
    """Times a factor."""
    return (crops * strength).floor_().clamp_(0, 255)


def contrast(crops: Tensor, strength: Tensor) -> Tensor:
    """From the mean grey (three channels), or from each channel's own mean, by a factor."""
    grey = luminance(crops) if crops.shape[1] == 3 else crops
    mean = (grey.sum(dim=(2, 3), keepdim=True) / grey[0, 0].numel() + 0.5).floor_()
    return _blend(mean, crops, strength)


def saturation(crops: Tensor, strength: Tensor) -> Tensor:
    """From grey, by a factor; three channels."""
    return _blend(luminance(crops), crops, strength)


def hue(crops: Tensor, strength: Tensor) -> Tensor:
    """Turns the hue by `strength` of Pillow's 256 steps (see `hue_steps`); three channels.

    Hue and saturation are rounded to 8 bits on the way, as Pillow's HSV is. Double precision for
    the hue alone: a step of it, lost to rounding, would be up to 6 levels of colour.
    """
    largest, smallest = crops.amax(dim=1), crops.amin(dim=1)
    chroma = largest - smallest
    some = chroma.clamp(min=1)
    r, g, b = (((largest - channel) / some).double() for channel in crops.unbind(dim=1))
    is_r, is_g = (largest == crops[:, 0]), (largest == crops[:, 1])
    turned = torch.where(is_r, b - g, torch.where(is_g, 2 + r - b, 4 + g - r)).float()
    turned = ((turned.double() / 6 + 1) % 1).float()  # single where Pillow stores it so
    steps = (turned.double() * 255).floor_().float()
    steps = torch.where(chroma > 0, steps, 0)
    saturated = ((chroma / largest.clamp(min=1)).double() * 255).floor_().float()

    sixths = ((steps + strength[:, 0]) % 256) * 6 / 255
    channels = []
    for first in (5.0, 3.0, 1.0):  # red, green, blue: where on the wheel each begins to fall
        k = (sixths + first) % 6
        distance = torch.minimum(k, 4 - k).clamp_(0, 1)
        channels.append((largest * (1 - saturated / 255 * distance) + 0.5).floor_())
    return torch.stack(channels, dim=1)


def hue_steps(turns: float) -> int:
    """A hue's change in turns as the whole steps that torchvision makes of it for Pillow."""
    return int(turns * 255) % 256


def grey(crops: Tensor, _: Tensor) -> Tensor:
    """Three channels of the same grey."""
    return luminance(crops).expand_as(crops)


def blur(crops: Tensor, strength: Tensor) -> Tensor:
    """Pillow's GaussianBlur: three box blurs along the rows, then three along the columns.

    `strength` is the boxes' radius (see `box_radius`). Each pass is a matrix product, in which the
    edge pixels stand for all that lies beyond them. Equal to Pillow's fixed-point sums but where
    single precision decides a tie otherwise: at radii such as exactly 1.0 or 2.0.
    """
    for _ in range(2):
        n, channels, height, width = crops.shape
        matrix = _box_matrix(strength[:, :, 0, 0], width).transpose(1, 2)
        rows = crops.flatten(1, 2)
        for _ in range(_BLUR_PASSES):
            rows = torch.bmm(rows, matrix).add_(0.5).floor_()
        crops = rows.reshape(n, channels, height, width).transpose(2, 3)
    return crops


def box_radius(sigma: float) -> float:
    """The radius of the boxes of which three in a row have the deviation `sigma`, in pixels."""
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(_BLUR_PASSES)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = np.float32(math.floor((length - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    return float(whole + part)


def solarize(crops: Tensor, _: Tensor) -> Tensor:
    """Values from `SOLARIZE_THRESHOLD` are inverted."""
    return torch.where(crops < SOLARIZE_THRESHOLD, crops, 255 - crops)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "grey": grey,
    "blur": blur,
    "solarize": solarize,
}


def luminance(crops: Tensor) -> Tensor:
    """[n, 3, H, W] -> [n, 1, H, W], ITU-R 601 as Pillow has it, in whole numbers."""
    r, g, b = crops.unbind(dim=1)
    # All sums stay below 2^24: exact in single precision.
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536).floor_()[:, None]


def crop_and_resize(
    canvas: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor, size: int
) -> Tensor:
    """Crops and resizes, antialiased bicubic, by two batched matrix products; rows, then columns.

    Pillow has the same order, but since version 13 not in every tall picture: there a pixel may
    differ by a level, at hard edges by a few.

    Args:
        canvas: uint8 [B, C, H, W]; what lies outside a picture's size is not looked at.
        sizes: float64 [B, 2], each picture's height and width.
        boxes: float64 [B, V, 4], left, top, right, bottom of V crops of each picture.
        flips: bool [B, V], left to right.
        size: of the crops, S.

    Returns:
        [V, B, C, S, S].
    """
    b, c, h, w = canvas.shape
    v = boxes.shape[1]
    left, right = boxes[..., 0], boxes[..., 2]
    # From right to left: the same places in reversed order.
    low, high = torch.where(flips, right, left), torch.where(flips, left, right)
    across = bicubic_weights(low, high, sizes[:, 1:], w, size)
    down = bicubic_weights(boxes[..., 1], boxes[..., 3], sizes[:, :1], h, size)
    pixels = canvas.to(torch.float32).reshape(b, c * h, w).transpose(1, 2)
    rows = _to_bytes(torch.bmm(across.reshape(b, v * size, w), pixels))
    rows = rows.reshape(b * v, size * c, h)
    crops = _to_bytes(torch.bmm(rows, down.reshape(b * v, size, h).transpose(1, 2)))
    # [B, V, x, C, y]
    return crops.reshape(b, v, size, c, size).permute(1, 0, 3, 4, 2).contiguous()


def bicubic_weights(low: Tensor, high: Tensor, length: Tensor, count: int, size: int) -> Tensor:
    """What each of `count` pixels gives to each of the `size` pixels that low..high is resized to.

    Args:
        low, high: float64 [B, V], edges in pixels; reversed where high < low.
        length: float64 [B, 1], the pixels that there are; those from there to `count` give nothing.

    Returns:
        float32 [B, V, size, count]; each row's sum is 1.
    """
    scale = ((high - low) / size)[..., None]
    stretch = scale.abs().clamp(min=1)
    centre = low[..., None] + (torch.arange(size, device=low.device) + 0.5) * scale
    # The centre's whole part is taken off first, so that single precision loses nothing.
    whole = centre.floor()
    offset = (whole - centre + 0.5).to(torch.float32)[..., None]
    places = torch.arange(count, device=low.device, dtype=torch.float32)
    distance = (places - whole.to(torch.float32)[..., None]).add_(offset)
    weights = _bicubic(distance.div_(stretch.to(torch.float32)[..., None]).abs_())
    weights = weights.mul_((places < length[:, :, None, None]).to(torch.float32))
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _bicubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel, a = -0.5, at distances x >= 0, which are overwritten.

    With u = max(2 - x, 0) and t = max(1 - x, 0) it is u^2 (u - 1) / 2 + t^2 (1 - 2 t).
    """
    u = x.neg_().add_(2).clamp_(min=0)
    t = u - 1
    far = u.square_().mul_(t).mul_(0.5)
    t.clamp_(min=0)
    return far.addcmul_(t.square(), 1 - 2 * t)


def _blend(start: Tensor, end: Tensor, strength: Tensor) -> Tensor:
    """From `start` (0) to `end` (1) and beyond, cut off to whole numbers of 8 bits."""
    return (start + strength * (end - start)).floor_().clamp_(0, 255)


def _to_bytes(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _box_matrix(radius: Tensor, size: int) -> Tensor:
    """[n, 1] -> [n, size, size]: a box blur as a matrix, with Pillow's 24 bits of weight.

    A box of radius r reaches floor(r) whole pixels to each side, and has the rest of its length in
    one more.
    """
    one = float(1 << 24)
    reach = radius.floor()
    inner = (one / (2 * radius + 1)).floor()
    outer = ((one - (2 * reach + 1) * inner) / 2).floor()
    reach, inner, outer = (value[..., None] for value in (reach, inner, outer))
    places = torch.arange(size, device=radius.device, dtype=torch.float32)
    distance = (places[:, None] - places).abs()
    matrix = torch.where(distance <= reach, inner, torch.where(distance == reach + 1, outer, 0))
    # What reaches beyond an edge by `beyond` pixels counts as the pixel at the edge.
    beyond = (reach[..., 0] - places).clamp(min=0)
    edge = beyond * inner[..., 0] + torch.where(places <= reach[..., 0], outer[..., 0], 0)
    matrix[:, :, 0] += edge
    matrix[:, :, -1] += edge.flip(1)
    return matrix / one

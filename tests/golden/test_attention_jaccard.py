import pytest
import torch
import torch.nn.functional as F

from tests.golden.conftest import Golden
from training.evaluation.jaccard import cells, score
from training.evaluation.masks import ObjectMask


def test_jaccard_of_the_originals_masks(golden: Golden) -> None:
    """Of each head's kept patches, upsampled as the original does it, and a disc."""
    tensors, settings = golden.tensors("vit"), golden["vit"]
    patch = settings["patch_size"]
    for i in range(settings["inputs"]):
        height, width = (side // patch * patch for side in tensors[f"input.{i}"].shape[-2:])
        grid = (height // patch, width // patch)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        disc = (y - 0.4 * height) ** 2 + (x - 0.6 * width) ** 2 < (0.3 * height) ** 2
        mask = ObjectMask(disc.numpy(), torch.ones_like(disc).numpy())
        inside, counted = (part[None] for part in cells(mask, grid))
        attention = tensors[f"attention.{i}"][:1, :, 0, 1:]
        found = score(attention, inside, counted, settings["mass_kept"])
        for m, mass in enumerate(settings["mass_kept"]):
            kept = tensors[f"mask_{mass}.{i}"].reshape(1, -1, *grid).float()
            whole = F.interpolate(kept, scale_factor=patch, mode="nearest")[0].bool()
            expected = (whole & disc).sum(dim=(1, 2)) / (whole | disc).sum(dim=(1, 2))
            assert found[0, m, :-1].tolist() == pytest.approx(expected.tolist())

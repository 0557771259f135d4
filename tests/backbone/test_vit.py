from typing import Any

import pytest
import torch

from backbone.architectures import VITS, Architecture
from backbone.stochastic_depth import Choice, draw_choices, draw_factors
from backbone.vit import VisionTransformer


def network(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3}
    return VisionTransformer(**{**sizes, **changes}).eval()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 32, 32), r"\[3, 32, 32\].*\[batch, 3, height, width\]"),
        ((1, 1, 32, 32), r"\[1, 1, 32, 32\].*\[batch, 3, height, width\]"),
        ((1, 3, 7, 32), "7 x 32 pixels hold no patch of 8"),
        ((1, 3, 32, 4), "32 x 4 pixels"),
        ((1, 3, 0, 8), "0 x 8 pixels"),
    ],
)
def test_pictures_of_a_wrong_shape(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network()(torch.zeros(shape))


@pytest.mark.parametrize("last_blocks", [0, 4, -1])
def test_blocks_that_are_not_there(last_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"last_blocks is {last_blocks}, not 1 to 3"):
        network()(torch.zeros(1, 3, 8, 8), last_blocks=last_blocks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 33}, "image_size 32 is smaller than patch_size 33"),
        ({"num_heads": 5}, "embed_dim 12 is not a multiple of num_heads 5"),
        ({"drop_path_rate": 1.0}, "drop_path_rate 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate -0.1"),
    ],
)
def test_networks_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network(**changes)


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (5, 1), (11, 13)])
def test_any_grid_of_patches(patch: int, grid: tuple[int, int]) -> None:
    vit = network(patch_size=patch, image_size=4 * patch)
    h, w = grid
    out = vit(torch.randn(2, 3, h * patch, w * patch), last_blocks=2, attention="full")
    assert out.grid == grid
    assert out.cls.shape == (2, 12)
    assert out.patches.shape == (2, h * w, 12)
    assert [tokens.shape for tokens in out.blocks] == [(2, 1 + h * w, 12)] * 2
    assert out.attention is not None
    assert out.attention.shape == (2, 3, 1 + h * w, 1 + h * w)
    assert torch.equal(out.blocks[-1][:, 0], out.cls)
    assert torch.equal(out.blocks[-1][:, 1:], out.patches)


@pytest.mark.parametrize("side", range(1, 40))
def test_positions_have_the_grids_size_whatever_it_is(side: int) -> None:
    vit = network(image_size=8 * 7)
    assert vit.positions(side, 2 * side).shape == (1, 1 + 2 * side * side, 12)


def test_positions_of_small_grids_are_kept_where_weights_are_fixed() -> None:
    vit = network(image_size=8 * 7)
    with torch.no_grad():
        made = vit.positions(3, 5)
        assert vit.positions(3, 5) is not made
        vit.fixed_weights = True
        kept = vit.positions(3, 5)
        assert torch.equal(kept, made)
        assert vit.positions(3, 5) is kept
        assert not torch.equal(vit.positions(5, 3), kept)
        assert vit.positions(16, 17) is not vit.positions(16, 17)  # many patches
        for side in range(1, 100):
            vit.positions(1, side)
            assert 1 <= len(vit._kept_positions) <= 16
        assert torch.equal(vit.positions(3, 5), made)


def test_patches_run_row_by_row() -> None:
    vit = network(depth=1)
    pictures = torch.zeros(1, 3, 16, 24)
    marked = pictures.clone()
    marked[..., 8:16, 16:24] = 3.0  # second row, third column
    changed = (vit(marked).patches - vit(pictures).patches).norm(dim=-1)[0]
    assert changed.argmax() == 1 * 3 + 2


def test_attention_sums_to_one_and_its_row_is_of_the_whole() -> None:
    vit, pictures = network(), torch.randn(2, 3, 16, 40)
    cls = vit(pictures, attention="cls").attention
    full = vit(pictures, attention="full").attention
    assert cls is not None
    assert full is not None
    assert cls.shape == (2, 3, 11)
    torch.testing.assert_close(cls.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 3, 11))
    torch.testing.assert_close(cls, full[:, :, 0])
    assert vit(pictures).attention is None


def test_pictures_of_a_batch_do_not_meet() -> None:
    vit, pictures = network(), torch.randn(3, 3, 16, 16)
    together = vit(pictures).cls
    alone = torch.cat([vit(one[None]).cls for one in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_drop_path_acts_in_training_alone() -> None:
    vit, pictures = network(drop_path_rate=0.5), torch.randn(16, 3, 16, 16)
    plain = network()
    plain.load_state_dict(vit.state_dict())
    assert torch.equal(vit(pictures).cls, plain(pictures).cls)
    assert torch.equal(plain.train()(pictures).cls, plain.eval()(pictures).cls)
    vit.train()
    assert not torch.equal(vit(pictures).cls, vit(pictures).cls)


def test_a_block_that_all_pictures_drop_has_gradients_of_zero() -> None:
    """Processes that train together wait for every parameter's gradient."""
    vit = network(drop_path_rate=0.99, depth=3).train()
    for batches in ([torch.randn(2, 3, 16, 16)], [torch.randn(1, 3, 16, 16)] * 2):
        for seed in range(8):
            vit.zero_grad()
            torch.manual_seed(seed)
            vit.forward_cls(batches).sum().backward()
            torch.manual_seed(seed)
            vit(batches[0]).cls.sum().backward()
            missing = [name for name, each in vit.named_parameters() if each.grad is None]
            assert missing == []


def test_drop_path_rises_linearly() -> None:
    assert network(drop_path_rate=0.4, depth=5).drop_path_rates == pytest.approx(
        [0.0, 0.1, 0.2, 0.3, 0.4]
    )
    assert network(drop_path_rate=0.4, depth=1).drop_path_rates == [0.0]


def test_drop_path_is_the_textbooks() -> None:
    """Each branch of each picture: x + mask / keep * branch, with the same masks."""
    vit = network(drop_path_rate=0.5, depth=3).train()
    pictures = torch.randn(6, 3, 16, 16)
    torch.manual_seed(5)
    ours = vit(pictures)
    torch.manual_seed(5)
    only_cls = vit.forward_cls([pictures])
    torch.manual_seed(5)
    x, _ = vit.embed(pictures)
    b, t, d = x.shape
    for block, rate in zip(vit.blocks, vit.drop_path_rates, strict=True):
        masks = (
            [(torch.rand(b) >= rate).float()[:, None, None] for _ in range(2)]
            if rate
            else [1.0, 1.0]
        )
        attended = block.attn(block.norm1(x).flatten(0, 1), [(b, t)], "none")[0].reshape(b, t, d)
        x = x + masks[0] / (1 - rate) * attended
        x = x + masks[1] / (1 - rate) * block.mlp(block.norm2(x))
    torch.testing.assert_close(ours.cls, vit.norm(x)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(only_cls, vit.norm(x)[:, 0], rtol=1e-5, atol=1e-5)


def test_drop_path_keeps_the_mean() -> None:
    rate, count = 0.25, 4000
    groups = [(count, 2), (count, 1)]
    ((first, choice),) = draw_choices([rate], groups)
    assert isinstance(first, Choice)
    assert isinstance(choice, Choice)
    assert not torch.equal(first.pictures, choice.pictures)  # each branch has its own
    assert draw_factors([rate], groups).mean().item() == pytest.approx(1.0, abs=0.02)
    kept = [n for n, _ in choice.groups]
    assert sum(kept) / (2 * count) == pytest.approx(1 - rate, abs=0.02)
    assert len(choice.rows) == kept[0] * 2 + kept[1]
    pairs = choice.rows[: 2 * kept[0]].reshape(-1, 2)
    assert bool((pairs[:, 0] % 2 == 0).all())  # a picture's tokens go together
    assert bool((pairs[:, 1] == pairs[:, 0] + 1).all())
    assert int(choice.rows[2 * kept[0] :].min()) >= 2 * count


def test_a_batch_of_which_everything_is_dropped() -> None:
    vit = network(drop_path_rate=0.99, depth=2).train()
    torch.manual_seed(0)
    cls = vit.forward_cls([torch.randn(2, 3, 16, 16), torch.randn(1, 3, 8, 8)])
    cls.sum().backward()
    assert bool(cls.isfinite().all())


@pytest.mark.parametrize("recompute", [False, True])
def test_paths_multiplied_by_zero_are_those_left_out(recompute: bool) -> None:
    """Both forms of stochastic depth, of which a GPU takes the second, and their gradients."""
    vit = network(drop_path_rate=0.6, depth=4).train()
    vit.recompute_blocks = recompute
    batches = [torch.randn(5, 3, 16, 16), torch.randn(7, 3, 8, 12)]
    weights = torch.randn(12, vit.embed_dim)
    found = []
    for vit.fixed_shapes in (False, True):
        torch.manual_seed(2)
        cls = vit.forward_cls(batches)
        gradients = torch.autograd.grad((cls * weights).sum(), list(vit.parameters()))
        torch.manual_seed(2)
        found.append([cls, *gradients, vit(batches[0]).cls])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
def test_compiled_blocks_of_fixed_shapes_share_their_graphs() -> None:
    """As training compiles them: nothing is compiled again, whatever chance drops."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, compiled = (network(drop_path_rate=0.5, depth=6).train() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    batches = [torch.randn(5, 3, 16, 16), torch.randn(7, 3, 8, 8)]
    for vit in (plain, compiled):
        vit.fixed_shapes = True
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    for seed in range(4):
        found = []
        for vit in (plain, compiled):
            torch.manual_seed(seed)
            cls = vit.forward_cls(batches)
            found.append([cls, *torch.autograd.grad(cls.square().sum(), list(vit.parameters()))])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    # The first block, which never drops; those between; and the last, for CLS alone.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("recompute", [False, True])
def test_several_sizes_in_one_forward_are_what_each_gives_alone(recompute: bool) -> None:
    vit = network(depth=3)
    vit.recompute_blocks = recompute
    batches = [torch.randn(3, 3, 16, 16), torch.randn(5, 3, 8, 12), torch.randn(1, 3, 24, 8)]
    together = vit.forward_cls(batches)
    alone = torch.cat([vit(batch).cls for batch in batches])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(together)
    gradients = [
        torch.autograd.grad((cls * weights).sum(), list(vit.parameters()))
        for cls in (together, alone)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_recomputing_draws_the_same_paths() -> None:
    vit = network(drop_path_rate=0.5, depth=3).train()
    pictures, gradients = torch.randn(4, 3, 16, 16), []
    for vit.recompute_blocks in (False, True):
        torch.manual_seed(1)
        cls = vit.forward_cls([pictures])
        gradients.append(torch.autograd.grad(cls.square().sum(), vit.patch_embed.proj.weight)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", VITS)
def test_every_architecture_can_be_described_without_memory(name: str) -> None:
    described = Architecture(name=name)
    with torch.device("meta"):
        built = described.build()
    assert built.embed_dim == described.embed_dim
    assert built.num_heads == described.num_heads
    parameters = sum(p.numel() for p in built.parameters()) / 1e6
    papers = {"vit_tiny": 5.5, "vit_small": 21.7, "vit_base": 85.8, "vit_large": 303.3}
    assert parameters == pytest.approx(papers[name], abs=0.1)


def test_what_is_left_over_of_a_patch_is_not_seen() -> None:
    vit, pictures = network(patch_size=5, image_size=14), torch.randn(2, 3, 14, 23)
    assert vit.pos_embed.shape == (1, 1 + 2 * 2, 12)
    features = vit(pictures)
    assert features.grid == (2, 4)
    assert torch.equal(features.cls, vit(pictures[..., :10, :20]).cls)

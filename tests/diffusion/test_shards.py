"""Tests of `paris_p2p.diffusion.shards`."""

from pathlib import Path

import pytest
import torch

from paris_p2p.diffusion.shards import FILE_NAME, Examples, batch_indices, load_shard
from paris_p2p.errors import ConfigError

from .conftest import TOKENS, WIDTH, toy_recipe, toy_shard, write_shard


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path) -> None:
    shard = toy_shard(1)
    loaded = load_shard(write_shard(tmp_path, shard), toy_recipe(), 1)
    assert torch.equal(loaded.latents, shard.latents)
    assert torch.equal(loaded.captions, shard.captions)
    assert loaded.cluster == 1


def test_a_shard_in_half_precision_is_read_as_one_in_full(tmp_path: Path) -> None:
    shard = toy_shard(0)
    halves = {name: getattr(shard, name).half() for name in ("latents", "captions", "uncond")}
    loaded = load_shard(write_shard(tmp_path, shard, **halves), toy_recipe(), 0)
    assert loaded.captions.dtype == torch.float16
    alone = Examples([loaded]).gather(torch.tensor([3]))
    assert (alone.latents.dtype, alone.text.dtype, alone.uncond.dtype) == (
        torch.float32,
        torch.float16,
        torch.float16,
    )
    batch = Examples([loaded, shard]).gather(torch.tensor([3, 23]))
    assert {part.dtype for part in (batch.latents, batch.text, batch.uncond)} == {torch.float32}
    assert torch.equal(alone.text[0].float(), batch.text[0])
    for part in (batch.latents, batch.text):
        assert torch.allclose(part[0], part[1], rtol=1e-3, atol=1e-6) and not torch.equal(part[0], part[1])


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("captions", torch.zeros(3, TOKENS, WIDTH, dtype=torch.bfloat16), "bfloat16"),
        ("caption_index", torch.zeros(20, dtype=torch.float16), "float16"),
        ("latents", torch.zeros(20, 3, 8, 8), r"latents is .* \(20, 3, 8, 8\)"),
        ("latents", torch.zeros(20, 1, 8, 8, dtype=torch.float64), "float64"),
        ("captions", torch.zeros(3, TOKENS + 1, WIDTH), "captions"),
        ("uncond", torch.zeros(TOKENS, WIDTH + 1), "uncond"),
        ("caption_index", torch.full((20,), 3), "outside its 3 captions"),
        ("caption_index", torch.full((20,), -1), "outside its 3 captions"),
        ("surprise", torch.zeros(1), "surprise"),
    ],
)
def test_a_shard_that_does_not_fit_the_recipe_is_named(
    tmp_path: Path, name: str, tensor: torch.Tensor, match: str
) -> None:
    folder = write_shard(tmp_path, toy_shard(0), **{name: tensor})
    with pytest.raises(ConfigError, match=match):
        load_shard(folder, toy_recipe(), 0)


def test_a_shard_of_another_cluster_an_empty_one_and_a_damaged_one_are_named(tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "a", toy_shard(0))
    with pytest.raises(ConfigError, match="cluster '0'"):
        load_shard(folder, toy_recipe(), 1)
    with pytest.raises(ConfigError, match="no image"):
        load_shard(write_shard(tmp_path / "b", toy_shard(0, images=0)), toy_recipe(), 0)
    (folder / FILE_NAME).write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_shard(folder, toy_recipe(), 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_shard(tmp_path / "nowhere", toy_recipe(), 0)


def test_a_batch_over_several_shards_keeps_images_captions_and_labels_together() -> None:
    shards = [toy_shard(0, images=5), toy_shard(3, images=7)]
    examples = Examples(shards)
    assert len(examples) == 12
    batch = examples.gather(torch.tensor([11, 0, 5, 4]))
    assert batch.cluster.tolist() == [3, 0, 3, 0]
    for row, (shard, local) in enumerate([(1, 6), (0, 0), (1, 0), (0, 4)]):
        assert torch.equal(batch.latents[row], shards[shard].latents[local])
        assert torch.equal(batch.text[row], shards[shard].captions[shards[shard].caption_index[local]])


def test_every_epoch_reads_every_image_once_in_another_order() -> None:
    read = torch.cat([batch_indices(0, "expert-0", 10, step, 4) for step in range(5)])  # two epochs
    first, second = read[:10], read[10:]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()


def test_the_order_depends_on_seed_role_and_step_only() -> None:
    def order(seed: int, role: str) -> list[int]:
        indices: list[int] = batch_indices(seed, role, 50, 3, 16).tolist()
        return indices

    assert order(0, "expert-0") == order(0, "expert-0")
    assert order(0, "expert-0") != order(1, "expert-0")
    assert order(0, "expert-0") != order(0, "expert-1")


def test_a_batch_larger_than_the_data_repeats_it() -> None:
    assert batch_indices(0, "router", 3, 0, 8).bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])

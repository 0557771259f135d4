from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backbone.artifact import Artifact, ArtifactError, read_artifact, write_artifact
from backbone.whitening import Whitening, fit_whitening


def correlated(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator)
    return torch.randn(count, dimension, generator=generator) @ mixing + 3.0


def test_the_background_has_no_preferred_direction_left() -> None:
    background = correlated(4000, 16)
    whitening = fit_whitening(background)
    centred = F.normalize(background, dim=1) - whitening.mean
    projected = centred @ whitening.matrix
    covariance = projected.T @ projected / len(projected)
    torch.testing.assert_close(covariance, torch.eye(16), rtol=0, atol=1e-3)


def test_length_does_not_matter_and_results_have_unit_length() -> None:
    whitening = fit_whitening(correlated(100, 8))
    queries = correlated(5, 8, seed=1)
    result = whitening.apply(queries)
    torch.testing.assert_close(result, whitening.apply(7.0 * queries), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(5), rtol=0, atol=1e-5)


def test_a_direction_without_variance_stays_finite() -> None:
    background = correlated(100, 8)
    background[:, 3] = 0.0
    assert fit_whitening(background).apply(background).isfinite().all()


def test_too_few_pictures() -> None:
    with pytest.raises(ValueError, match="at least 16 pictures, not 15"):
        fit_whitening(torch.randn(15, 8))


def test_it_travels_in_the_artifact(artifact: Artifact, tmp_path: Path) -> None:
    dimension = artifact.architecture.embed_dim
    whitening = fit_whitening(correlated(2 * dimension, dimension))
    plain = write_artifact(artifact, tmp_path / "plain.safetensors")
    path = tmp_path / "whitened.safetensors"
    assert write_artifact(replace(artifact, whitening=whitening), path) != plain
    read = read_artifact(path).whitening
    assert read is not None
    assert torch.equal(read.mean, whitening.mean)
    assert torch.equal(read.matrix, whitening.matrix)
    assert read_artifact(tmp_path / "plain.safetensors").whitening is None


def test_a_whitening_that_does_not_fit(artifact: Artifact, tmp_path: Path) -> None:
    dimension = artifact.architecture.embed_dim
    mean = torch.zeros(dimension)
    large = replace(artifact, whitening=Whitening(mean=mean, matrix=torch.eye(dimension + 1)))
    with pytest.raises(ArtifactError, match=r"whitening\.matrix .* not float32"):
        write_artifact(large, tmp_path / "m.safetensors")
    nan = replace(artifact, whitening=Whitening(mean=mean, matrix=torch.eye(dimension) * torch.nan))
    with pytest.raises(ArtifactError, match="not finite"):
        write_artifact(nan, tmp_path / "m.safetensors")


def test_half_a_whitening_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_artifact(artifact, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), "whitening.mean": torch.zeros(artifact.architecture.embed_dim)}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"whitening\.matrix is missing"):
        read_artifact(path)

"""k-means and truncated singular values against what defines them, in float64."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths import kmeans as clustering
from exporter.maths.kmeans import kmeans, rounds
from exporter.maths.lowrank import truncated


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def instances(count: int = 1000) -> list[tuple[Tensor, int, int]]:
    """Points, clusters and a seed each; every third has points that are equal."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for seed in range(count):
        n, d = torch.randint(1, 24, (2,), generator=generator).tolist()
        points = torch.randn(n, d, generator=generator, dtype=torch.float64)
        points = points.round() if seed % 3 == 0 else points
        found.append((points, int(torch.randint(1, n + 1, (1,), generator=generator)), seed))
    return found


# ---- k-means -----------------------------------------------------------------------------------------------------


def test_what_defines_a_clustering_holds_on_a_thousand_instances() -> None:
    for points, clusters, seed in instances():
        history = list(rounds(points, clusters, seed))
        found = history[-1]
        errors = [each.error for each in history]
        distances = torch.cdist(points, found.centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        own = distances.gather(1, found.labels[:, None])[:, 0]
        means = torch.stack([points[found.labels == label].mean(0) for label in range(clusters)])

        assert all(after < before for before, after in pairwise(errors))
        assert sorted(set(found.labels.tolist())) == list(range(clusters))
        assert torch.allclose(found.centres, means, rtol=1e-9, atol=1e-12)
        assert found.error == pytest.approx(float(own.sum()), rel=1e-9, abs=1e-12)
        assert bool((own <= distances.min(1).values + 1e-9).all())  # nobody is nearer to another centre


def test_as_many_clusters_as_points_are_the_points() -> None:
    for points, _, seed in instances(200):
        found = kmeans(points, len(points), seed)
        assert torch.equal(found.centres[found.labels], points)
        assert found.error == 0


def test_one_cluster_is_the_mean() -> None:
    points = normal(30, 5)
    found = kmeans(points, 1)
    assert torch.allclose(found.centres[0], points.mean(0), rtol=1e-12)
    assert found.error == pytest.approx(float((points - points.mean(0)).square().sum()), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_clusters_that_are_there_are_found(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 8, (200,), generator=generator)
    points = normal(8, 16, seed=seed)[labels] * 3 + normal(200, 16, seed=seed + 99) * 0.05

    found = kmeans(points, 8, seed)

    same = labels[:, None] == labels
    assert torch.equal(found.labels[:, None] == found.labels, same)


def test_points_of_a_kind_that_leave_clusters_without_any_fill_them() -> None:
    points = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    found = kmeans(points, 3, seed=5)
    assert set(found.labels.tolist()) == {0, 1, 2}
    assert found.error == 0


def test_an_empty_cluster_takes_the_farthest_point_that_is_not_alone() -> None:
    labels, distances = torch.tensor([0, 0, 0, 1, 3]), torch.tensor([0.1, 5.0, 2.0, 9.0, 0.0])
    filled = clustering._filled(labels, distances, torch.tensor([3, 1, 0, 1]))
    assert filled.tolist() == [0, 2, 0, 1, 3]
    two = clustering._filled(torch.tensor([0, 0, 0]), torch.tensor([1.0, 3.0, 2.0]), torch.tensor([3, 0, 0]))
    assert two.tolist() == [0, 1, 2]


def test_the_same_seed_gives_the_same_clusters_and_another_may_not() -> None:
    points = normal(60, 4)
    first, again, other = kmeans(points, 9, 1), kmeans(points, 9, 1), kmeans(points, 9, 2)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.centres, again.centres)
    assert not torch.equal(first.labels, other.labels)


def test_what_torch_draws_elsewhere_changes_no_cluster() -> None:
    points = normal(60, 4)
    torch.manual_seed(1)
    first = kmeans(points, 9)
    torch.manual_seed(2)
    assert torch.equal(kmeans(points, 9).labels, first.labels)


def test_distances_at_once_change_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    points = normal(60, 4)
    whole = kmeans(points, 9)
    monkeypatch.setattr(clustering, "AT_ONCE", 20)
    assert torch.equal(kmeans(points, 9).labels, whole.labels)


def test_rounds_end(monkeypatch: pytest.MonkeyPatch) -> None:
    points = normal(300, 2)
    assert 5 < len(list(rounds(points, 12))) <= clustering.ROUNDS
    monkeypatch.setattr(clustering, "ROUNDS", 3)
    assert len(list(rounds(points, 12))) == 3


def test_only_the_latest_rounds_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[clustering.Clusters]] = []
    settled = clustering._settled

    def noting(points: Tensor, labels: Tensor, clusters: int) -> clustering.Clusters:
        assert sum(each() is not None for each in alive) <= 2  # the latest, and the one before it in its caller's hands
        found = settled(points, labels, clusters)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(clustering, "_settled", noting)
    kmeans(normal(300, 2), 12)
    assert len(alive) > 5


def test_many_draws_of_the_first_centres_follow_the_squared_distances() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    second = {0: [1, 9], 1: [1, 4], 2: [9, 4]}  # squared distances from the first centre to the others
    pairs: dict[tuple[float, float], int] = {}
    for seed in range(3000):
        a, b = clustering._first_centres(points, 2, seed)[:, 0].tolist()
        pairs[a, b] = pairs.get((a, b), 0) + 1
    for first, place in ((0, 0.0), (1, 1.0), (2, 3.0)):
        others = [p for p in (0.0, 1.0, 3.0) if p != place]
        seen = [pairs[place, other] for other in others]
        share, expected = seen[0] / sum(seen), second[first][0] / sum(second[first])
        assert share == pytest.approx(expected, abs=5 * (expected * (1 - expected) / sum(seen)) ** 0.5)


@pytest.mark.parametrize("clusters", [0, 5, -1])
def test_clusters_that_are_none_or_too_many_are_refused(clusters: int) -> None:
    with pytest.raises(WeightError, match=rf"{clusters} clusters of 4 rows are not possible; give 1 to 4"):
        kmeans(normal(4, 3), clusters)


def test_points_that_are_not_finite_are_refused() -> None:
    points = normal(4, 3)
    points[2, 1] = float("inf")
    with pytest.raises(WeightError, match="not finite; its rows have no distances"):
        kmeans(points, 2)


# ---- low rank ----------------------------------------------------------------------------------------------------


@given(out=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99), dtype=st.sampled_from(["f", "d"]))
@settings(max_examples=100, deadline=None)
def test_what_a_truncation_misses_are_the_singular_values_that_it_drops(
    out: int, width: int, seed: int, dtype: str
) -> None:
    matrix = normal(out, width, seed=seed).to(torch.float32 if dtype == "f" else torch.float64)
    lost = []
    for rank in range(min(out, width) + 1):
        left, right, values = truncated(matrix, rank)
        assert (left.shape, right.shape) == ((out, rank), (rank, width))
        lost.append(float((matrix.double() - left @ right).square().sum()))
        assert lost[-1] == pytest.approx(float(values[rank:].square().sum()), rel=1e-9, abs=1e-12)
    assert all(more <= less for less, more in pairwise(lost))
    assert lost[-1] < 1e-12


def test_singular_values_are_split_evenly() -> None:
    left, right, values = truncated(normal(9, 14), 5)
    assert torch.allclose(left.T @ left, torch.diag(values[:5]), rtol=1e-9, atol=1e-12)
    assert torch.allclose(right @ right.T, torch.diag(values[:5]), rtol=1e-9, atol=1e-12)


def test_matrices_are_truncated_together_as_one_by_one() -> None:
    several = normal(3, 6, 8)
    left, right, values = truncated(several, 2)
    for index, matrix in enumerate(several):
        alone = truncated(matrix, 2)
        assert torch.allclose(left[index] @ right[index], alone[0] @ alone[1], rtol=1e-9, atol=1e-12)
        assert torch.allclose(values[index], alone[2], rtol=1e-9)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_a_matrix_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(WeightError, match=rf"a 3 x 7 matrix has no rank {rank}; give 0 to 3"):
        truncated(normal(3, 7), rank)


def test_a_matrix_that_is_not_finite_has_no_singular_values() -> None:
    with pytest.raises(WeightError, match="it has no singular values"):
        truncated(torch.full((2, 2), float("nan")), 1)

"""k-means: points in k clusters, each near the mean of its own.

Source: Lloyd, 1982; first centres by k-means++, Arthur and Vassilvitskii, 2007. Decides what they leave open, so that
runs repeat: a generator of its own; a point moves only to a centre that is strictly nearer; a cluster that loses all
its points takes the farthest point of those that share a cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from exporter.errors import WeightError

ROUNDS = 100
AT_ONCE = 2**24  # distances in memory together


@dataclass(frozen=True, eq=False)
class Clusters:
    """Points and the clusters that they are in.

    Args:
        centres: [clusters, channels], float64, each the mean of its points.
        labels: [points], int64: every cluster has at least one point.
        error: Squared distances of all points to their centres, summed.
    """

    centres: Tensor
    labels: Tensor
    error: float


def kmeans(points: Tensor, clusters: int, seed: int = 0) -> Clusters:
    """Cluster the rows of a matrix: Lloyd's rounds until no point moves, or `ROUNDS` of them.

    Args:
        points: [points, channels], any float type; computed in float64 where the points lie.
        clusters: 1..points.
        seed: Of the first centres, 0..2^63 - 1.

    Raises:
        WeightError: there are fewer points than clusters, or none are asked for, or a value is not finite.
    """
    found = deque(rounds(points, clusters, seed), maxlen=1)  # a hundred rounds of centres may be gigabytes
    return found[0]


def rounds(points: Tensor, clusters: int, seed: int = 0) -> Iterator[Clusters]:
    """What each round of `kmeans` leaves, its error under that of the round before."""
    if not 1 <= clusters <= len(points):
        raise WeightError(f"{clusters} clusters of {len(points)} rows are not possible; give 1 to {len(points)}")
    if not bool(points.isfinite().all()):
        raise WeightError("the matrix holds values that are not finite; its rows have no distances")
    points = points.double()
    nowhere = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    labels = _nearest(points, _first_centres(points, clusters, seed), nowhere)
    found = _settled(points, labels, clusters)
    yield found
    for _ in range(1, ROUNDS):
        after = _settled(points, _nearest(points, found.centres, found.labels), clusters)
        if not after.error < found.error:  # nothing moved, or it moved by rounding only
            return
        found = after
        yield found


def _first_centres(points: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++: each next centre is a point, drawn by its squared distance to the nearest centre so far."""
    generator = torch.Generator().manual_seed(seed)
    sizes = points.square().sum(1)
    weights = torch.ones_like(sizes)
    chosen: list[int] = []
    for _ in range(clusters):
        drawn = _drawn(weights, generator)
        distances = (sizes + sizes[drawn] - 2 * (points @ points[drawn])).clamp(min=0)
        weights = torch.minimum(weights, distances) if chosen else distances
        weights[drawn] = 0  # not drawn twice, whatever rounding leaves of its distance to itself
        chosen.append(drawn)
    return points[chosen]


def _drawn(weights: Tensor, generator: torch.Generator) -> int:
    """An index, as likely as its weight; where all weights are 0, the last."""
    up_to = weights.cumsum(0)
    place = torch.rand(1, generator=generator, dtype=torch.float64).to(weights.device) * up_to[-1]
    return min(int(torch.searchsorted(up_to, place, right=True)), len(weights) - 1)


def _nearest(points: Tensor, centres: Tensor, labels: Tensor) -> Tensor:
    """Labels of the nearest centres; a point stays where it is, unless another centre is strictly nearer."""
    sizes, parts = centres.square().sum(1), []
    for some, own in zip(*(torch.split(part, max(1, AT_ONCE // len(centres))) for part in (points, labels))):
        distances = torch.addmm(sizes, some, centres.T, alpha=-2)  # [points, clusters], less the point's own size
        least, nearest = distances.min(1)
        parts.append(torch.where(least < distances.gather(1, own[:, None])[:, 0], nearest, own))
    return torch.cat(parts)


def _settled(points: Tensor, labels: Tensor, clusters: int) -> Clusters:
    """Clusters of some labels, none empty, each with its mean."""
    centres = _means(points, labels, clusters)
    counts = torch.bincount(labels, minlength=clusters)
    if not bool(counts.all()):
        labels = _filled(labels, (points - centres[labels]).square().sum(1), counts)
        centres = _means(points, labels, clusters)
    return Clusters(centres, labels, float((points - centres[labels]).square().sum()))


def _means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Mean of each cluster, [clusters, channels]; of an empty one, zeros."""
    members = one_hot(labels, clusters).to(points.dtype)  # [points, clusters]: a product sums in the same order always
    return members.T @ points / members.sum(0).clamp(min=1)[:, None]


def _filled(labels: Tensor, distances: Tensor, counts: Tensor) -> Tensor:
    """Give every empty cluster the point that is farthest from its centre, of those that are not alone in theirs."""
    filled, left = labels.tolist(), counts.tolist()
    empty = [cluster for cluster, count in enumerate(left) if count == 0]
    for point in distances.argsort(descending=True, stable=True).tolist():
        if empty and left[filled[point]] > 1:
            left[filled[point]] -= 1
            filled[point] = empty.pop(0)
    return torch.tensor(filled, dtype=labels.dtype, device=labels.device)

"""Boxes of which only the best of those that overlap are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from targets.coreml_ios.executor.values import Value, flag, number, require_room, whole


def non_maximum_suppression(
    boxes: Tensor, scores: Tensor, iou_threshold: Value, max_boxes: Value, per_class_suppression: Value = False,
    score_threshold: Value = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Boxes by falling score without those that overlap a better one: boxes, scores, places, and how many they are.

    A box is (x, y, width, height) around its centre; its score is that of its best class. What is left over has
    zeros and the place -1. iOS 15 and 16 have boxes [n, B, 4] and scores [n, B, K] and give at least one box; iOS 17
    has no `score_threshold`, and [n, 4, B] and [n, K, B].
    """
    if score_threshold is None:
        turned = non_maximum_suppression(
            boxes.mT, scores.mT, iou_threshold, max_boxes, per_class_suppression, torch.tensor(-torch.inf)
        )
        return turned[0].mT, turned[1].mT, turned[2]
    if boxes.shape != (*scores.shape[:-1], 4):
        raise ValueError(f"boxes {list(boxes.shape)} are not four numbers for each of the scores {list(scores.shape)}")
    most = whole(max_boxes)
    require_room(len(boxes) * most * (4 + scores.shape[-1]))
    places = torch.full((len(boxes), most), -1)  # [n, max]
    for row, (box, score) in enumerate(zip(boxes, scores, strict=True)):
        kept = _kept(box, score, number(iou_threshold), number(score_threshold), most, flag(per_class_suppression))
        places[row, : len(kept)] = torch.tensor(kept, dtype=torch.long)
    return _at(boxes, places), _at(scores, places), places, (places >= 0).sum(1)


def _kept(
    boxes: Tensor, scores: Tensor, most_overlap: float, least_score: float, most: int, by_class: bool
) -> list[int]:
    best, kind = scores.max(-1)  # [B]
    order = best.argsort(descending=True, stable=True)
    left = order[best[order] >= least_score]
    left = left if len(left) else order[:1]
    kept: list[int] = []
    while len(left) and len(kept) < most:
        first, left = left[0], left[1:]
        kept.append(int(first))
        is_hidden = _overlap(boxes[first], boxes[left]) > most_overlap
        left = left[~(is_hidden & (kind[left] == kind[first]) if by_class else is_hidden)]
    return kept


def _overlap(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union, [B]; not a number where both are empty: that is never more than a bound."""
    half, halves = box[2:] / 2, others[:, 2:] / 2
    high = torch.minimum(box[:2] + half, others[:, :2] + halves)
    low = torch.maximum(box[:2] - half, others[:, :2] - halves)
    common = (high - low).clamp(min=0).prod(-1)
    return common / (box[2:].prod() + others[:, 2:].prod(-1) - common)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """`values` [n, B, c] at places [n, max]; zeros where a place is -1."""
    if not values.shape[1]:
        return values.new_zeros(*places.shape, values.shape[2])
    taken = values[torch.arange(len(values))[:, None], places.clamp(min=0)]
    return torch.where(places[..., None] >= 0, taken, torch.zeros(()))

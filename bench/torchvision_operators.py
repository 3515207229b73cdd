"""Let torchvision be imported where its compiled operators do not load, as beside torch's CPU wheel: a pytest plug-in.

    pytest -p bench.torchvision_operators ...

It goes before every plug-in that imports coremltools. Its operators are declared, and non-maximum suppression, which
coremltools' tests compare with, is written out. No test calls another one.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Places of the boxes that are kept, the best first: none overlaps a better one by more than the threshold.

    Args:
        boxes: [n, 4]: left, top, right, bottom.
        scores: [n].
        iou_threshold: Of intersection over union.
    """
    left, top, right, bottom = boxes.unbind(1)
    area = (right - left) * (bottom - top)  # [n]
    width = torch.minimum(right[:, None], right) - torch.maximum(left[:, None], left)
    height = torch.minimum(bottom[:, None], bottom) - torch.maximum(top[:, None], top)
    both = width.clamp(min=0) * height.clamp(min=0)  # [n, n]
    overlaps = (both / (area[:, None] + area - both)).double() > iou_threshold  # as there: a float32 with a float64
    kept: list[int] = []
    for place in scores.argsort(descending=True, stable=True).tolist():
        if not any(overlaps[place, better] for better in kept):
            kept.append(place)
    return torch.tensor(kept, dtype=torch.int64)


def _declare() -> Any:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "_meta_registrations.py").read_text()
    names = set(re.findall(r'register_meta\("(\w+)"', text)) | set(re.findall(r"torchvision::(\w+)", text))
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    for name in sorted(names - {"nms"}):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def _imports() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


_library = None if _imports() else _declare()  # kept: its declarations go with it
if _library is not None and _imports():
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True  # its own nms asks before it calls the operator

"""What is pruned together: how many groups stay, and where their rows are."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_width(width: int, share: float, multiple: int) -> int:
    """What stays of a width: the multiple nearest to `width * (1 - share)`, at least one; or the whole width.

    Args:
        width: Channels.
        share: To remove, 0 <= share < 1.
        multiple: >= 1.
    """
    wanted = width * (1 - share)
    below = max(multiple, int(wanted) // multiple * multiple)
    choices = [min(kept, width) for kept in (below, below + multiple)]
    return choices[0] if abs(choices[0] - wanted) <= abs(choices[1] - wanted) else choices[1]


def rows_of(groups: Tensor, size: int) -> Tensor:
    """Rows of some groups of `size` neighbours each: [groups] to [groups * size], rising where the groups rise."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()

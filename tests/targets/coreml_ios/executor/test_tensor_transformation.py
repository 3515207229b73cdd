"""Reshaping, transposing, slicing: against numpy, and against what an index formula says value by value."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from targets.coreml_ios.executor.ops import OPERATIONS


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ones(*values: bool) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def counted(*shape: int) -> Tensor:
    """0, 1, 2, ... in this shape, so that every value says where it was."""
    return torch.arange(int(np.prod(shape))).reshape(shape).float()


def same(found: Tensor, wanted: NDArray[Any]) -> None:
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert found.shape == wanted.shape


@pytest.mark.parametrize(
    ("shape", "target", "wanted"),
    [
        ((2, 3), (0, -1), (2, 3)),
        ((2, 3), (-1, 0), (2, 3)),
        ((4, 3, 2), (0, -1, 0), (4, 3, 2)),
        ((2, 50), (1, 0, -1, 0), (1, 1, 2, 50)),  # the example of the definition of iOS 17
        ((2, 3, 4), (-1, 0), (6, 4)),
        ((), (1, 1), (1, 1)),
        ((1,), (), ()),
        ((0, 3), (0, 3), (0, 3)),
    ],
)
def test_zero_in_a_shape_is_the_size_counted_from_the_last_axis(
    shape: tuple[int, ...], target: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    x = counted(*shape)
    same(OPERATIONS["reshape"](x, ints(*target)), x.numpy().reshape(wanted))


@pytest.mark.parametrize("target", [(5,), (-1, -1), (4, -1), (-2, -3), (0, 5, 0)])
def test_shape_of_another_volume_is_refused(target: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        OPERATIONS["reshape"](counted(2, 3), ints(*target))


def test_reshape_like_takes_parts_of_shapes() -> None:
    x, refs = counted(2, 3, 5, 6), [counted(2, 3, 4), counted(1, 5, 6)]
    begins, ends, masks = list(ints(0, 1)), list(ints(2, 0)), list(ones(False, True))
    assert OPERATIONS["reshape_like"](x.reshape(-1), refs, begins, ends, masks).shape == (2, 3, 5, 6)
    assert OPERATIONS["reshape_like"](counted(6), refs[0], ints(0), ints(-1), ones(False)[0]).shape == (2, 3)
    with pytest.raises(ValueError, match="shorter"):
        OPERATIONS["reshape_like"](x, refs, begins[:1], ends, masks)


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 3), (0,)), ((2, 3), (-1, 0)), ((2, 3), (1, 3)), ((), (0, 1)), ((2,), (-3, 2))]
)
def test_expand_dims_names_axes_of_the_result(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = counted(*shape)
    same(OPERATIONS["expand_dims"](x, ints(*axes)), np.expand_dims(x.numpy(), axes))


@pytest.mark.parametrize("axis", [4, -5])
def test_axis_that_the_result_does_not_have_is_refused(axis: int) -> None:
    with pytest.raises(ValueError, match="not all within a result of rank 4"):
        OPERATIONS["expand_dims"](counted(2, 3), ints(axis, 0))


def test_squeeze_drops_axes_of_one_only() -> None:
    x = counted(1, 3, 1, 2)
    assert OPERATIONS["squeeze"](x).shape == (3, 2)
    assert OPERATIONS["squeeze"](x, ints(0, 1, -2)).shape == (3, 2)
    assert OPERATIONS["squeeze"](x, ints(1)).shape == (1, 3, 1, 2)
    assert OPERATIONS["squeeze"](x, ints()).shape == (1, 3, 1, 2)
    assert OPERATIONS["squeeze"](counted(1, 1)).shape == ()
    with pytest.raises(IndexError):
        OPERATIONS["squeeze"](x, ints(4))


@pytest.mark.parametrize("perm", [(0, 1, 2), (2, 0, 1), (-1, 0, -2)])
def test_transpose_is_numpys(perm: tuple[int, ...]) -> None:
    x = counted(2, 3, 4)
    same(OPERATIONS["transpose"](x, ints(*perm)), np.transpose(x.numpy(), perm))


@pytest.mark.parametrize("perm", [(0, 1), (0, 0, 1), (0, 1, 3)])
def test_permutation_that_is_none_is_refused(perm: tuple[int, ...]) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        OPERATIONS["transpose"](counted(2, 3, 4), ints(*perm))


def test_reverse_turns_every_axis_where_none_is_named() -> None:
    x = counted(2, 3, 4)
    same(OPERATIONS["reverse"](x), x.numpy()[::-1, ::-1, ::-1])
    same(OPERATIONS["reverse"](x, ints(0, -1)), x.numpy()[::-1, :, ::-1])
    same(OPERATIONS["reverse"](x, ints()), x.numpy())


@pytest.mark.parametrize(("seq", "batch"), [(0, 1), (1, 0), (2, 0), (-1, 1), (1, -1)])
def test_reverse_sequence_turns_the_first_entries_of_each_row(seq: int, batch: int) -> None:
    x = counted(3, 4, 5)
    lengths = [int(value) for value in torch.arange(x.shape[batch]) % (x.shape[seq] + 1)]
    wanted = x.numpy().copy()
    for row, length in enumerate(lengths):
        part = np.moveaxis(wanted, (batch, seq), (0, 1))[row]
        part[:length] = part[:length][::-1].copy()
    same(OPERATIONS["reverse_sequence"](x, ints(*lengths), ints(seq)[0], ints(batch)[0]), wanted)


@pytest.mark.parametrize("lengths", [(5, 0), (-1, 0), (1,), (1, 1, 1)])
def test_lengths_that_no_row_has_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not 2 numbers from 0 to 4"):
        OPERATIONS["reverse_sequence"](counted(2, 4), ints(*lengths), 1, 0)


def slices(rng: random.Random, size: int) -> tuple[int, int, int, bool, bool, bool]:
    step = rng.choice([-3, -2, -1, 1, 2, 3])
    ends = [rng.randint(-size - 2, size + 2) for _ in range(2)]
    return *ends, step, rng.random() < 0.3, rng.random() < 0.3, False  # type: ignore[return-value]


def test_slices_are_numpys_whatever_the_masks_and_steps() -> None:
    rng = random.Random(0)
    for _ in range(300):
        x = counted(*(rng.randint(1, 5) for _ in range(rng.randint(1, 4))))
        every = [slices(rng, size) for size in x.shape]
        wanted = x.numpy()[tuple(slice(None if c else a, None if d else b, s) for a, b, s, c, d, _ in every)]
        begin, end, stride, *masks = (list(one) for one in zip(*every))
        given = [ints(*begin), ints(*end), ints(*stride), *(ones(*mask) for mask in masks)]
        same(OPERATIONS["slice_by_index"](x, *given), wanted)
        update = torch.rand(wanted.shape)
        changed = x.numpy().copy()
        changed[tuple(slice(None if c else a, None if d else b, s) for a, b, s, c, d, _ in every)] = update.numpy()
        same(OPERATIONS["slice_update"](x, update, *given), changed)
        same(x, counted(*x.shape).numpy())  # the tensor that is updated stays as it was


def test_squeeze_mask_takes_one_entry_and_nothing_of_the_end_or_the_step() -> None:
    x = counted(2, 3, 4)
    masks = {"begin_mask": ones(False, True, False), "squeeze_mask": ones(True, True, False)}
    found = OPERATIONS["slice_by_index"](x, ints(-1, 2, 3), ints(0, 0, 0), ints(-1, 1, -1), **masks)
    same(found, x.numpy()[1, 0, 3:0:-1])
    scalar = OPERATIONS["slice_by_index"](x, ints(1, 1, 1), ints(0, 0, 0), squeeze_mask=ones(True, True, True))
    same(scalar, x.numpy()[1, 1, 1])
    update = torch.tensor([7.0, 8.0, 9.0])
    wanted = x.numpy().copy()
    wanted[1, 0, 3:0:-1] = update.numpy()
    same(OPERATIONS["slice_update"](x, update, ints(-1, 2, 3), ints(0, 0, 0), ints(-1, 1, -1), **masks), wanted)


@pytest.mark.parametrize("place", [3, -4])
def test_one_entry_that_an_axis_does_not_have_is_refused(place: int) -> None:
    with pytest.raises(IndexError, match="outside an axis of 3"):
        OPERATIONS["slice_by_index"](counted(3), ints(place), ints(0), squeeze_mask=ones(True))


def test_slices_of_another_rank_a_step_of_zero_and_an_update_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        OPERATIONS["slice_by_index"](counted(2, 3), ints(0), ints(1))
    with pytest.raises(ValueError, match="zero"):
        OPERATIONS["slice_by_index"](counted(2), ints(0), ints(1), ints(0))
    with pytest.raises(ValueError, match=r"the update is \[1\], the slice \[2\]"):
        OPERATIONS["slice_update"](counted(3), torch.ones(1), ints(0), ints(2))


def test_slice_by_size_takes_what_is_left_at_minus_one() -> None:
    x = counted(3, 4, 5)
    same(OPERATIONS["slice_by_size"](x, ints(1, -3, 2), ints(-1, 2, 0)), x.numpy()[1:, 1:3, 2:2])


@pytest.mark.parametrize(("begin", "size"), [(2, 3), (-5, 1), (5, -1), (0, -2)])
def test_part_that_is_not_there_is_refused(begin: int, size: int) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        OPERATIONS["slice_by_size"](counted(4), ints(begin), ints(size))


@pytest.mark.parametrize(("axis", "size", "stride"), [(0, 2, 1), (1, 3, 2), (-1, 1, 1), (-2, 4, 1)])
def test_sliding_windows_are_slices(axis: int, size: int, stride: int) -> None:
    x = counted(3, 4, 5)
    parts = [x.numpy().take(range(at, at + size), axis) for at in range(0, x.shape[axis] - size + 1, stride)]
    at = axis % 3
    same(OPERATIONS["sliding_windows"](x, axis, size, stride), np.stack(parts, at))


@pytest.mark.parametrize(("axis", "size", "stride"), [(3, 1, 1), (0, 4, 1), (0, 1, 0), (0, -1, 1)])
def test_windows_that_do_not_fit_are_refused(axis: int, size: int, stride: int) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        OPERATIONS["sliding_windows"](counted(3, 2), axis, size, stride)


def test_depth_and_space_change_places_value_by_value() -> None:
    n, c, h, w, b = 2, 3, 2, 4, 2
    deep, wide = counted(n, c * b * b, h, w), counted(n, c, h * b, w * b)
    to_space, shuffled = OPERATIONS["depth_to_space"](deep, b), OPERATIONS["pixel_shuffle"](deep, b)
    to_depth, unshuffled = OPERATIONS["space_to_depth"](wide, b), OPERATIONS["pixel_unshuffle"](wide, b)
    for m, k, y, x, i, j in itertools.product(range(n), range(c), range(h), range(w), range(b), range(b)):
        assert to_space[m, k, y * b + i, x * b + j] == deep[m, (i * b + j) * c + k, y, x]
        assert shuffled[m, k, y * b + i, x * b + j] == deep[m, k * b * b + i * b + j, y, x]
        assert to_depth[m, (i * b + j) * c + k, y, x] == wide[m, k, y * b + i, x * b + j]
        assert unshuffled[m, k * b * b + i * b + j, y, x] == wide[m, k, y * b + i, x * b + j]


def test_batch_and_space_change_places_value_by_value() -> None:
    x, (bh, bw), (top, bottom, left, right) = counted(2, 3, 3, 4), (2, 3), (1, 0, 0, 2)
    found = OPERATIONS["space_to_batch"](x, ints(bh, bw), ints(top, bottom, left, right).reshape(2, 2))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (top, bottom), (left, right)))
    assert found.shape == (12, 3, 2, 2)
    for i, j, n in itertools.product(range(bh), range(bw), range(2)):
        same(found[(i * bw + j) * 2 + n], padded[n, :, i::bh, j::bw])
    back = OPERATIONS["batch_to_space"](found, ints(bh, bw), ints(top, bottom, left, right).reshape(2, 2))
    same(back, x.numpy())


@pytest.mark.parametrize("name", ["depth_to_space", "space_to_depth", "pixel_shuffle", "pixel_unshuffle"])
@pytest.mark.parametrize("block", [0, -1, -2, 5])
def test_block_that_does_not_divide_is_refused(name: str, block: int) -> None:
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        OPERATIONS[name](counted(1, 4, 4, 4), block)


@pytest.mark.parametrize(("name", "edges"), [("space_to_batch", (-1, 1, 0, 0)), ("batch_to_space", (0, 0, -1, 1))])
def test_edges_below_zero_are_refused(name: str, edges: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not all zero or more"):
        OPERATIONS[name](counted(4, 1, 2, 2), ints(2, 2), ints(*edges))

"""Joining, cutting up, padding, sorting, boxes: against numpy and coremltools' own evaluation of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import ct, mb, quiet
from targets.coreml_ios.executor.ops import OPERATIONS
from tests.targets.coreml_ios.executor.programs import runnable

NAN, INF = float("nan"), float("inf")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def counted(*shape: int) -> Tensor:
    """0, 1, 2, ... in this shape, so that every value says where it was."""
    return torch.arange(int(np.prod(shape))).reshape(shape).float()


def same(found: Tensor, wanted: NDArray[Any]) -> None:
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert found.shape == wanted.shape


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat_and_stack_are_numpys(axis: int) -> None:
    parts = [counted(2, 3), counted(2, 3) + 10, -counted(2, 3)]
    arrays = [part.numpy() for part in parts]
    same(OPERATIONS["concat"](parts, axis), np.concatenate(arrays, axis))
    same(OPERATIONS["stack"](parts, axis), np.stack(arrays, axis))
    interleaved = OPERATIONS["concat"](parts, axis, torch.tensor(True))
    for k, array in enumerate(arrays):
        same(interleaved.movedim(axis, 0)[k::3], np.moveaxis(array, axis, 0))


def test_concat_of_scalars_is_a_vector() -> None:
    same(OPERATIONS["concat"]([scalar(1), scalar(2)], 0), np.array([1, 2]))


def test_parts_that_do_not_fit_are_refused() -> None:
    for name in ("concat", "stack"):
        with pytest.raises(RuntimeError):
            OPERATIONS[name]([counted(2, 3), counted(3, 2)], 0)
        with pytest.raises(IndexError):
            OPERATIONS[name]([counted(2, 3), counted(2, 3)], 3)
        with pytest.raises(ArtifactError, match="more than the"):
            OPERATIONS[name]([torch.zeros(1).expand(2**25)] * 17, 0)
        with pytest.raises((RuntimeError, IndexError)):
            OPERATIONS[name]([], 0)


def test_split_gives_back_what_concat_joined() -> None:
    x = counted(6, 4)
    for given in ({"num_splits": scalar(3)}, {"split_sizes": ints(1, 0, 5)}):
        pieces = OPERATIONS["split"](x, 0, **given)
        assert isinstance(pieces, tuple)
        same(torch.cat(pieces, 0), x.numpy())
    assert [list(piece.shape) for piece in pieces] == [[1, 4], [0, 4], [5, 4]]
    assert len(OPERATIONS["split"](x, -1, scalar(2), ints(1, 3))) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_splits": 4}, "an axis of 6 has no 4 equal pieces"),
        ({"num_splits": 0}, "an axis of 6 has no 0 equal pieces"),
        ({"num_splits": 2**31 - 1}, "equal pieces"),
        ({"num_splits": 2, "split_sizes": ints(6)}, "1 sizes are given for 2 pieces"),
        ({"split_sizes": ints(3, 4)}, "sum exactly to 6"),
    ],
)
def test_pieces_that_do_not_add_up_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=said):
        OPERATIONS["split"](counted(6), 0, **given)


def test_tile_is_numpys() -> None:
    same(OPERATIONS["tile"](counted(2, 3), ints(2, 3)), np.tile(counted(2, 3).numpy(), (2, 3)))
    with pytest.raises(ValueError, match="1 repetitions are given for 2 axes"):
        OPERATIONS["tile"](counted(2, 3), ints(2))
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["tile"](counted(2, 3), ints(2**20, 2**20))
    with pytest.raises(RuntimeError):
        OPERATIONS["tile"](counted(2, 3), ints(-1, 1))


@pytest.mark.parametrize(("mode", "numpys"), [("constant", "constant"), ("reflect", "reflect"), ("replicate", "edge")])
@pytest.mark.parametrize("pad", [(1, 2), (0, 0, 2, 1), (1, 0, 0, 0, 3, 2), (0, 3), ()])
def test_pad_is_numpys_on_the_last_axes(mode: str, numpys: str, pad: tuple[int, ...]) -> None:
    x = counted(2, 3, 4)
    pairs = [(0, 0)] * (3 - len(pad) // 2) + list(zip(pad[::2], pad[1::2]))
    value = {"constant_values": 1.5} if mode == "constant" else {}
    wanted = np.pad(x.numpy(), pairs, numpys, **value)  # type: ignore[call-overload]
    same(OPERATIONS["pad"](x, ints(*pad), mode, scalar(1.5)), wanted)


def test_pad_beyond_the_axis_repeats_its_edge_but_is_not_mirrored() -> None:
    same(OPERATIONS["pad"](counted(2), ints(3, 4), "replicate"), np.pad(counted(2).numpy(), (3, 4), "edge"))
    for pad in ((2, 0), (0, 2)):
        with pytest.raises(ValueError, match="reflection reaches at most 1 entries beyond an axis of 2"):
            OPERATIONS["pad"](counted(2), ints(*pad), "reflect")


@pytest.mark.parametrize("pad", [(1,), (1, 1, 1, 1), (-1, 0)])
def test_pad_that_is_no_count_before_and_after_is_refused(pad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a count before and after of at most 1 axes"):
        OPERATIONS["pad"](counted(3), ints(*pad))


def test_pad_refuses_another_mode_and_an_enormous_result() -> None:
    with pytest.raises(ValueError, match="no mode 'wrap'; it has constant, reflect, replicate"):
        OPERATIONS["pad"](counted(3), ints(1, 1), "wrap")
    for mode in ("constant", "replicate"):
        with pytest.raises(ArtifactError, match="more than the"):
            OPERATIONS["pad"](counted(3), ints(2**30, 0), mode)


def test_fill_keeps_the_type_of_its_value() -> None:
    assert OPERATIONS["fill"](ints(2, 3)).tolist() == [[0.0] * 3] * 2
    for value in (torch.tensor(True), torch.tensor(7, dtype=torch.int32), scalar(0.5)):
        for filled in (OPERATIONS["fill"](ints(2), value), OPERATIONS["fill_like"](counted(2), value)):
            assert filled.tolist() == [value.item()] * 2
            assert filled.dtype == value.dtype
    assert OPERATIONS["fill"](ints(0, 2)).shape == (0, 2)
    assert OPERATIONS["fill"](ints(), scalar(3)).item() == 3
    for sizes in (ints(2**15, 2**15), ints(-1), ints(2**30, 2**30, 2**30)):
        with pytest.raises((ArtifactError, RuntimeError)):
            OPERATIONS["fill"](sizes)


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(0, 5, 1), (5, 0, -2), (3, 3, 1), (0, 5, -1), (-(2**31), 2**31 - 1, 2**30), (2**24 + 1, 2**24 + 4, 1)],
)
def test_range_of_integers_is_numpys(start: int, end: int, step: int) -> None:
    found = OPERATIONS["range_1d"](*(torch.tensor(one, dtype=torch.int32) for one in (start, end, step)))
    same(found, np.arange(start, end, step))


@pytest.mark.parametrize(
    ("start", "end", "step"), [(0, 0.3, 0.1), (1, 0, -0.25), (0.5, 4, 1.5), (0, 1, 0.1), (2, 1, 1)]
)
def test_range_of_floats_is_as_long_as_numpy_makes_it(start: float, end: float, step: float) -> None:
    wanted = np.arange(*(np.float32(one) for one in (start, end, step)), dtype=np.float32)
    found = OPERATIONS["range_1d"](*(scalar(float(one)) for one in (start, end, step)))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([scalar(0.0), scalar(1.0), scalar(0.0)], OverflowError),
        ([scalar(0.0), scalar(NAN), scalar(1.0)], ValueError),
        (list(ints(0, 1, 0)), ZeroDivisionError),
        (list(ints(-(2**31), 2**31 - 1, 1)), ArtifactError),
    ],
)
def test_range_without_an_end_is_refused(given: list[Tensor], error: type[Exception]) -> None:
    with pytest.raises(error):
        OPERATIONS["range_1d"](*given)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_one_hot_has_one_value_on_a_new_axis_and_none_for_an_index_outside(axis: int) -> None:
    indices = ints(0, 2, -1, 1, 3, 2).reshape(2, 3)
    found = OPERATIONS["one_hot"](indices, scalar(3), axis, scalar(7.0), scalar(-1.0)).movedim(axis, -1)
    wanted = np.array([[[7.0 if k == i else -1.0 for k in range(3)] for i in row] for row in indices.tolist()])
    same(found, wanted)


def test_one_hot_refuses_an_enormous_result_and_another_axis() -> None:
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["one_hot"](ints(1, 2), scalar(2**30))
    with pytest.raises(IndexError):
        OPERATIONS["one_hot"](ints(1, 2), scalar(3), 2)
    assert OPERATIONS["one_hot"](ints(1, 2), scalar(0)).shape == (2, 0)


@pytest.mark.parametrize("lower", [-1, 0, 1, 5])
@pytest.mark.parametrize("upper", [-1, 0, 2])
def test_band_part_keeps_a_band_and_nothing_else(lower: int, upper: int) -> None:
    x = torch.full((2, 3, 4), INF)
    row, column = np.indices((3, 4))
    kept = ((lower < 0) | (row - column <= lower)) & ((upper < 0) | (column - row <= upper))
    same(OPERATIONS["band_part"](x, lower, upper), np.where(kept, x.numpy(), 0))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cumsum_starts_from_either_end_and_with_or_without_the_first(axis: int) -> None:
    x = counted(2, 3)
    whole = np.cumsum(x.numpy(), axis)
    back = np.flip(np.cumsum(np.flip(x.numpy(), axis), axis), axis)
    same(OPERATIONS["cumsum"](x, axis), whole)
    same(OPERATIONS["cumsum"](x, axis, exclusive=True), whole - x.numpy())
    same(OPERATIONS["cumsum"](x, axis, reverse=True), back)
    same(OPERATIONS["cumsum"](x, axis, exclusive=True, reverse=True), back - x.numpy())


def test_cumsum_leaves_infinity_out_where_it_is_exclusive_and_wraps_integers() -> None:
    assert OPERATIONS["cumsum"](torch.tensor([1.0, INF]), exclusive=True).tolist() == [0, 1]
    assert OPERATIONS["cumsum"](ints(2**31 - 1, 1)).tolist() == [2**31 - 1, -(2**31)]
    assert OPERATIONS["cumsum"](torch.zeros(0), exclusive=True).shape == (0,)
    with pytest.raises(IndexError):
        OPERATIONS["cumsum"](counted(2), 1, exclusive=True)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("ascending", [True, False])
def test_sorting_puts_the_first_of_equals_first(axis: int, ascending: bool) -> None:
    x = ints(3, -(2**31), 3, 1, 1, 3, 2**31 - 1, 1, 0).reshape(3, 3)
    keys = x.numpy().astype(np.int64) * (1 if ascending else -1)
    order = np.argsort(keys, axis, kind="stable")
    same(OPERATIONS["argsort"](x, axis, ascending), order)
    values, places = OPERATIONS["topk"](x, scalar(2), axis, ascending, sort=False)
    same(places, order.take([0, 1], axis))
    same(values, np.take_along_axis(x.numpy(), order, axis).take([0, 1], axis))


def test_topk_gives_all_at_minus_one_and_values_alone_where_asked() -> None:
    x = torch.tensor([1.0, 3.0, 2.0])
    assert OPERATIONS["topk"](x)[0].tolist() == [3]
    (values,) = OPERATIONS["topk"](x, -1, return_indices=torch.tensor(False))
    assert values.tolist() == [3, 2, 1]
    for count in (4, -2):
        with pytest.raises(RuntimeError):
            OPERATIONS["topk"](x, count)


@pytest.mark.parametrize(
    ("shape", "axis", "wanted"),
    [((3,), -1, (1, 3)), ((3,), 1, (3, 1)), ((4, 3), -1, (4, 3)), ((2, 3, 2), -1, (6, 2)), ((5, 5, 2), 1, (5, 10)),
     ((2, 3), 0, (1, 6)), ((0, 3), 1, (0, 3))],
)  # fmt: skip
def test_flatten2d_is_as_the_examples_of_its_definition(
    shape: tuple[int, ...], axis: int, wanted: tuple[int, ...]
) -> None:
    same(OPERATIONS["flatten2d"](counted(*shape), axis), counted(*shape).numpy().reshape(wanted))
    with pytest.raises(ValueError, match="not within rank"):
        OPERATIONS["flatten2d"](counted(*shape), len(shape) + 1)


def test_shape_non_zero_and_identity() -> None:
    assert OPERATIONS["shape"](counted(2, 0, 3)).tolist() == [2, 0, 3]
    assert OPERATIONS["shape"](scalar(1.0)).shape == (0,)
    x = torch.tensor([[0.0, NAN], [-0.0, 2.0]])
    same(OPERATIONS["non_zero"](x), np.transpose(np.nonzero(x.numpy())))
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["non_zero"](torch.ones(1).expand(2**9, 2**10, 2**9))
    assert OPERATIONS["identity"]("text") == "text"


def overlap(a: list[float], b: list[float]) -> float:
    sides = [
        min(a[k] + a[k + 2] / 2, b[k] + b[k + 2] / 2) - max(a[k] - a[k + 2] / 2, b[k] - b[k + 2] / 2) for k in (0, 1)
    ]
    common = max(sides[0], 0) * max(sides[1], 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def slow_suppression(
    boxes: list[list[float]], scores: list[list[float]], most_overlap: float, least: float, most: int, by_class: bool
) -> list[int]:
    order = sorted(range(len(boxes)), key=lambda i: -max(scores[i]))
    kept: list[int] = []
    for i in (i for i in order if max(scores[i]) >= least):
        rivals = [j for j in kept if not by_class or np.argmax(scores[j]) == np.argmax(scores[i])]
        if all(overlap(boxes[i], boxes[j]) <= most_overlap for j in rivals):
            kept.append(i)
    return (kept or order[:1])[:most]


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize(
    ("most_overlap", "least", "most"), [(0.1, -INF, 9), (0.3, 0.7, 5), (0.9, 0.0, 3), (0.2, 2.0, 4)]
)
def test_suppression_keeps_the_best_of_those_that_overlap(
    most_overlap: float, least: float, most: int, by_class: bool
) -> None:
    generator = torch.Generator().manual_seed(most)
    boxes, scores = torch.rand(2, 9, 4, generator=generator) + 0.2, torch.rand(2, 9, 3, generator=generator)
    given = {"iou_threshold": scalar(most_overlap), "max_boxes": most, "per_class_suppression": by_class}
    found = OPERATIONS["non_maximum_suppression"](boxes, scores, **given, score_threshold=scalar(least))
    for row in range(2):
        wanted = slow_suppression(boxes[row].tolist(), scores[row].tolist(), most_overlap, least, most, by_class)
        count = len(wanted)
        assert found[3][row] == count
        assert found[2][row].tolist() == wanted + [-1] * (most - count)
        same(found[0][row], np.concatenate([boxes[row, wanted].numpy(), np.zeros((most - count, 4))]))
        same(found[1][row], np.concatenate([scores[row, wanted].numpy(), np.zeros((most - count, 3))]))


def test_suppression_of_ios17_has_boxes_on_the_last_axis_and_no_count() -> None:
    boxes, scores = torch.rand(2, 5, 4) + 0.2, torch.rand(2, 5, 3)
    old = OPERATIONS["non_maximum_suppression"](boxes, scores, scalar(0.3), 4, score_threshold=scalar(-INF))
    new = OPERATIONS["non_maximum_suppression"](boxes.mT, scores.mT, scalar(0.3), 4)
    assert len(new) == 3
    same(new[0], old[0].mT.numpy())
    same(new[1], old[1].mT.numpy())
    same(new[2], old[2].numpy())


def test_suppression_keeps_empty_boxes_and_what_overlaps_just_as_much_as_it_may() -> None:
    empty, pair = torch.zeros(1, 2, 4), torch.tensor([[[1.0, 1.0, 2.0, 2.0], [1.5, 2.5, 1.0, 3.0]]])
    scores = torch.tensor([[[1.0], [2.0]]])
    for boxes, bound in ((empty, 0.0), (pair, float(torch.tensor(1.0) / 6))):
        found = OPERATIONS["non_maximum_suppression"](boxes, scores, scalar(bound), 2, score_threshold=scalar(0.0))
        assert found[2].tolist() == [[1, 0]]


def test_suppression_of_no_boxes_and_of_too_many() -> None:
    found = OPERATIONS["non_maximum_suppression"](torch.zeros(1, 4, 0), torch.zeros(1, 2, 0), scalar(0.5), 2)
    assert [list(one.shape) for one in found] == [[1, 4, 2], [1, 2, 2], [1, 2]]
    assert found[2].tolist() == [[-1, -1]]
    with pytest.raises(ValueError, match=r"boxes \[1, 4, 2\] are not four numbers for each of the scores \[1, 3, 2\]"):
        OPERATIONS["non_maximum_suppression"](
            torch.zeros(1, 4, 2), torch.zeros(1, 3, 2), scalar(0.5), 2, score_threshold=scalar(0.0)
        )
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["non_maximum_suppression"](torch.zeros(1, 4, 1), torch.zeros(1, 2, 1), scalar(0.5), 2**31 - 1)


def every_operation(opset: int) -> Callable[[Any], list[Any]]:
    """Operations of the three groups on one tensor [2, 3, 4], those that coremltools evaluates itself."""
    places = np.array([[1, 0], [0, 1]], np.int32)

    def build(x: Any) -> list[Any]:
        made = [
            *mb.split(x=x, split_sizes=[1, 3], axis=-1), *mb.split(x=x, num_splits=2, axis=0),
            mb.concat(values=[x, x], axis=1), mb.stack(values=[x, x, x], axis=-1), mb.tile(x=x, reps=[1, 2, 1]),
            mb.pad(x=x, pad=[1, 0, 2, 1], mode="reflect"), mb.pad(x=x, pad=[1, 2], constant_val=0.5),
            mb.band_part(x=x, lower=1, upper=0), mb.cumsum(x=x, axis=1), mb.argsort(x=x, axis=1, ascending=True),
            *mb.topk(x=x, k=2, axis=2), mb.flatten2d(x=x, axis=-1), mb.shape(x=x), mb.identity(x=x),
            mb.reshape(x=x, shape=[0, -1, 0]), mb.expand_dims(x=x, axes=[0, -1]), mb.transpose(x=x, perm=[-1, 0, 1]),
            mb.squeeze(x=mb.expand_dims(x=x, axes=[1]), axes=[1]), mb.reverse(x=x, axes=[0, 2]),
            mb.slice_by_index(x=x, begin=[1, -1, 0], end=[0, 0, 9], stride=[1, -1, 2],
                              squeeze_mask=[True, False, False]),
            mb.slice_by_size(x=x, begin=[0, 1, -2], size=[-1, 1, 2]), mb.gather(x=x, indices=places, axis=1),
            mb.gather_along_axis(x=x, indices=np.ones((2, 5, 4), np.int32), axis=1),
        ]  # fmt: skip
        if opset >= 16:
            made += [mb.fill_like(ref_tensor=x, value=2.0), mb.gather(x=x, indices=places, axis=2, batch_dims=1),
                     mb.topk(x=x, k=3, axis=1, sort=False, return_indices=False)]  # fmt: skip
        if opset >= 17:
            made += [mb.reshape(x=x, shape=[0, 0, 0, 0]), *mb.topk(x=x, k=1, output_indices_dtype="uint16")]
        if opset >= 18:
            made.append(mb.slice_update(x=x, update=np.ones((1, 3, 2), np.float32), begin=[0, 0, 3], end=[1, 3, 0],
                                        stride=[1, 1, -2]))  # fmt: skip
        return [mb.cast(x=one, dtype="fp32") for one in made]

    return build


@pytest.mark.parametrize("opset", [15, 16, 18])  # no version of these operations is left out: 17 is in 18
def test_program_gives_what_coremltools_evaluates_constants_to(opset: int) -> None:
    x = np.random.default_rng(opset).permutation(24).reshape(2, 3, 4).astype(np.float32)
    build, target = every_operation(opset), getattr(ct.target, f"iOS{opset}")
    with quiet():
        known = mb.program(input_specs=[], opset_version=target)(lambda: build(mb.const(val=x)))
    model = runnable(build, [mb.TensorSpec(x.shape)], opset)
    found = model.predict({"x": x})
    wanted = known.functions["main"].outputs
    assert len(found) == len(wanted)
    for name, one in zip((output.name for output in model.description.output), wanted):
        np.testing.assert_array_equal(found[name], one.val)

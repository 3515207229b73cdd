"""Images read at coordinates: against numpy's padding, torch's grid_sample and TensorFlow's rule for boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import mb
from targets.coreml_ios.executor.values import LARGEST
from tests.targets.coreml_ios.executor.oracle import Array, computed
from tests.targets.coreml_ios.executor.programs import runnable

RANDOM = np.random.default_rng(8)
UNIT, BOTH = "normalized_zero_to_one", "normalized_minus_one_to_one"


def image(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def ramp(height: int = 4, width: int = 4) -> Array:
    """4 row + column + 1, so that a value between pixels says where it was read."""
    return (width * np.arange(height)[:, None] + np.arange(width) + 1).astype(np.float32)[None, None]


def resampled(x: Any, coordinates: Any, **more: Any) -> Array:
    given = {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": 0.0,
             "coordinates_mode": "unnormalized", "align_corners": True, **more}  # fmt: skip
    return computed("resample", x=x, coordinates=coordinates, **given)


@pytest.mark.parametrize(
    ("padding_mode", "numpy_mode"),
    [("constant", "constant"), ("border", "edge"), ("reflection", "reflect"), ("symmetric", "symmetric")],
)
@pytest.mark.parametrize("sampling_mode", ["nearest", "bilinear"])
def test_whole_coordinates_read_the_padded_image(padding_mode: str, numpy_mode: Any, sampling_mode: str) -> None:
    x, far = image(1, 2, 3, 4), 9
    rows, columns = np.meshgrid(np.arange(-far, 3 + far), np.arange(-far, 4 + far), indexing="ij")
    fill = {"constant_values": 5.0} if padding_mode == "constant" else {}
    wanted = np.pad(x, [(0, 0), (0, 0), (far, far), (far, far)], numpy_mode, **fill)
    coordinates = np.stack([columns, rows], -1)[None].astype(np.int32)
    found = resampled(x, coordinates, sampling_mode=sampling_mode, padding_mode=padding_mode, padding_value=5.0)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("sampling_mode", ["nearest", "bilinear"])
def test_normalized_coordinates_are_those_of_grid_sample(sampling_mode: str, padding: str, align_corners: bool) -> None:
    x, grid = image(2, 3, 5, 4), RANDOM.uniform(-2.5, 2.5, (2, 6, 7, 2)).astype(np.float32)
    wanted = F.grid_sample(torch.from_numpy(x), torch.from_numpy(grid), sampling_mode, padding, align_corners).numpy()
    names = {"zeros": "constant", "border": "border", "reflection": "reflection" if align_corners else "symmetric"}
    found = resampled(x, grid, sampling_mode=sampling_mode, padding_mode=names[padding], align_corners=align_corners,
                      coordinates_mode=BOTH)  # fmt: skip
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    unit = resampled(x, (grid + 1) / 2, sampling_mode=sampling_mode, padding_mode=names[padding],
                     align_corners=align_corners, coordinates_mode=UNIT)  # fmt: skip
    np.testing.assert_allclose(unit, wanted, rtol=1e-4, atol=1e-5)


def test_edge_of_the_image_is_mixed_with_the_padding_and_ties_go_to_even_pixels() -> None:
    found = resampled(ramp(1, 4), [[[[-0.5, 0.0], [3.25, 0.0], [4.0, 0.0], [1.5, 0.0]]]], padding_value=9.0)
    np.testing.assert_array_equal(found, [[[[5.0, 5.25, 9.0, 2.5]]]])
    found = resampled(ramp(1, 4), [[[[0.5, 0.0], [1.5, 0.0], [2.5, 0.0]]]], sampling_mode="nearest")
    np.testing.assert_array_equal(found, [[[[1.0, 3.0, 3.0]]]])
    found = resampled(ramp(4, 1), [[[[0.0, 0.5], [0.0, 1.5], [0.0, 2.5]]]], sampling_mode="nearest")
    np.testing.assert_array_equal(found, [[[[1.0, 3.0, 3.0]]]])


@pytest.mark.parametrize("padding_mode", ["constant", "border", "reflection", "symmetric"])
def test_an_image_of_one_pixel_and_coordinates_that_are_no_numbers(padding_mode: str) -> None:
    far = [[[[np.nan, 0.0], [0.0, np.inf], [-np.inf, 1e30]]]]
    assert resampled(ramp(3, 3), far, padding_mode=padding_mode).shape == (1, 1, 1, 3)
    found = resampled([[[[7.0]]]], [[[[0.0, 0.0], [2.0, -3.0]]]], padding_mode=padding_mode)
    np.testing.assert_array_equal(found, [[[[7.0, 0.0 if padding_mode == "constant" else 7.0]]]])


def transformed(x: Any, matrix: Any, height: int, width: int, **more: Any) -> Array:
    given = {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": 0.0, "coordinates_mode": BOTH,
             "align_corners": True, **more}  # fmt: skip
    return computed("affine", x=x, transform_matrix=matrix, output_height=height, output_width=width, **given)


def test_matrices_that_change_nothing_mirror_and_turn() -> None:
    x = image(2, 2, 4, 4)
    for matrix, wanted in (
        ([1, 0, 0, 0, 1, 0], x), ([-1, 0, 0, 0, 1, 0], x[..., ::-1]), ([0, 1, 0, 1, 0, 0], x.swapaxes(2, 3)),
    ):  # fmt: skip
        np.testing.assert_allclose(transformed(x, np.float32([matrix]), 4, 4), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("align_corners", "size"), [(True, (3, 5)), (False, (3, 5)), (False, (1, 4)), (False, (2, 1))])
def test_affine_is_torch_one_matrix_for_each_image(align_corners: bool, size: tuple[int, int]) -> None:
    x, matrix = image(2, 3, 4, 6), image(2, 6)
    theta = torch.from_numpy(matrix).reshape(2, 2, 3)
    grid = F.affine_grid(theta, [2, 3, *size], align_corners=align_corners)
    wanted = F.grid_sample(torch.from_numpy(x), grid, align_corners=align_corners).numpy()
    np.testing.assert_allclose(transformed(x, matrix, *size, align_corners=align_corners), wanted, rtol=1e-4, atol=1e-5)
    alike = transformed(x, matrix[:1], *size, align_corners=align_corners)
    np.testing.assert_allclose(alike[:1], wanted[:1], rtol=1e-4, atol=1e-5)


def test_a_single_row_or_column_of_a_transformed_image_is_its_middle() -> None:
    for aligned in (True, False):
        found = transformed(ramp(), np.float32([[1, 0, 0, 0, 1, 0]]), 1, 1, align_corners=aligned)
        np.testing.assert_array_equal(found, [[[[8.5]]]])


def cropped(x: Any, boxes: Any, height: int, width: int, **more: Any) -> Array:
    given = {"boxes": np.float32(boxes), "box_indices": np.zeros(len(boxes), np.int32), **more}
    return computed("crop_resize", x=x, target_height=height, target_width=width, **given)


def tensorflow(x: Array, boxes: Array, images: Array, height: int, width: int, fill: float) -> Array:
    """tf.image.crop_and_resize as it is documented, one value after the other; boxes are normalized."""
    found = np.full((len(boxes), x.shape[1], height, width), fill)
    for n, (top, left, bottom, right) in enumerate(boxes.astype(np.float64)):
        for i, j in np.ndindex(height, width):
            y = (top + (bottom - top) * (i / (height - 1) if height > 1 else 0.5)) * (x.shape[2] - 1)
            z = (left + (right - left) * (j / (width - 1) if width > 1 else 0.5)) * (x.shape[3] - 1)
            if 0 <= y <= x.shape[2] - 1 and 0 <= z <= x.shape[3] - 1:
                a, b, c, d = int(y), int(np.ceil(y)), int(z), int(np.ceil(z))
                pixels = x[images[n]].astype(np.float64)
                above = pixels[:, a, c] * (1 - z + c) + pixels[:, a, d] * (z - c)
                below = pixels[:, b, c] * (1 - z + c) + pixels[:, b, d] * (z - c)
                found[n, :, i, j] = above * (1 - y + a) + below * (y - a)
    return found


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4)])
def test_boxes_with_aligned_corners_are_those_of_tensorflow(height: int, width: int) -> None:
    x, boxes = image(3, 2, 5, 6), RANDOM.uniform(-0.3, 1.3, (8, 4)).astype(np.float32)
    images = RANDOM.integers(0, 3, 8).astype(np.int32)
    wanted = tensorflow(x, boxes, images, height, width, 9.0)
    same = {"normalized_coordinates": True, "sampling_mode": "ALIGN_CORNERS", "pad_value": 9.0}
    found = cropped(x, boxes, height, width, box_indices=images, **same)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    roi = np.concatenate([images[:, None], boxes], 1).reshape(8, 1, 5, 1, 1).astype(np.float32)
    older = computed("crop_resize", x=x, roi=roi, target_height=height, target_width=width, **same)
    np.testing.assert_array_equal(older, found[:, None])


def test_boxes_without_an_image_are_cut_out_of_all() -> None:
    x, boxes = image(2, 3, 4, 4), np.float32([[0, 0, 1, 2], [1, 1, 3, 3], [2, 0, 2, 3]])
    found = computed("crop_resize", x=x, roi=boxes.reshape(3, 1, 4, 1, 1), target_height=2, target_width=2)
    assert found.shape == (3, 2, 3, 2, 2)
    for n in range(2):
        wanted = cropped(x, boxes, 2, 2, box_indices=np.full(3, n, np.int32))
        np.testing.assert_array_equal(found[:, n], wanted)


@pytest.mark.parametrize("mode", ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "UNALIGN_CORNERS"])
def test_a_box_in_its_own_size_is_a_copy(mode: str) -> None:
    x = image(1, 2, 6, 5)
    found = cropped(x, [[1, 0, 4, 2]], 4, 3, sampling_mode=mode)
    np.testing.assert_allclose(found, x[:, :, 1:5, 0:3], rtol=1e-6)


@pytest.mark.parametrize(
    "mode", ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]
)
@pytest.mark.parametrize(("height", "width"), [(1, 3), (3, 9)])
def test_a_box_is_resized_as_the_image_cut_out_would_be(mode: str, height: int, width: int) -> None:
    x = image(1, 2, 6, 5)
    wanted = computed("resize_bilinear", x=x[:, :, 1:5, 0:3], target_size_height=height, target_size_width=width,
                      sampling_mode=mode)  # fmt: skip
    np.testing.assert_allclose(
        cropped(x, [[1, 0, 4, 2]], height, width, sampling_mode=mode), wanted, rtol=1e-5, atol=1e-6
    )


def test_offset_corners_take_a_box_of_less_than_a_pixel_for_one_pixel_up_to_its_end() -> None:
    """NeuralNetwork.proto, ROI_ALIGN_MODE: spacing = max(1, X - 1) / N, grid points = min(X - 1, ...)."""
    found = cropped(ramp(1, 4), [[0, 1, 0, 1.5]], 1, 2, sampling_mode="OFFSET_CORNERS")
    np.testing.assert_array_equal(found, [[[[2.25, 2.5]]]])


def test_the_same_box_in_four_ways_and_two_units() -> None:
    x, box = ramp(), np.float32([1, 0, 3, 2])
    wanted = cropped(x, [box], 3, 3, sampling_mode="ALIGN_CORNERS")
    for ways, given in (
        ({"box_coordinate_mode": "CORNERS_WIDTH_FIRST"}, [0, 1, 2, 3]),
        ({"box_coordinate_mode": "CENTER_SIZE_HEIGHT_FIRST"}, [2, 1, 2, 2]),
        ({"box_coordinate_mode": "CENTER_SIZE_WIDTH_FIRST"}, [1, 2, 2, 2]),
        ({"normalized_coordinates": True}, box / 3),
        ({"spatial_scale": 0.5}, box * 2),
        ({"spatial_scale": 0.5, "normalized_coordinates": True}, box * 2 / 3),
        ({}, box.astype(np.uint16)),
    ):  # fmt: skip
        found = cropped(x, [given], 3, 3, sampling_mode="ALIGN_CORNERS", **ways)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=str(ways))


def test_a_box_from_its_end_to_its_start_is_read_backwards() -> None:
    forth, back = ([[[1, 1, 2, 3]]], [[[2, 3, 1, 1]]])
    for mode in ("STRICT_ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"):
        found = cropped(ramp(), back[0], 2, 3, sampling_mode=mode)
        flipped = cropped(ramp()[..., ::-1, ::-1].copy(), [[1, 0, 2, 2]], 2, 3, sampling_mode=mode)
        np.testing.assert_allclose(found, flipped, rtol=1e-6, err_msg=mode)
    aligned = cropped(ramp(), back[0], 2, 3, sampling_mode="ALIGN_CORNERS")
    np.testing.assert_array_equal(
        aligned, cropped(ramp(), forth[0], 2, 3, sampling_mode="ALIGN_CORNERS")[..., ::-1, ::-1]
    )


def test_boxes_beyond_the_image_are_mirrored_with_unaligned_corners_and_padded_otherwise() -> None:
    """The first number is that of coremltools' own test, the only one of this mode."""
    box = {"boxes": np.float32([[2, 2, 1, 1]]), "normalized_coordinates": True, "target_height": 2, "target_width": 2}
    found = computed("crop_resize", x=ramp(), sampling_mode="UNALIGN_CORNERS", pad_value=7.0, **box)
    np.testing.assert_array_equal(found, [[[[3.5, 5.5], [11.5, 13.5]]]])
    found = computed("crop_resize", x=ramp(), sampling_mode="STRICT_ALIGN_CORNERS", pad_value=7.0, **box)
    np.testing.assert_array_equal(found, [[[[7, 7], [7, 16]]]])


def test_parameters_that_may_be_left_out() -> None:
    x, boxes = image(3, 1, 4, 4), np.float32([[0, 0, 2, 2], [1, 1, 3, 3]])
    short = computed("crop_resize", x=x, boxes=boxes)
    long = cropped(x, boxes, 1, 1, box_indices=np.int32([0, 1]), sampling_mode="DEFAULT", spatial_scale=1.0,
                   box_coordinate_mode="CORNERS_HEIGHT_FIRST", pad_value=0.0)  # fmt: skip
    np.testing.assert_array_equal(short, long)
    np.testing.assert_array_equal(short[:, 0, 0, 0], [x[0, 0, 0, 0], x[1, 0, 1, 1]])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"box_coordinate_mode": "CORNERS"},
            "box_coordinate_mode 'CORNERS'; it is CORNERS_HEIGHT_FIRST, CORNERS_WIDTH",
        ),
        ({"sampling_mode": "default"}, "sampling_mode 'default'; it is STRICT_ALIGN_CORNERS"),
        ({"box_indices": np.int32([3])}, "images 3 to 3 of a batch of 1"),
        ({"box_indices": np.int32([-1])}, "images -1 to -1 of a batch of 1"),
        ({"box_indices": np.int32([0, 0])}, r"boxes of shape \[1, 4\] and box_indices of shape \[2\]"),
        ({"boxes": [[1.0, 2.0]]}, r"boxes of shape \[1, 2\] and box_indices of shape \[1\]"),
        ({"roi": np.zeros((1, 1, 4, 1, 1))}, r"either roi of shape \[n, 1, 4 or 5, 1, 1\] is given, or boxes"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        computed("crop_resize", **{"x": ramp(), "boxes": [[0.0, 0.0, 1.0, 1.0]], **more})


@pytest.mark.parametrize("roi", [np.zeros((1, 4)), np.zeros((1, 1, 6, 1, 1))])
def test_boxes_of_another_shape_are_refused(roi: Array) -> None:
    with pytest.raises(ValueError, match="either roi of shape"):
        computed("crop_resize", x=ramp(), roi=roi)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sampling_mode": "cubic"}, "sampling_mode 'cubic'; it is bilinear or nearest"),
        ({"padding_mode": "wrap"}, "padding_mode 'wrap'; it is constant, border, reflection or symmetric"),
        (
            {"coordinates_mode": "pixels"},
            "coordinates_mode 'pixels'; it is unnormalized, normalized_minus_one_to_one or",
        ),
        (
            {"coordinates": np.zeros((2, 1, 1, 2))},
            r"coordinates of shape \[2, 1, 1, 2\] for images of shape \[1, 1, 4, 4\]",
        ),
        ({"coordinates": np.zeros((1, 1, 1, 3))}, r"coordinates of shape \[1, 1, 1, 3\]"),
        ({"coordinates": np.zeros((1, 1, 2))}, r"coordinates of shape \[1, 1, 2\]"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resampled(**{"x": ramp(), "coordinates": np.zeros((1, 1, 1, 2)), **more})


def test_affine_takes_coordinates_of_one_range_only() -> None:
    with pytest.raises(ValueError, match="coordinates_mode 'unnormalized'; it is normalized_minus_one_to_one"):
        transformed(ramp(), np.zeros((1, 6)), 2, 2, coordinates_mode="unnormalized")
    with pytest.raises(RuntimeError):
        transformed(ramp(), np.zeros((3, 6)), 2, 2)


def test_images_that_no_memory_holds_are_refused() -> None:
    message = f"is more than the {LARGEST} that are computed here"
    for height, width in ((2**15, 2**15), (0, 2**30)):
        with pytest.raises(ArtifactError, match=message):
            cropped(ramp(), [[0, 0, 1, 1]], height, width)
        with pytest.raises(ArtifactError, match=message):
            transformed(ramp(), np.zeros((1, 6)), height, width)
    with pytest.raises(ArtifactError, match=message):
        resampled(np.zeros((1, 2**20, 1, 1)), np.zeros((1, 1, 2**9, 2)))
    with pytest.raises(ArtifactError, match=message):
        computed("crop_resize", x=np.zeros((2**15, 1, 1, 1)), roi=np.zeros((2**15, 1, 4, 1, 1)))


@pytest.mark.parametrize("opset", [16, 17])
def test_program_says_its_version_by_its_parameters(opset: int) -> None:
    boxes = {16: {"roi": np.float32([0, 1, 0, 2, 3]).reshape(1, 1, 5, 1, 1)},
             17: {"boxes": np.float32([[1, 0, 2, 3]]), "box_indices": np.int32([0])}}  # fmt: skip

    def program(x: Any) -> Any:
        return mb.crop_resize(x=x, target_height=2, target_width=4, name="y", **boxes[opset])

    found = runnable(program, [mb.TensorSpec((1, 1, 4, 4))], opset).predict({"x": ramp()})["y"]
    np.testing.assert_array_equal(found.reshape(2, 4), ramp()[0, 0, 1:3])

"""Images of another size: against the grids that Apple writes down, numpy, and torch where it has the same mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from exporter.errors import ArtifactError
from targets.coreml_ios.executor.ops.image_resizing import grid
from targets.coreml_ios.executor.values import LARGEST
from tests.targets.coreml_ios.executor.oracle import Array, computed

RANDOM = np.random.default_rng(7)
MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")
SIZES = [(1, 1), (1, 4), (2, 1), (2, 5), (2, 6), (3, 3), (5, 2), (4, 7), (7, 3)]


def image(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def linspace(start: float, end: float, count: int, size: int) -> Array:
    return np.clip(np.linspace(start, end, count), 0, size - 1)


@pytest.mark.parametrize(
    ("mode", "five", "six"),
    [  # the examples of coremltools' reference: two values become five, and six
        ("UNALIGN_CORNERS", [0, 0.1, 0.5, 0.9, 1], [0, 0, 1 / 3, 2 / 3, 1, 1]),
        ("STRICT_ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("DEFAULT", [0, 0.4, 0.8, 1, 1], [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9], [1 / 12, 0.25, 5 / 12, 7 / 12, 0.75, 11 / 12]),
    ],
)
def test_grids_of_the_reference(mode: str, five: list[float], six: list[float]) -> None:
    for wanted in (five, six):
        given = {"x": [[[0.0, 1.0]]], "target_size_height": 1, "target_size_width": len(wanted), "sampling_mode": mode}
        np.testing.assert_allclose(computed("resize_bilinear", **given), [[wanted]], atol=1e-6)


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_grids_are_those_that_core_ml_wrote_as_linspace(size: int, count: int) -> None:
    """NeuralNetwork.proto, SamplingMode: where Apple first defined the modes."""
    spacing = max(1, size - 1) / count
    middle = (size - 1) / 2
    wanted = {
        "STRICT_ALIGN_CORNERS": linspace(0, size - 1, count, size),
        "ALIGN_CORNERS": linspace(0, size - 1, count, size) if count > 1 else [middle],
        "DEFAULT": linspace(0, size - size / count, count, size),
        "OFFSET_CORNERS": linspace(0.5 * spacing, (count - 0.5) * spacing, count, size),
        "UNALIGN_CORNERS": linspace(0.5 * size / count - 0.5, size - 0.5 * size / count - 0.5, count, size),
    }
    for mode, places in wanted.items():
        np.testing.assert_allclose(grid(mode, size, count).numpy(), places, atol=1e-12, err_msg=mode)


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_linear_is_torch_where_torch_has_the_mode(size: int, count: int) -> None:
    x = image(2, 3, size, 4)
    for mode, aligned in (("STRICT_ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)):
        wanted = F.interpolate(torch.from_numpy(x), (count, 5), mode="bilinear", align_corners=aligned).numpy()
        given = {"x": x, "target_size_height": count, "target_size_width": 5, "sampling_mode": mode}
        np.testing.assert_allclose(computed("resize_bilinear", **given), wanted, rtol=1e-5, atol=1e-6)
        given = {"x": x, "shape": [9, count, 5], "resized_dims": 2, "sampling_mode": mode}
        np.testing.assert_allclose(computed("resize", **given), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_nearest_is_torch(size: int, count: int) -> None:
    """Resized it is the pixel under the centre, upsampled the one under the corner."""
    x = image(1, 2, size, 3)
    exact = F.interpolate(torch.from_numpy(x), (count, 7), mode="nearest-exact").numpy()
    found = computed("resize_nearest_neighbor", x=x, target_size_height=count, target_size_width=7)
    np.testing.assert_array_equal(found, exact)
    found = computed("resize", x=x, shape=[count, 7], resized_dims=2, interpolation_mode="NEAREST_NEIGHBOR")
    np.testing.assert_array_equal(found, exact)
    corner = F.interpolate(torch.from_numpy(x), (count, 7), mode="nearest").numpy()
    factors = {"scale_factor_height": np.float32((count + 1e-3) / size), "scale_factor_width": np.float32(7.001 / 3)}
    np.testing.assert_array_equal(computed("upsample_nearest_neighbor", x=x, **factors), corner)


def test_nearest_of_corners_that_are_aligned_is_the_later_of_two() -> None:
    x = [[[0.0, 1.0, 2.0]]]
    for mode, wanted in (("STRICT_ALIGN_CORNERS", [0, 1, 1, 2, 2]), ("ALIGN_CORNERS", [0, 1, 1, 2, 2]),
                         ("UNALIGN_CORNERS", [0, 0, 1, 2, 2]), ("OFFSET_CORNERS", [0, 1, 1, 1, 2])):  # fmt: skip
        found = computed("resize", x=x, shape=[5], resized_dims=1, interpolation_mode="NEAREST_NEIGHBOR",
                         sampling_mode=mode)  # fmt: skip
        np.testing.assert_array_equal(found, [[wanted]], err_msg=mode)


@pytest.mark.parametrize("align_corners", [True, False, None])
@pytest.mark.parametrize("half_pixel_centers", [True, False, None])
def test_upsampling_says_its_mode_in_two_flags(align_corners: bool | None, half_pixel_centers: bool | None) -> None:
    flags = {"align_corners": align_corners, "half_pixel_centers": half_pixel_centers}
    given = {key: value for key, value in flags.items() if value is not None}
    aligned = align_corners is not False  # the default
    half = not aligned if half_pixel_centers is None else half_pixel_centers
    x = image(1, 1, 3, 4)
    factors = {"scale_factor_height": 2, "scale_factor_width": np.float32(1.5)}
    if aligned and half:
        with pytest.raises(ValueError, match="align_corners and half_pixel_centers are both true"):
            computed("upsample_bilinear", x=x, **factors, **given)
        return
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if half else "DEFAULT"
    wanted = computed("resize_bilinear", x=x, target_size_height=6, target_size_width=6, sampling_mode=mode)
    np.testing.assert_array_equal(computed("upsample_bilinear", x=x, **factors, **given), wanted)


def test_sizes_are_counted_in_float32_as_coremltools_declares_them() -> None:
    """0.7 in float32 is less than 0.7, but 10 times it is 7 in float32."""
    factor = np.float32(0.7)
    assert float(factor) * 10 < 7 == int(np.floor(factor * 10))
    for operation in ("upsample_nearest_neighbor", "upsample_bilinear"):
        assert computed(operation, x=image(1, 1, 10), scale_factor_width=factor).shape == (1, 1, 7)
        assert computed(operation, x=image(2, 1, 1, 3)).shape == (2, 1, 1, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["LINEAR", "NEAREST_NEIGHBOR"])
def test_what_is_alike_stays_alike_and_the_same_size_changes_nothing(way: str, mode: str) -> None:
    same = {"resized_dims": 2, "interpolation_mode": way, "sampling_mode": mode}
    for value in (np.float32(0.1), np.float32(np.inf), np.int32(2**31 - 1)):
        flat = np.full((2, 3, 4), value)
        np.testing.assert_array_equal(computed("resize", x=flat, shape=[7, 5], **same), np.full((2, 7, 5), value))
    if mode != "OFFSET_CORNERS":  # whose grid of size values is not 0, 1, 2 ...
        x = image(2, 3, 4)
        x[0, 1, 1], x[1, 2, 3] = np.inf, np.nan
        np.testing.assert_array_equal(computed("resize", x=x, shape=[3, 4], **same), x)


def test_last_dimensions_are_resized_and_zero_keeps_a_size() -> None:
    x = image(2, 3, 4)
    found = computed("resize", x=x, shape=[1, 0, 8], resized_dims=2, sampling_mode="DEFAULT")
    assert found.shape == (2, 3, 8)
    np.testing.assert_array_equal(found[..., ::2], x)  # between i and i + 1 there is one more
    np.testing.assert_allclose(found[..., 1:-1:2], (x[..., 1:] + x[..., :-1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(computed("resize", x=x, shape=[5, 6], resized_dims=0), x)
    assert computed("resize", x=image(), shape=[2], resized_dims=0).shape == ()
    assert computed("resize", x=x, shape=[2, 2, 2], resized_dims=3).shape == (2, 2, 2)


def test_nearest_integers_are_exact() -> None:
    x = np.array([2**31 - 1, -(2**31), 2**24 + 1], np.int32)
    found = computed("resize", x=x, shape=[6], resized_dims=1, interpolation_mode="NEAREST_NEIGHBOR")
    np.testing.assert_array_equal(found, x.repeat(2))


def test_crop_takes_away_at_both_ends() -> None:
    x = image(2, 1, 4, 5)
    np.testing.assert_array_equal(computed("crop", x=x, crop_height=[1, 2], crop_width=[0, 3]), x[:, :, 1:2, :2])
    assert computed("crop", x=x, crop_height=[4, 0], crop_width=[0, 0]).shape == (2, 1, 0, 5)
    for height in ([3, 2], [-1, 0]):
        with pytest.raises(ValueError, match=f"crop of {height[0]} and {height[1]} from 4"):
            computed("crop", x=x, crop_height=height, crop_width=[0, 0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sampling_mode": "HALF"}, "sampling_mode 'HALF'; it is STRICT_ALIGN_CORNERS, ALIGN_CORNERS, DEFAULT, OFFSET"),
        ({"interpolation_mode": "CUBIC"}, "interpolation_mode 'CUBIC'; it is LINEAR or NEAREST_NEIGHBOR"),
        ({"resized_dims": 3}, "resized_dims 3; shape has 2 sizes and x has rank 3"),
        ({"resized_dims": -1}, "resized_dims -1; shape has 2 sizes and x has rank 3"),
        ({"resized_dims": 4, "shape": [1] * 5}, "resized_dims 4; shape has 5 sizes and x has rank 3"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        computed("resize", **{"x": image(1, 2, 2), "shape": [3, 3], "resized_dims": 2, **more})


@pytest.mark.parametrize("shape", [[-1, 3], [3, -5]])
def test_negative_sizes_are_refused(shape: list[int]) -> None:
    with pytest.raises(RuntimeError):
        computed("resize", x=image(1, 2, 2), shape=shape, resized_dims=2)


def test_an_image_without_pixels_cannot_be_enlarged() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        computed("resize_bilinear", x=np.zeros((1, 1, 0), np.float32), target_size_height=1, target_size_width=2)


@pytest.mark.parametrize(
    ("operation", "more"),
    [
        ("resize_bilinear", {"target_size_height": 2**15, "target_size_width": 2**15}),
        ("resize_bilinear", {"target_size_height": 2**21, "target_size_width": 1}),  # too much only in between
        ("resize_nearest_neighbor", {"target_size_height": 2**30, "target_size_width": 0}),
        ("upsample_nearest_neighbor", {"scale_factor_height": 2**30}),
        ("upsample_bilinear", {"scale_factor_width": np.float32(1e9)}),
    ],
)
def test_images_that_no_memory_holds_are_refused(operation: str, more: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=f"is more than the {LARGEST} that are computed here"):
        computed(operation, x=np.zeros((1, 2, 512), np.float32), **more)


@pytest.mark.parametrize("factor", [np.nan, np.inf, -1.0])
def test_factors_that_give_no_size_are_refused(factor: float) -> None:
    with pytest.raises((ValueError, OverflowError, RuntimeError)):
        computed("upsample_bilinear", x=image(1, 2, 2), scale_factor_width=np.float32(factor))

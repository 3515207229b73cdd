"""What a caller gives and gets: arrays and images, held to what the package describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.errors import ArtifactError, PocketError
from targets.coreml_ios.backend import ct, get_new_symbol, mb, proto, types
from targets.coreml_ios.executor import ReferenceModel, features
from targets.coreml_ios.executor.values import Declared
from tests.targets.coreml_ios.executor.programs import converted, runnable

SIZE = (4, 3)  # height, width
COLOURS = proto.FeatureTypes_pb2.ImageFeatureType
ARRAYS = proto.FeatureTypes_pb2.ArrayFeatureType


def drawn(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def feature(**described: Any) -> Any:
    """A feature named x, of an array."""
    made = proto.Model_pb2.FeatureDescription(name="x")
    for name, value in {"dataType": ARRAYS.FLOAT32, **described}.items():
        if isinstance(value, list):
            getattr(made.type.multiArrayType, name).extend(value)
        else:
            setattr(made.type.multiArrayType, name, value)
    return made


def taken(made: Any, given: Any, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    return features.taken(made, given, Declared("fp32", shape))


# ---- images ------------------------------------------------------------------------------------------------------


def double(layout: Any, channels: int, size: tuple[Any, Any] = SIZE) -> ReferenceModel:
    """An image twice as bright, as an image."""
    symbols = (get_new_symbol() if isinstance(one, ct.RangeDim) else one for one in size)
    made = converted(lambda x: mb.mul(x=x, y=2.0, name="y"), [mb.TensorSpec((1, channels, *symbols))], 16,
                     inputs=[ct.ImageType("x", (1, channels, *size), color_layout=layout)])  # fmt: skip
    specification = made.get_spec()
    taken, given = (specification.description.input[0].type, specification.description.output[0].type)
    given.imageType.colorSpace = taken.imageType.colorSpace  # convert itself does so for torch's models only
    return ReferenceModel.of(specification, None)


@pytest.mark.parametrize("layout", [ct.colorlayout.RGB, ct.colorlayout.BGR])
def test_a_picture_goes_in_and_comes_out(layout: Any) -> None:
    pixels = drawn(*SIZE, 3) // 2
    found = double(layout, 3).predict({"x": Image.fromarray(pixels)})["y"]
    assert found.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(found)[..., :3], pixels * 2)
    assert (np.asarray(found)[..., 3] == 255).all()


def test_blue_comes_first_where_the_package_says_so() -> None:
    first = runnable(lambda x: mb.slice_by_size(x=x, begin=[0, 0, 0, 0], size=[1, 1, *SIZE], name="y"),
                     [mb.TensorSpec((1, 3, *SIZE))], 16,
                     inputs=[ct.ImageType("x", (1, 3, *SIZE), color_layout=ct.colorlayout.BGR)])  # fmt: skip
    pixels = drawn(*SIZE, 3)
    found = first.predict({"x": Image.fromarray(pixels)})["y"]
    np.testing.assert_array_equal(found[0, 0], pixels[..., 2])


def test_a_grey_picture_is_cut_off_at_white() -> None:
    pixels = drawn(*SIZE)
    found = double(ct.colorlayout.GRAYSCALE, 1).predict({"x": Image.fromarray(pixels)})["y"]
    assert found.mode == "L"
    np.testing.assert_array_equal(np.asarray(found), np.minimum(pixels.astype(int) * 2, 255))


def test_a_grey_picture_of_float16_is_not() -> None:
    pixels = drawn(*SIZE).astype(np.float32)
    found = double(ct.colorlayout.GRAYSCALE_FLOAT16, 1).predict({"x": Image.fromarray(pixels)})["y"]
    assert found.mode == "F"
    np.testing.assert_array_equal(np.asarray(found), pixels * 2)


def test_pixels_of_float16_are_rounded_to_it() -> None:
    near, made = np.float32([[1 + 2.0**-12, 1e5]]), proto.Model_pb2.FeatureDescription(name="x")
    made.type.imageType.colorSpace, made.type.imageType.height, made.type.imageType.width = 40, 1, 2
    assert features.taken(made, Image.fromarray(near), Declared("fp32", None)).tolist() == [[[[1, np.inf]]]]
    given = torch.from_numpy(near)[None]
    assert np.asarray(features.given_back(made, given)).tolist() == [[1, np.inf]]
    np.testing.assert_array_equal(np.asarray(features.given_back(made, given, keep_float32=True)), near)


def test_a_picture_of_nothing_is_refused_where_its_size_is() -> None:
    model = double(ct.colorlayout.RGB, 3, size=(ct.RangeDim(2, 5), ct.RangeDim(3, 3)))
    with pytest.raises(PocketError, match=r"Size \(0\) of dimension \(0\)"):
        model.predict({"x": Image.fromarray(np.zeros((0, 3, 3), np.uint8))})


def test_pictures_of_several_sizes() -> None:
    made = proto.Model_pb2.FeatureDescription(name="x")
    image = made.type.imageType
    image.colorSpace, image.height, image.width = COLOURS.GRAYSCALE, 4, 3
    image.enumeratedSizes.sizes.add(height=2, width=6)
    for size in ((4, 3), (2, 6)):
        assert list(taken(made, Image.fromarray(drawn(*size))).shape) == [1, 1, *size]
    with pytest.raises(PocketError, match="it takes 4 x 3 or 2 x 6"):
        taken(made, Image.fromarray(drawn(3, 4)))


def test_a_picture_may_come_out_without_a_batch() -> None:
    made = proto.Model_pb2.FeatureDescription(name="y")
    made.type.imageType.colorSpace = COLOURS.RGB
    pixels = drawn(3, *SIZE)
    found = np.asarray(features.given_back(made, torch.from_numpy(pixels).float()))
    np.testing.assert_array_equal(found[..., :3], pixels.transpose(1, 2, 0))


def test_a_picture_of_another_mode_or_size_is_refused() -> None:
    model = double(ct.colorlayout.RGB, 3)
    with pytest.raises(PocketError, match="input x is given an image of mode L; it takes a PIL image of mode RGB"):
        model.predict({"x": Image.fromarray(drawn(*SIZE))})
    with pytest.raises(PocketError, match="input x is given ndarray; it takes a PIL image of mode RGB"):
        model.predict({"x": drawn(*SIZE, 3)})
    with pytest.raises(PocketError, match=r"it takes 4 x 3$"):
        model.predict({"x": Image.fromarray(drawn(3, 4, 3))})


def test_a_picture_of_any_size_within_a_range() -> None:
    model = double(ct.colorlayout.RGB, 3, size=(ct.RangeDim(2, 5), ct.RangeDim(3, 3)))
    pixels = drawn(5, 3, 3) // 2
    np.testing.assert_array_equal(np.asarray(model.predict({"x": Image.fromarray(pixels)})["y"])[..., :3], pixels * 2)
    with pytest.raises(PocketError, match=r"Size \(6\) of dimension \(0\) is not in allowed range \(2..5\)"):
        model.predict({"x": Image.fromarray(drawn(6, 3, 3))})


@pytest.mark.parametrize(("x", "wanted"), [(-1.0, 0), (0.49, 0), (0.5, 1), (1.5, 2), (254.5, 255), (300.0, 255),
                                           (float("inf"), 255), (float("nan"), 0)])  # fmt: skip
def test_floats_become_the_nearest_byte(x: float, wanted: int) -> None:
    made = proto.Model_pb2.FeatureDescription(name="y")
    made.type.imageType.colorSpace = COLOURS.GRAYSCALE
    assert np.asarray(features.given_back(made, torch.full((1, 1, 2, 2), x))).tolist() == [[wanted] * 2] * 2


# ---- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [[1, 2], (1.0, 2.0), np.int64([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True),
              torch.tensor([1, 2], dtype=torch.bfloat16), np.float16([1, 2])],
)  # fmt: skip
def test_an_array_may_be_given_as_anything_that_numpy_takes(given: Any) -> None:
    assert taken(feature(shape=[2]), given).tolist() == [1, 2]


def test_numbers_are_rounded_to_what_is_described() -> None:
    near = 1 + 2.0**-12
    assert taken(feature(shape=[1]), [near]).tolist() == [near]
    assert taken(feature(shape=[1], dataType=ARRAYS.FLOAT16), [near]).tolist() == [1]
    assert taken(feature(shape=[2], dataType=ARRAYS.FLOAT16), [65519, 65520]).tolist() == [65504, float("inf")]
    assert taken(feature(shape=[2], dataType=ARRAYS.INT32), [1.9, -1.9]).tolist() == [1, -1]


def test_whole_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PocketError, match=r"input x is given numbers of 0 to 2147483648; it takes int32, "):
        taken(feature(shape=[2], dataType=ARRAYS.INT32), np.array([0, 2**31]))
    with pytest.raises(PocketError, match=r"of -129 to 1; it takes int8, -128 to 127"):
        taken(feature(shape=[2], dataType=ARRAYS.INT8), [1, -129])
    with pytest.raises(PocketError, match=r"of -1 to 300; it takes int8, -128 to 127"):
        taken(feature(shape=[2], dataType=ARRAYS.INT8), [300.9, -1.5])
    assert taken(feature(shape=[2], dataType=ARRAYS.INT8), [127.9, -128.9]).tolist() == [127, -128]


@pytest.mark.parametrize(
    ("given", "said"),
    [([[1], [1, 2]], "input x is given no array: "), (["a"], "input x is given list; it takes an array of numbers"),
     (None, "input x is given NoneType; it takes"),
     (torch.eye(2).to_sparse(), "input x is given no array: "), (np.array([object()]), "it takes an array of numbers")],
)  # fmt: skip
def test_what_is_no_array_of_numbers_is_refused(given: Any, said: str) -> None:
    with pytest.raises(PocketError, match=said):
        taken(feature(shape=[2]), given)


def test_a_single_number_is_described_as_one_of_one() -> None:
    assert taken(feature(shape=[1]), 3.0, ()).shape == ()
    assert features.given_back(feature(), torch.tensor(3.0)).tolist() == [3]


def test_an_array_without_a_described_shape_may_have_any() -> None:
    assert list(taken(feature(), np.zeros((2, 3))).shape) == [2, 3]


def square(inputs: Any, shape: Any) -> ReferenceModel:
    return runnable(lambda x: mb.square(x=x, name="y"), [mb.TensorSpec(shape)], inputs=inputs)


def test_any_of_several_shapes_and_no_other() -> None:
    shapes = ct.EnumeratedShapes([[1, 2], [1, 4]])
    model = square([ct.TensorType("x", shapes)], (1, get_new_symbol()))
    assert model.predict({"x": [[1, 2, 3, 4]]})["y"].tolist() == [[1, 4, 9, 16]]
    with pytest.raises(PocketError, match=r"Shape \(1 x 3\) was not in enumerated set.*; it takes 1 x 2 or 1 x 4"):
        model.predict({"x": [[1, 2, 3]]})


def test_a_range_of_sizes() -> None:
    model = square([ct.TensorType("x", (ct.RangeDim(2, 4), ct.RangeDim(1, 9)))], (get_new_symbol(), get_new_symbol()))
    assert model.predict({"x": [[3], [2]]})["y"].tolist() == [[9], [4]]
    with pytest.raises(PocketError, match=r"Size \(5\) of dimension \(0\) is not in allowed range \(2..4\); it takes"):
        model.predict({"x": np.zeros((5, 1))})
    with pytest.raises(PocketError, match=r"Shape \(3\) does not have 2 dimensions; it takes 2 to 4 x 1 to 9"):
        model.predict({"x": [1, 2, 3]})


def test_a_range_without_an_end() -> None:
    made = feature()
    made.type.multiArrayType.shapeRange.sizeRanges.add(lowerBound=2, upperBound=-1)
    assert taken(made, np.zeros(1000)).numel() == 1000
    with pytest.raises(PocketError, match=r"Size \(1\) of dimension \(0\).*; it takes 2 or more$"):
        taken(made, [1])


def test_an_input_with_a_default_may_be_left_out() -> None:
    def program(x: Any, y: Any) -> Any:
        return mb.add(x=x, y=y, name="sum")

    inputs = [ct.TensorType("x", (2,)), ct.TensorType("y", (2,), default_value=np.float32([5, 5]))]
    model = runnable(program, [mb.TensorSpec((2,)), mb.TensorSpec((2,))], inputs=inputs)
    assert model.predict({"x": [1, 2]})["sum"].tolist() == [6, 7]
    assert model.predict({"x": [1, 2], "y": [0, 1]})["sum"].tolist() == [1, 3]


def test_an_input_that_is_not_optional_has_no_default() -> None:
    made = feature(shape=[2], floatDefaultValue=3.0)
    assert features.default(made) is None
    made.type.isOptional = True
    found = features.default(made)
    assert found is not None
    assert found.tolist() == [3, 3]


@pytest.mark.parametrize("shape", [[-1, 2], [1] * 65, [2**62, 4], [2**46]])
def test_a_default_of_a_shape_that_no_array_has_is_refused(shape: list[int]) -> None:
    made = feature(shape=shape, floatDefaultValue=3.0)
    made.type.isOptional = True
    with pytest.raises(ArtifactError, match=r"input x is described as .*, which no array is"):
        features.default(made)


# ---- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "numpy"), [("fp16", np.float16), ("fp32", np.float32), ("int32", np.int32)])
def test_what_comes_out_has_the_type_that_is_described(kind: str, numpy: Any) -> None:
    model = runnable(lambda x: mb.cast(x=x, dtype=kind, name="y"), [mb.TensorSpec((2,))])
    found = model.predict({"x": [1.5, 2]})["y"]
    assert found.dtype == numpy
    assert found.tolist() == ([1, 2] if kind == "int32" else [1.5, 2])


def test_a_single_number_comes_out_where_one_is_described() -> None:
    made = proto.Model_pb2.FeatureDescription(name="y")
    made.type.int64Type.SetInParent()
    assert features.given_back(made, torch.tensor([7], dtype=torch.int32)) == 7
    made = feature(dataType=ARRAYS.DOUBLE)
    assert features.given_back(made, torch.tensor([1 + 2.0**-12])).dtype == np.float64
    assert features.given_back(made, torch.tensor([1 + 2.0**-12])).tolist() == [1 + 2.0**-12]


def test_what_comes_out_is_the_callers_own() -> None:
    model = runnable(lambda x: mb.identity(x=x, name="y"), [mb.TensorSpec((2,))])
    given = np.float32([1, 2])
    found = model.predict({"x": given})["y"]
    found[0] = 7
    assert given.tolist() == [1, 2]


def changed(change: Callable[[Any], None], kind: Any = types.fp32) -> ReferenceModel:
    made = converted(lambda x: mb.identity(x=x, name="y"), [mb.TensorSpec((2,), dtype=kind)])
    specification = made.get_spec()
    change(specification.description)
    return ReferenceModel.of(specification, None)


def test_an_input_that_no_program_takes_is_refused() -> None:
    model = changed(lambda said: said.input[0].type.dictionaryType.SetInParent())
    with pytest.raises(ArtifactError, match="input x is of type dictionaryType; an ML program takes arrays and images"):
        model.predict({"x": {"a": 1.0}})


def test_an_array_of_a_type_that_does_not_exist_is_refused() -> None:
    def describe(said: Any) -> None:
        said.input[0].type.multiArrayType.dataType = 0

    with pytest.raises(ArtifactError, match="x is an array of type number 0, which is not known here"):
        changed(describe).predict({"x": [1, 2]})

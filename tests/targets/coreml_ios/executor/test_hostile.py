"""Damaged packages end in a clear error or run; `scripts/fuzz_coreml.py` tries many more."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ArtifactError, PocketError
from targets.coreml_ios.backend import mb, proto
from targets.coreml_ios.executor import ReferenceModel, machine
from tests.targets.coreml_ios.executor import hostile

EACH = 40


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, hostile.Base]:
    return hostile.bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_what_is_damaged_later_runs_whole(name: str, bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    base = bases[name]
    hostile.run(hostile.write(base.files, tmp_path), dict(base.inputs))


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_damaged_packages_are_refused_or_run(name: str, bases: dict[str, hostile.Base], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("targets.coreml_ios.executor.values.LARGEST", 2**22)
    monkeypatch.setattr(machine, "MOST_ROUNDS", 2**10)
    refused = 0
    for seed in range(EACH):
        files = hostile.damaged(bases[name].files, random.Random(f"{name} {seed}"))
        try:
            hostile.run(hostile.write(files, tmp_path / str(seed)), dict(bases[name].inputs))
        except PocketError as error:
            assert str(error)  # noqa: PT017 (anything but our errors fails the test by itself)
            refused += 1
    assert refused > EACH / 2


def test_an_output_that_is_no_single_number_is_refused_as_one(bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    """Found by damaging: an array that was described as a number ended in torch's own exception."""

    def describe(specification: Any) -> None:
        specification.description.output[0].type.int64Type.SetInParent()

    package = changed(bases["pictures"], describe, tmp_path)
    with pytest.raises(ArtifactError, match=r"is described as int64Type, and came out as \[1, 2, 3, 5\]"):
        hostile.run(package, dict(bases["pictures"].inputs))


def test_an_output_that_is_no_image_is_refused_as_one(bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    """Found by damaging: PIL's own exception came out."""

    def describe(specification: Any) -> None:
        specification.description.output[0].type.imageType.colorSpace = proto.FeatureTypes_pb2.ImageFeatureType.RGB

    package = changed(bases["pictures"], describe, tmp_path)
    with pytest.raises(ArtifactError, match=r"is an image of 3 channels, and came out as \[1, 2, 3, 5\]"):
        hostile.run(package, dict(bases["pictures"].inputs))


def test_a_colour_space_that_does_not_exist_is_refused(bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    def describe(specification: Any) -> None:
        specification.description.output[0].type.imageType.width = 3

    package = changed(bases["pictures"], describe, tmp_path)
    with pytest.raises(ArtifactError, match="an image of colour space number 0, which is not known here"):
        hostile.run(package, dict(bases["pictures"].inputs))


def test_a_loop_without_an_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by damaging: a condition that nothing changes any more."""
    monkeypatch.setattr(machine, "MOST_ROUNDS", 100)

    def program(x: Any) -> Any:
        first = mb.reduce_sum(x=x)
        return mb.while_loop(
            _cond=lambda v: mb.less(x=v, y=1e9), _body=lambda v: mb.mul(x=v, y=1.0), loop_vars=(first,)
        )

    base = hostile._base(tmp_path / "base", {"x": mb.TensorSpec((3,))}, program)
    with pytest.raises(ArtifactError, match=r"while_loop .*: loops that have not ended after 100 rounds"):
        hostile.run(hostile.write(base.files, tmp_path), {"x": [1.0, 2.0, 3.0]})


def test_operations_that_read_each_other_are_refused(bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    def swap(specification: Any) -> None:
        operations = block_of(specification).operations
        computed = [index for index, one in enumerate(operations) if one.type == "linear"]
        last = next(index for index, one in enumerate(operations) if one.type == "concat")
        operations[computed[0]].inputs["x"].arguments[0].name = operations[last].outputs[0].name

    package = changed(bases["constants"], swap, tmp_path)
    with pytest.raises(ArtifactError, match="which is not made before it"):
        ReferenceModel(package)


def test_an_enormous_shape_is_refused_before_it_is_made(bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    def grow(specification: Any) -> None:
        operations = block_of(specification).operations
        (reps,) = (one.inputs["reps"].arguments[0].name for one in operations if one.type == "tile")
        (const,) = (one for one in operations if one.outputs[0].name == reps)
        const.attributes["val"].immediateValue.tensor.ints.values[0] = 2**30

    package = changed(bases["shapes"], grow, tmp_path)
    with pytest.raises(ArtifactError, match=r"tile .*: a tensor of \d+ values is more than the"):
        hostile.run(package, dict(bases["shapes"].inputs))


@pytest.mark.parametrize("place", ["Data/com.apple.CoreML/weights", "Data/com.apple.CoreML/model.mlmodel", "Data"])
def test_a_link_out_of_the_package_is_refused(place: str, bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    package = hostile.write(bases["constants"].files, tmp_path)
    ReferenceModel(package)
    (package / place).rename(tmp_path / "outside")
    (package / place).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match=rf"{place} is a link; copy the package with what its links lead to"):
        ReferenceModel(package)


def test_a_package_may_itself_be_reached_by_a_link(bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    package = hostile.write(bases["constants"].files, tmp_path)
    (tmp_path / "link.mlpackage").symlink_to(package)
    ReferenceModel(tmp_path / "link.mlpackage")


def test_a_name_that_no_file_has_is_refused(bases: dict[str, hostile.Base], tmp_path: Path) -> None:
    """Found in review: the system's own exception came out."""
    files = bases["constants"].files
    longer = files["manifest"].replace(b"com.apple.CoreML/model.mlmodel", b"x/" * 3000 + b"model.mlmodel")
    assert longer != files["manifest"]
    with pytest.raises(ArtifactError, match=r"damaged.mlpackage cannot be read: .*[Nn]ame too long"):
        ReferenceModel(hostile.write({**files, "manifest": longer}, tmp_path))


def changed(base: hostile.Base, change: Any, folder: Path) -> Path:
    """A package whose specification was changed."""
    specification = proto.Model_pb2.Model()
    specification.ParseFromString(base.files["program"])
    change(specification)
    return hostile.write({**base.files, "program": specification.SerializeToString()}, folder)


def block_of(specification: Any) -> Any:
    function = specification.mlProgram.functions["main"]
    return function.block_specializations[function.opset]

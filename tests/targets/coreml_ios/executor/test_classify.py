"""Classifiers: a label, and the probability of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from targets.coreml_ios.backend import ct, mb
from targets.coreml_ios.executor.ops import OPERATIONS
from tests.targets.coreml_ios.executor.programs import runnable


def test_the_first_of_the_largest_is_the_class() -> None:
    label, shares = OPERATIONS["classify"](torch.tensor([[0.25, 0.5, 0.5]]), ["a", "b", "c"])
    assert label == "b"
    assert shares == {"a": 0.25, "b": 0.5, "c": 0.5}


def test_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        OPERATIONS["classify"](torch.tensor([0.5, 0.5]), ["a", "b", "c"])


@pytest.mark.parametrize("labels", [["cat", "dog", "fish"], [30, 10, 20]])
def test_a_classifier_gives_a_label_and_a_dictionary(labels: list[Any]) -> None:
    def program(x: Any) -> Any:
        return mb.softmax(x=x, axis=-1, name="shares")

    model = runnable(program, [mb.TensorSpec((1, 3))], 16, classifier_config=ct.ClassifierConfig(labels))
    found = model.predict({"x": np.log(np.float32([[1, 5, 2]]))})
    assert found["classLabel"] == labels[1]
    (shares,) = (value for value in found.values() if isinstance(value, dict))
    assert list(shares) == labels
    assert list(shares.values()) == pytest.approx([1 / 8, 5 / 8, 2 / 8])

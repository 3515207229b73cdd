"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


# A shared machine may stall any example; in CI the same examples are drawn every time.
settings.register_profile("pocket", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("pocket")


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stories() -> Path:
    """The published stories260K checkpoint."""
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def stories_text() -> Path:
    """Text of the kind that stories260K was trained on."""
    return _shared("data/tinystories-sample.txt")


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is missing: put the shared data folder beside the repository to run this test")
    return path

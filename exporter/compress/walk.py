"""The walk that every layer-wise method takes: layer after layer, with the inputs that the finished ones give."""

from __future__ import annotations

from collections.abc import Callable

from exporter.calibrate import Calibration, Samples
from exporter.compress.step import Journal
from exporter.model import Model

Block = Callable[[Model, int, Calibration | None], Model]


def walk(model: Model, samples: Samples | None, block: Block, journal: Journal) -> Model:
    """Compress a model layer by layer.

    Args:
        model: Stays as it is.
        samples: Calibration text, or None.
        block: Compresses one layer: gets the model with all layers before it finished, the layer's index, and the
            calibration that stands before it (None without samples).
        journal: Keeps each finished layer, so that a killed run goes on behind it.
    """
    model, done, activations = journal.resume(model)
    count = len(model.architecture.layers)
    resumed = (done, activations) if done else None
    calibration = None
    if samples is not None and done < count:
        calibration = Calibration(model, samples, device=journal.device, resumed=resumed)
    for layer in range(done, count):
        after = block(model, layer, calibration)
        if calibration is not None and layer + 1 < count:  # behind the last one stands nothing
            calibration.advance(after, layer)
        model = journal.keep(model, after, layer, () if calibration is None else calibration.activations)
        journal.report((layer + 1) / count)
    return model

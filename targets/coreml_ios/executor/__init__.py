"""A reference executor of Core ML's ML programs: any `.mlpackage`, on the CPU, with torch.

    from targets.coreml_ios.executor import ReferenceModel

    model = ReferenceModel("model.mlpackage")
    outputs = model.predict({"x": array})

Each operation is computed in float32 and its result rounded to the type that the program declares for it.
"""

from targets.coreml_ios.executor.model import NOTE, ReferenceModel, ReferenceState

__all__ = ["NOTE", "ReferenceModel", "ReferenceState"]

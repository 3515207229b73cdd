"""Every error that users meet.

PocketError                 exit code 2: what was given, what is allowed, what to do next
├── CheckpointError         a checkpoint, saved model or tokenizer cannot be read
│   └── ArchitectureError   its family, or a field of its config, is not known here
├── WeightError             a weight tree whose parts do not fit together
├── RecipeError             a recipe asks for something that does not exist or does not fit the model
├── TargetError             a target cannot take this model
├── ArtifactError           an artifact or bundle is not what its manifest says
│   └── FileChangedError    one of its files has other bytes
├── OutputError             the output folder cannot be used
├── PhoneError              a phone cannot be used, or lost a run
├── CheckFailedError        exit code 3: the artifact's numbers are not its model's
└── BackendMissingError     exit code 4: an optional back end is not installed
"""


class PocketError(Exception):
    """Something that the user can mend; the message is one clear line."""

    exit_code = 2


class CheckpointError(PocketError):
    """A checkpoint, saved model or tokenizer cannot be read."""


class ArchitectureError(CheckpointError):
    """A model family, or a field of its config, that no adapter honours."""


class WeightError(PocketError):
    """Parts of a weight that do not fit together."""


class RecipeError(PocketError):
    """A recipe that cannot be followed."""


class TargetError(PocketError):
    """A target that cannot take this model."""


class ArtifactError(PocketError):
    """An artifact or bundle that is not what its manifest says."""


class FileChangedError(ArtifactError):
    """A file of an artifact or bundle whose bytes are not those that its manifest names."""


class OutputError(PocketError):
    """An output folder that cannot be used."""


class PhoneError(PocketError):
    """A phone that cannot be used, or that ended a run without an answer."""


class CheckFailedError(PocketError):
    """An artifact whose numbers are not its model's."""

    exit_code = 3


class BackendMissingError(PocketError):
    """An optional back end that is not installed.

    Args:
        what: Who needs it, e.g. `target coreml-ios`.
        module: The import package that is missing.
        extra: The pip extra that brings it.
    """

    def __init__(self, what: str, module: str | None, extra: str) -> None:
        hint = f"pip install 'pocket-exporter[{extra}]'"
        super().__init__(f"{what} needs {module}, which is not installed; {hint}")

    exit_code = 4

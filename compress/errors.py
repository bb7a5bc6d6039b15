"""The errors a user can meet.

    CompressError
    ├── UsageError          an option, a name or a combination that is not allowed   (ValueError)
    ├── LoadError           a model file that cannot be read                         (ValueError)
    │   └── UnsafeFileError a file that would execute code if it were loaded
    ├── DataError           calibration or evaluation data that do not fit           (ValueError)
    ├── UnsupportedError    a model or a target that cannot do what is asked         (ValueError)
    ├── MissingExtraError   an optional package that is not installed                (ImportError)
    ├── ExportError         torch -> ONNX failed or changed the outputs              (RuntimeError)
    ├── EngineError         a runtime refused a model or failed while running it     (RuntimeError)
    ├── DeviceError         a device cannot be reached or used, or dropped out       (RuntimeError)
    └── OutputError         the artifact cannot be written                           (OSError)

Every message says what was given, what is allowed and what to do next, in one paragraph.
"""


class CompressError(Exception):
    """Base of all errors that this toolkit raises on purpose."""


class UsageError(CompressError, ValueError):
    """An option, a name or a combination of them is not allowed."""


class LoadError(CompressError, ValueError):
    """A model file cannot be read."""


class UnsafeFileError(LoadError):
    """Loading the file would execute code that it carries."""


class DataError(CompressError, ValueError):
    """Calibration or evaluation data do not fit the model."""


class UnsupportedError(CompressError, ValueError):
    """The model or the target cannot do what is asked."""


class MissingExtraError(CompressError, ImportError):
    """An optional package is needed and not installed."""


class ExportError(CompressError, RuntimeError):
    """Export to ONNX failed, or its outputs differ from the original's."""


class EngineError(CompressError, RuntimeError):
    """A runtime refused a model, or failed while running it."""


class DeviceError(CompressError, RuntimeError):
    """A device that is measured on cannot be reached or used, or dropped out."""


class OutputError(CompressError, OSError):
    """The artifact cannot be written."""

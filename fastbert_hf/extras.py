"""What the core does without: modules that an extra of the package installs."""

from importlib.util import find_spec

# extra of setup.cfg -> modules that must be there
EXTRAS = {
    "training": ("accelerate", "datasets", "scipy", "sklearn"),
    "embedding": ("sentence_transformers",),
    "rivals": ("nncf", "onnx", "onnxruntime", "openvino"),
    "serve": ("fastapi", "sentence_transformers", "uvicorn"),
    "bench": ("matplotlib", "onnx", "onnxruntime", "onnxscript"),
}


class MissingExtraError(ImportError):
    """A module of an extra is not installed; the message names the extra."""


def require_extra(extra: str, *modules: str) -> None:
    """Check that what an extra installs is there.

    Args:
        extra: key of `EXTRAS`.
        *modules: those of its modules that are needed; default: all.

    Raises:
        MissingExtraError: naming the modules that are missing and the command that installs them.
    """
    missing = [name for name in modules or EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"this needs the extra {extra}: pip install 'fastbert-hf[{extra}]'"
        )

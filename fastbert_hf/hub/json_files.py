"""JSON files that others wrote."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        ValueError: the file cannot be read or is not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers too long to read
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds {type(content).__name__}; expected a JSON object")
    return content

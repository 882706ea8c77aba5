"""What is done of a run that has several stages, and how long each took."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastbert_hf.files import write_text

STAGES = "stages.json"


class Stages:
    """What is done of a run and how long it took, in a file of its folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self._file = folder / STAGES
        self._done: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[Callable[[], None]]:
        """Count the seconds of a stage, also of one that is interrupted by an error.

        Yields:
            What notes the seconds until now: those that a killed process has noted count, the others do not.
        """
        began, before = time.perf_counter(), self.seconds(name)

        def note() -> None:
            self.put(f"{name}_seconds", round(before + time.perf_counter() - began, 1))

        try:
            yield note
        finally:
            note()

    def seconds(self, name: str) -> float:
        """Seconds of a stage until now."""
        return self._done.get(f"{name}_seconds", 0.0)

    def put(self, name: str, value: Any) -> None:
        """Remember a value that JSON can hold."""
        self._done[name] = value
        write_text(self._file, json.dumps(self._done, indent=2) + "\n")

    def get(self, name: str, default: Any = None) -> Any:
        """A value that was put."""
        return self._done.get(name, default)

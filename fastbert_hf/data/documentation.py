"""A corpus that every machine has: the documentation strings of its own Python.

Sources are parsed, never imported. The same installation always gives the same documents in the same order;
another set of packages gives other text, so figures obtained on this corpus compare only on one machine.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastbert_hf.data.cleaning import replace_surrogates

# Folders of tests hold little prose; site-packages lies inside the standard library's folder.
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "__pycache__", "fastbert_hf"}
MAX_FILE_BYTES = 400_000  # generated tables: slow to parse, no prose
MIN_CHARACTERS = 60


@dataclass(frozen=True)
class Document:
    """One documentation string.

    Attributes:
        text: the prose on one line.
        package: top-level package it documents; "python" for the standard library.
        file: source file relative to its root, the unit for train and validation splits.
    """

    text: str
    package: str
    file: str


def source_files(roots: dict[str, str | None] | None = None) -> list[tuple[Path, str, str]]:
    """List the Python sources of this installation in an order that mixes packages.

    Args:
        roots: folder -> package name of all its files, or None to take the first folder of the relative path.
            Default: the standard library ("python") and the installed packages.

    Returns:
        (path, package, path relative to its root), ordered by the hash of the relative path, so that any prefix
        of the list is a fair sample of all packages.
    """
    if roots is None:
        roots = {sysconfig.get_path("stdlib"): "python"}
        roots.update({sysconfig.get_path(name): None for name in ("purelib", "platlib")})
    found = {}
    for root, package in roots.items():
        for path in Path(root).rglob("*.py"):
            relative = path.relative_to(root)
            if not SKIPPED_FOLDERS.intersection(relative.parts):
                found[str(relative)] = (path, package or relative.parts[0].removesuffix(".py"), str(relative))
    return [found[name] for name in sorted(found, key=_order)]


def docstrings(path: Path) -> Iterator[str]:
    """Extract the documentation strings of one source file.

    Args:
        path: a Python source file. What is no file (folders, broken links), cannot be read, or cannot be parsed by
            this Python (templates, other versions, other encodings) gives nothing.

    Yields:
        Cleaned docstrings of the module, its classes and its functions, in source order, with U+FFFD in the place
        of lone surrogates.
    """
    try:
        source = path.read_bytes() if path.is_file() else b""
    except OSError:
        return
    if len(source) > MAX_FILE_BYTES or b'"""' not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield replace_surrogates(text)


def _topics() -> dict[str, str]:
    """The language reference that `help()` shows; some distributions leave it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def documentation_corpus(
    max_megabytes: float | None = None,
    roots: dict[str, str | None] | None = None,
    progress: bool = False,
) -> list[Document]:
    """Collect documentation text from the installed Python and its packages.

    Paragraphs seen before (licences, shared argument lists, copies of a package) are dropped, so that text set
    aside for validation does not also sit in the training part.

    Args:
        max_megabytes: stop when this many million characters are collected; None takes everything.
        roots: see `source_files`; given roots leave the pydoc topics out.
        progress: show a progress bar.

    Returns:
        Documents of at least 60 characters, in a fixed order.

    Raises:
        ValueError: if no text was found or `max_megabytes` is not positive.
    """
    if max_megabytes is not None and max_megabytes <= 0:
        raise ValueError(f"max_megabytes must be positive; got {max_megabytes}")
    from tqdm.auto import tqdm

    limit = float("inf") if max_megabytes is None else max_megabytes * 1e6
    seen: set[bytes] = set()
    documents: list[Document] = []
    size = 0
    bar = tqdm(
        total=None if max_megabytes is None else int(limit),
        desc="documentation",
        unit="char",
        unit_scale=True,
        mininterval=2,
        disable=not progress,
    )
    with bar:
        for text, package, file in _raw_texts(roots):
            document = _new_paragraphs(text, seen)
            if len(document) >= MIN_CHARACTERS:
                documents.append(Document(document, package, file))
                size += len(document)
                bar.update(len(document))
            if size >= limit:
                break
    if not documents:
        raise ValueError(f"no documentation strings were found in {list(roots) if roots else 'this Python'}")
    return documents


def _raw_texts(roots: dict[str, str | None] | None) -> Iterator[tuple[str, str, str]]:
    """(text, package, file) in the order of the files' hashes, pydoc topics mixed in as files of their own."""
    sources: list[tuple[Path | str, str, str]] = list(source_files(roots))
    if roots is None:
        sources += [(text, "python", f"pydoc_data/topics/{name}") for name, text in _topics().items()]
    for source, package, file in sorted(sources, key=lambda source: _order(source[2])):
        for text in [source] if isinstance(source, str) else docstrings(source):
            yield text, package, file


def _order(file: str) -> bytes:
    return hashlib.sha1(file.encode("utf-8", "surrogatepass")).digest()


def _new_paragraphs(text: str, seen: set[bytes]) -> str:
    """Join the paragraphs that were not seen before into one line, and remember them."""
    kept = []
    for paragraph in text.split("\n\n"):
        paragraph = " ".join(paragraph.split())
        digest = hashlib.sha1(paragraph.encode("utf-8", "surrogatepass")).digest()
        if paragraph and digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return " ".join(kept)

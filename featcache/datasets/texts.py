"""What a text may be: UTF-8 of a sane length that says something. And texts that come with scikit-learn."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from featcache.datasets.base import Dataset, MemoryReader, Sample
from featcache.errors import DataError, UnreadableSample

MOST_TEXT_BYTES = 1 << 20  # a long novel; a larger file is a log or a dump, whose first words say nothing of it
TEXT_SUFFIXES = frozenset({".txt"})
DOCSTRINGS = "sklearn:docstrings"
# packages of scikit-learn that say enough of themselves to be told apart; what the others say is nobody's test
_TOLD_APART = (
    *("cluster", "datasets", "decomposition", "ensemble", "linear_model", "metrics", "model_selection", "preprocessing"),
)
_OTHERS = ("feature_extraction", "feature_selection", "gaussian_process", "neighbors", "svm", "tree", "utils")
_FEWEST_WORDS = 6


def decode_text(content: bytes) -> str:
    """Return a sample's text, without a byte order mark.

    Raises:
        UnreadableSample: it is empty, no UTF-8, or longer than 1 MiB.
    """
    if len(content) > MOST_TEXT_BYTES:
        raise UnreadableSample(f"a text of {len(content) / 1e6:.1f} MB, over the limit of {MOST_TEXT_BYTES / 1e6:.1f} MB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableSample(f"no text in UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UnreadableSample("an empty text")
    return text


def open_docstrings() -> Dataset:
    """Open the paragraphs of scikit-learn's docstrings, by package, as the installed version has them.

    Raises:
        DataError: its source is not installed.
    """
    paragraphs = _paragraphs(_TOLD_APART)
    count, content, samples = dict.fromkeys(_TOLD_APART, 0), {}, []
    for text, package in paragraphs.items():
        path = f"{package}/{count[package]:04d}.txt"
        count[package] += 1
        content[path] = text.encode()
        samples.append(Sample(path, package))
    return Dataset("docstrings", DOCSTRINGS, samples, MemoryReader(content), kind="text")


def other_docstrings() -> list[str]:
    """Return paragraphs of the packages that ``open_docstrings`` leaves out.

    Raises:
        DataError: as of ``open_docstrings``.
    """
    inside = _paragraphs(_TOLD_APART)
    return [text for text in _paragraphs(_OTHERS) if text not in inside]


def _paragraphs(packages: tuple[str, ...]) -> dict[str, str]:
    """Return each paragraph once, with the package that says it first."""
    spec = find_spec("sklearn")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    paragraphs: dict[str, str] = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if "tests" not in path.relative_to(root).parts:
                for text in _said_in(path):
                    paragraphs.setdefault(text, package)
    if not paragraphs:
        raise DataError(f"{DOCSTRINGS}: this installation of scikit-learn has no source to read them from.")
    return paragraphs


def _said_in(path: Path) -> Iterator[str]:
    """Yield the paragraphs of a module's docstrings, on one line each, without lists of parameters."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
        prose = re.split(r"\n[A-Z][A-Za-z ]+\n-{3,}", text or "")[0]
        for paragraph in re.split(r"\n\s*\n", prose):
            line = " ".join(paragraph.split())
            if len(line.split()) >= _FEWEST_WORDS and not line.startswith(".."):
                yield line

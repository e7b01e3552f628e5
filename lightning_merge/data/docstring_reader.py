"""First docstring sentences of installed packages, read from their source files with ``ast``; nothing is imported."""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lightning_merge.errors import UserError

STANDARD_LIBRARY = "stdlib"
# Tests, demonstrations, copies of other projects, and whatever is installed inside the standard library's folder.
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "testing",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__pycache__",
        "_vendor",
        "vendor",
        "vendored",
        "_vendored",
        "extern",
        "externals",
        "third_party",
        "array_api_compat",
        "array_api_extra",
    }
)
LARGEST_FILE = 150_000  # bytes; larger ones are tables or generated
FEWEST_WORDS, MOST_WORDS = 4, 40
INSTALL_NAMES = {"sklearn": "scikit-learn", "mpl_toolkits": "matplotlib"}

Kind = Literal["module", "class", "function", "method", "property"]
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)*:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_SENTENCE_END = re.compile(r"[.!?:](?=\s+[A-Z\[(]|\s*$)")
_MARKUP = re.compile(r"%\(|[{}\\<>$|=*]|>>>|https?:|:[a-z]+:|--|::|__")


@dataclass(frozen=True)
class Documented:
    """One object with its first docstring sentence.

    Args:
        package: the package it stands in.
        module: dotted path of its module.
        name: its own name, empty for a module.
        kind: what it is.
        sentence: the first sentence, free of markup, 4 to 40 words.
        returns: the return annotation as written, or ``None``.
        result: what a function's body gives back: ``"truth"`` (only truth values), ``"value"``, ``"nothing"``, or
            ``None`` where there is no body to tell from.
    """

    package: str
    module: str
    name: str
    kind: Kind
    sentence: str
    returns: str | None
    result: Literal["truth", "value", "nothing"] | None


def stable_hash(text: str, purpose: str) -> int:
    """Return 64 bits of BLAKE2b over ``purpose`` and ``text``: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest(), "big")


def normalise(sentence: str) -> str:
    """Return the sentence's words in lower case, without punctuation: what decides whether two are the same."""
    return " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))


@lru_cache(maxsize=256)
def read_package(package: str, megabytes: float) -> tuple[Documented, ...]:
    """Read a package's documented objects; each package is parsed once in a process.

    Args:
        package: a top-level name, or ``"stdlib"``.
        megabytes: the most source to read. Which files is decided by the hash of their paths, so a new version of the
            package changes little.

    Raises:
        UserError: the package is not installed, or not as Python source.
    """
    found: list[Documented] = []
    budget = megabytes * 1e6
    # Building trees makes many objects and no garbage cycles; with collection on, it takes twice as long.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path, relative in _source_files(package):
            size = path.stat().st_size
            if size > LARGEST_FILE:
                continue
            budget -= size
            if budget < 0:
                break
            parts = [part for part in relative.removesuffix(".py").split("/") if part != "__init__"]
            found += _read_file(path, package, ".".join(parts if package == STANDARD_LIBRARY else [package, *parts]))
    finally:
        if collecting:
            gc.enable()
    return tuple(found)


def _source_files(package: str) -> list[tuple[Path, str]]:
    """Return the source files with their ``/``-separated paths relative to the package, in order of those's hash."""
    root = _root(package)
    if root.is_file():
        return [(root, "__init__.py")]
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        for name in names:
            if name.endswith(".py") and not name.startswith("test_") and name != "conftest.py":
                path = Path(folder, name)
                files.append((path, path.relative_to(root).as_posix()))
    return sorted(files, key=lambda file: (stable_hash(file[1], "file"), file[1]))


def _root(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    try:
        # Of a top-level name this runs no code of the package.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        install = INSTALL_NAMES.get(package, package.replace("_", "-"))
        raise UserError(
            f"Package '{package}' is not installed, so its docstrings cannot be read. Install it with: pip install "
            f"{install} (or leave it out of packages and ood_packages)."
        )
    folders = list(spec.submodule_search_locations or [])
    if folders and Path(folders[0]).is_dir():
        return Path(folders[0])
    if spec.origin is not None and spec.origin.endswith(".py") and Path(spec.origin).is_file():
        return Path(spec.origin)
    raise UserError(f"Package '{package}' is not installed as Python source. Accepted: packages with .py files.")


def _read_file(path: Path, package: str, module: str) -> list[Documented]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    return list(_documented(tree, "module", package, module))


def _documented(node: ast.AST, kind: Kind, package: str, module: str) -> Iterator[Documented]:
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    docstring = ast.get_docstring(node, clean=False)
    sentence = first_sentence(docstring) if docstring else None
    if sentence:
        returns, result = None, None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            returns = ast.unparse(node.returns).strip("'\"") if node.returns is not None else None
            result = _result(node)
        yield Documented(package, module, getattr(node, "name", ""), kind, sentence, returns, result)
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, "class", package, module)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _documented(child, _function_kind(child, node), package, module)


def _function_kind(node: ast.FunctionDef | ast.AsyncFunctionDef, parent: ast.Module | ast.ClassDef) -> Kind:
    if isinstance(parent, ast.Module):
        return "function"
    names = {getattr(decorator, "attr", getattr(decorator, "id", "")) for decorator in node.decorator_list}
    return "property" if names & {"property", "cached_property", "setter"} else "method"


def _result(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Literal["truth", "value", "nothing"] | None:
    body = node.body[1:]  # without the docstring
    if all(isinstance(line, (ast.Pass, ast.Raise)) or _is_constant(line) for line in body):
        return None
    returned: list[ast.expr] = []
    open_nodes: list[ast.AST] = list(body)
    while open_nodes:
        inner = open_nodes.pop()
        if isinstance(inner, (ast.Yield, ast.YieldFrom)):
            return "value"
        if isinstance(inner, ast.Return) and inner.value is not None and not _is_none(inner.value):
            returned.append(inner.value)
        if not isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            open_nodes.extend(ast.iter_child_nodes(inner))
    if not returned:
        return "nothing"
    return "truth" if all(_is_truth(value) for value in returned) else "value"


def _is_constant(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _is_truth(value: ast.expr) -> bool:
    if isinstance(value, ast.Constant):
        return isinstance(value.value, bool)
    if isinstance(value, ast.Compare):
        return True
    if isinstance(value, ast.UnaryOp):
        return isinstance(value.op, ast.Not)
    if isinstance(value, ast.BoolOp):
        return all(_is_truth(part) for part in value.values)
    if isinstance(value, ast.Call):
        return getattr(value.func, "id", "") in (
            "isinstance",
            "issubclass",
            "hasattr",
            "callable",
            "any",
            "all",
            "bool",
        )
    return False


def first_sentence(docstring: str) -> str | None:
    """Return the first sentence in plain words, or ``None`` if it is too short, too long or mostly markup.

    Args:
        docstring: as it stands in the source.
    """
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    text = _ROLE.sub(lambda match: match.group(1).split(".")[-1], " ".join(paragraph.split()))
    text = text.replace("`", "").replace("**", "")
    end = _SENTENCE_END.search(text)
    text = (text[: end.start()] if end else text).strip() + "."
    words = text.split()
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS or len(re.findall(r"[A-Za-z]{2,}", text)) < FEWEST_WORDS:
        return None
    letters = sum(character.isalpha() or character == " " for character in text)
    if _MARKUP.search(text) or not text.isascii() or letters < 0.85 * len(text):
        return None
    return text

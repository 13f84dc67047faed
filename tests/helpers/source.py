"""The file povfarm.py as a text and as a tree, and the map of its sections.

It is read when it is asked for: each process of the tests knows this module, and few need the tree.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import povfarm

PATH = Path(povfarm.__file__)
SOURCE = PATH.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
BANNER = re.compile(r"# === (\d+)\. ([A-Z]+) =+")
BANNERS = [(number, match) for number, line in enumerate(LINES, 1)
           for match in [BANNER.fullmatch(line)] if match]
SECTIONS = [match[2] for _, match in BANNERS]


@functools.lru_cache(None)
def tree() -> ast.Module:
    """The whole file."""
    return ast.parse(SOURCE)


@functools.lru_cache(None)
def nodes() -> Tuple[ast.AST, ...]:
    """Every part of it."""
    return tuple(ast.walk(tree()))


def functions() -> List[ast.FunctionDef]:
    """Every function and method."""
    return [node for node in nodes() if isinstance(node, ast.FunctionDef)]


def top() -> List[ast.stmt]:
    """The statements at the top, without the imports."""
    return [node for node in tree().body if not isinstance(node, (ast.Import, ast.ImportFrom))]


def section_at(line: int) -> str:
    """The section of a line, empty above the first banner."""
    return next((match[2] for number, match in reversed(BANNERS) if number <= line), "")


def names_bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of the file binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for name in ast.walk(ast.Tuple(targets, ast.Store())):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                yield name.id
    elif isinstance(node, (ast.If, ast.Try, ast.For, ast.With)):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.stmt):
                yield from names_bound(inner)


@functools.lru_cache(None)
def owners() -> Dict[str, str]:
    """The section of each name that is bound at the top."""
    return {name: section_at(node.lineno) for node in tree().body for name in names_bound(node)}

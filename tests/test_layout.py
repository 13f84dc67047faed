"""The map of the file, and the rules that keep it readable, held to the code."""

from __future__ import annotations

import ast
import builtins
import functools
import itertools
import re
import symtable
import sys
from typing import Dict, Iterator, List, Set, Tuple

import pytest

import povfarm
from helpers.base import ROOT
from helpers.source import (
    BANNER,
    BANNERS,
    LINES,
    PATH,
    SECTIONS,
    SOURCE,
    functions,
    names_bound,
    nodes,
    owners,
    section_at,
    top,
    tree,
)

COORDINATOR = {"STORE", "SCHEDULER", "API", "HTTPOV", "SHEEPIT", "RENDERONLINE", "PAGES",
               "COORDINATOR"}
WORKER = {"ENGINES", "CLIENT", "PROCESS", "WORKER"}
# Tables may be long: what is counted is code.
LONGEST = 60
LONGEST_CLASS = 450


def quoted_types(node: ast.AST) -> Iterator[ast.AST]:
    """The annotations in a piece of code, and the types that ``cast`` is given."""
    for part in ast.walk(node):
        if isinstance(part, (ast.arg, ast.AnnAssign)) and part.annotation:
            yield part.annotation
        elif isinstance(part, ast.FunctionDef) and part.returns:
            yield part.returns
        elif isinstance(part, ast.Call) and ast.unparse(part.func) == "cast":
            given = part.args[0]
            yield ast.parse(given.value) if isinstance(given, ast.Constant) else given


def loaded(node: ast.AST) -> Set[str]:
    """The names that an expression or a statement at the top looks up."""
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    bound = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    bound |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    return {name.id for name in names} - bound


def globals_in(table: symtable.SymbolTable) -> Set[str]:
    """The names at the top of the file that a function or class looks up, wherever in it."""
    found = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_global() and symbol.is_referenced()}
    return found.union(*(globals_in(inner) for inner in table.get_children()))


def used_by(node: ast.stmt, tables: Dict[Tuple[str, int], symtable.SymbolTable]) -> Set[str]:
    """The names at the top of the file that a statement there uses, types included."""
    names = {name for kind in quoted_types(node) for name in loaded(kind)}
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return names | loaded(node)
    around: List[ast.AST] = [*node.decorator_list]
    around += node.bases if isinstance(node, ast.ClassDef) else [node.args]
    inside = next(table for (name, line), table in tables.items()
                  if name == node.name and node.lineno - 30 < line <= node.lineno)
    return names.union(globals_in(inside), *(loaded(part) for part in around))


def public(tree: ast.AST, prefix: str = "") -> Iterator[Tuple[str, ast.AST]]:
    """Every public function, class and method with its full name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


# --- the map

def test_the_banners_are_those_of_the_index() -> None:
    index = re.findall(r"^ {4,5}(\d+)\. ([A-Z]+) +\S", povfarm.__doc__ or "", re.MULTILINE)
    assert [(match[1], match[2]) for _, match in BANNERS] == index
    assert [int(number) for number, _ in index] == list(range(1, len(index) + 1))
    assert len(index) == 22


def test_the_papers_have_the_same_sections_in_the_same_towers() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (?:([\d-]+) \| ([A-Z, ]+)|\| \*\*(\w+)\*\*) \|", design, re.MULTILINE)
    told: List[Tuple[str, str]] = []
    towers: Dict[str, Set[str]] = {}
    for numbers, names, tower in table:
        if tower:
            towers[tower] = set()
            continue
        first, _, last = numbers.partition("-")
        told += zip(map(str, range(int(first), int(last or first) + 1)), names.split(", "))
        list(towers.values())[-1].update(names.split(", "))
    assert told == [(match[1], match[2]) for _, match in BANNERS]
    assert list(towers) == ["base", "coordinator", "worker", "roof"]
    assert (towers["coordinator"], towers["worker"]) == (COORDINATOR, WORKER)


def test_banners_look_like_banners() -> None:
    for number, line in enumerate(LINES, 1):
        if line.startswith("# ==="):
            assert BANNER.fullmatch(line) and len(line) == 79, f"line {number}: {line}"
            assert re.match("# [A-Z]", LINES[number]), f"line {number}: what does the section own?"
            assert not any(LINES[number - 3:number - 1]), f"line {number}: two empty lines above"


def test_no_name_is_defined_twice() -> None:
    names = [name for node in tree().body for name in dict.fromkeys(names_bound(node))]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_nothing_lies_above_the_first_section() -> None:
    assert [name for name, section in owners().items() if not section] == []


# --- who may use whom

@functools.cache
def used_in_sections() -> List[Tuple[str, str, str]]:
    """Who uses (its section and line), which name, and the section that owns the name."""
    tables = {(table.get_name(), table.get_lineno()): table
              for table in symtable.symtable(SOURCE, PATH.name, "exec").get_children()}
    return [(section_at(node.lineno), f"line {node.lineno} uses {name}", owners()[name])
            for node in top() for name in sorted(used_by(node, tables)) if name in owners()]


def test_a_section_uses_only_sections_above_it() -> None:
    assert [(section, use, owner) for section, use, owner in used_in_sections()
            if owner and SECTIONS.index(owner) > SECTIONS.index(section)] == []


def test_the_towers_never_use_each_other() -> None:
    assert [(section, use, owner) for section, use, owner in used_in_sections()
            if (section in WORKER and owner in COORDINATOR)
            or (section in COORDINATOR and owner in WORKER)] == []
    assert set(SECTIONS[9:17]) == COORDINATOR and set(SECTIONS[17:21]) == WORKER


def test_only_the_roof_uses_both_towers() -> None:
    both = {section for section in SECTIONS for tower in [{owner for user, _, owner in used_in_sections()
                                                           if user == section}]
            if tower & COORDINATOR and tower & WORKER}
    assert both == {"CLI"}


def test_private_names_stay_in_their_section() -> None:
    assert [(section, use, owner) for section, use, owner in used_in_sections()
            if " uses _" in use and owner != section] == []


def test_private_helpers_are_used() -> None:
    used = {use.rpartition(" ")[2] for _, use, _ in used_in_sections()}
    assert [name for name in owners() if name.startswith("_") and name not in used] == []


def test_only_the_store_speaks_sql() -> None:
    """Others may name its errors; a connection they never see."""
    for number, line in enumerate(LINES, 1):
        if re.search(r"\bsqlite3\.(?!Error\b)", line):
            assert section_at(number) == "STORE", f"line {number}: {line}"


def test_only_the_scheduler_writes_states() -> None:
    writers = ("set_task_state", "set_job_state", "set_task_result", "count_task", "add_lease",
               "end_lease", "end_attempt", "end_attempts", "set_tries", "add_tasks", "add_job", "drop_job",
               "reserve_job", "drop_rows", "move_frames", "forget_failures", "set_worker_state")
    for number, line in enumerate(LINES, 1):
        if re.search(rf"\.({'|'.join(writers)})\(", line):
            assert section_at(number) == "SCHEDULER", f"line {number}: {line}"


# What the banners say that a section does not do: it does not even name these.
_NETWORK = {"socket", "ssl", "http", "urllib", "ProtocolError"}
NEVER_NAMED: Dict[str, Set[str]] = {
    "POV": {"subprocess", "sqlite3", "threading", *_NETWORK},  # starts nothing
    "PROJECT": {"subprocess", "sqlite3", "threading", *_NETWORK},  # starts nothing
    "MODEL": {"open", "os", "shutil", "sqlite3", "time", "threading", "subprocess",
              *_NETWORK},  # pure
    "DISCOVERY": {"http", "ssl", "urllib", "ProtocolError"},  # nothing of HTTP
    "STORE": {"subprocess", *_NETWORK},  # no network
    "SCHEDULER": {"subprocess", "sqlite3", *_NETWORK},  # nothing of HTTP
    "ENGINES": {"subprocess", "Launcher", "socket"},  # starts nothing
}


@pytest.mark.parametrize("section", NEVER_NAMED)
def test_a_section_does_not_do_what_its_banner_denies(section: str) -> None:
    assert section in SECTIONS
    assert [f"line {node.lineno}: {node.id}" for node in nodes() if isinstance(node, ast.Name)
            and node.id in NEVER_NAMED[section] and section_at(node.lineno) == section] == []


def test_an_empty_section_says_that_it_is_empty() -> None:
    used = set(owners().values())
    for number, match in BANNERS:
        end = next((other for other, _ in BANNERS if other > number), len(LINES))
        head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), LINES[number:end]))
        assert ("Empty" in head) == (match[2] not in used), match[2]


def test_the_client_knows_no_routes() -> None:
    assert [number for number, line in enumerate(LINES, 1)
            if "/api/" in line and section_at(number) == "CLIENT"] == []


def test_the_settings_feed_the_command_line_the_environment_and_the_file() -> None:
    """The rest of its banner, the help and the manual, is in test_manual and test_settings."""
    users = {section for section, use, _ in used_in_sections() if use.endswith((" uses SETTINGS", " uses setting"))}
    assert {"SETTINGS", "CLI", "MODEL"} == users


# --- what every name has

def test_every_public_name_has_a_docstring() -> None:
    missing = [name for name, node in public(tree())
               if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert missing == []


def test_every_return_and_argument_has_a_type() -> None:
    for function in functions():
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
                 *filter(None, [arguments.vararg, arguments.kwarg])]
        bare = [one.arg for one in every if one.annotation is None and one.arg not in ("self", "cls")]
        assert function.returns is not None and bare == [], f"{function.name}: {bare}"


def test_functions_are_short() -> None:
    lengths = {f"{function.name}, line {function.lineno}":
               (function.end_lineno or 0) - function.lineno + 1 for function in functions()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
    # Half of the functions have at most 12 lines, docstring and all.
    assert sorted(lengths.values())[len(lengths) // 2] <= 12


def test_classes_can_be_read() -> None:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in tree().body
               if isinstance(node, ast.ClassDef)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_CLASS} == {}


def test_functions_are_not_defined_inside_functions() -> None:
    inner = [f"{function.name} has {node.name}" for function in functions()
             for node in ast.walk(function)
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not function]
    assert inner == []


# --- what is nowhere

def test_nothing_is_global_and_nothing_left_to_do() -> None:
    for node in nodes():
        assert not isinstance(node, (ast.Global, ast.Nonlocal)), f"line {node.lineno}"
    for number, line in enumerate(LINES, 1):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line), f"line {number}: {line}"


def test_only_the_cli_prints() -> None:
    for node in nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) \
                and node.func.id in ("print", "input"):
            assert section_at(node.lineno) == "CLI", f"line {node.lineno}"


def test_only_the_last_line_exits() -> None:
    last = tree().body[-1]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    sys.exit(main())"
    found = {node.lineno for node in nodes()
             if (isinstance(node, ast.Name) and node.id in ("exit", "quit", "SystemExit"))
             or (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.exit")}
    assert {line for line in found if line < last.lineno} == set()


def test_no_dangerous_call() -> None:
    """No shell, no code from data, no name that somebody else could guess."""
    for node in nodes():
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system", "os.popen", "tempfile.mktemp",
                                  "pickle.loads", "marshal.loads"), f"line {node.lineno}"
            assert not [word for word in node.keywords if word.arg == "shell"], node.lineno


def test_the_code_does_not_know_of_tests_or_of_the_machine_it_was_made_on() -> None:
    for number, line in enumerate(LINES, 1):
        assert not re.search(r"\bpytest\b|unittest|/home/\w|/Users/\w|/tmp/\w", line), number


# --- imports

def imported() -> Dict[str, str]:
    """Every name that an import binds, and the module that it is from."""
    found: Dict[str, str] = {}
    for node in nodes():
        if isinstance(node, ast.Import):
            found.update((alias.asname or alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.update((alias.asname or alias.name, node.module or "") for alias in node.names)
    return found


@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.9 does not tell what it has")
def test_nothing_beyond_the_standard_library_is_imported() -> None:
    assert {module for module in imported().values()
            if module.split(".")[0] not in sys.stdlib_module_names} == set()


def test_every_import_is_used() -> None:
    code = re.sub(r"^\s*(import|from) .*$", "", "\n".join(LINES[:]), flags=re.MULTILINE)
    used = {part.id for part in nodes() if isinstance(part, ast.Name)}
    dotted = {ast.unparse(part) for part in nodes() if isinstance(part, ast.Attribute)}
    unused: List[str] = []
    for name in imported():
        known = name in used if "." not in name else any(
            one == name or one.startswith(f"{name}.") for one in dotted)
        if not known and name != "annotations" and not re.search(rf'"{name}\b.*"', code):
            unused.append(name)
    assert unused == []


def test_imports_stand_at_the_top() -> None:
    first = BANNERS[0][0]
    late = [node.lineno for node in nodes()
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno > first]
    assert late == []


def test_every_name_that_is_used_exists() -> None:
    """A cheap look for typing errors in code that no test reaches."""
    known = set(owners()) | set(dir(builtins)) | {name.split(".")[0] for name in imported()}
    for node in top():
        parts = [*ast.walk(node)]
        bound = {part.id for part in parts
                 if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)}
        bound |= {part.arg for part in parts if isinstance(part, ast.arg)}
        bound |= {part.name for part in parts
                  if isinstance(part, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))
                  and part.name}
        strange = {f"line {part.lineno}: {part.id}" for part in parts
                   if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
                   and part.id not in known | bound | {"__file__", "__name__"}}
        assert strange == set()


def test_lines_fit() -> None:
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 100] == []
    assert [number for number, line in enumerate(LINES, 1) if line != line.rstrip()] == []

"""The code that a checkpoint carries: the parts of the package that its model and configuration use, in flat files.

transformers loads remote code from one flat folder and finds further files by their relative import lines. The exported
code consists of the package's own statements, with four changes:

1. Statements that are not reachable from the modules of the model and its configuration are left out: functions and
   classes of other models, reference implementations, rows of a table whose key the configuration does not use.
2. All other modules of `modeling/` become one file, `zoo_model.py`. Each file of `kernels/` remains a file.
3. Methods marked `@distillation`, which only a distillation in the package calls, are left out.
4. Docstrings of classes and functions are cut to their summary, those of methods and private functions and all comments
   are removed, and parameters share lines.

This file is not exported itself: a model that was loaded from such a folder saves the code beside it as it is.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .exported_text import is_used, statement_text, walk

SHARED = "zoo_model.py"
"""The exported file with the shared code of `modeling/`."""

HEADER = "# Written by ssm-zoo: what this checkpoint uses of the package's code, with shortened docstrings."

_STRING_OF_A_NAME = re.compile(r"[A-Za-z_]\w+")


@dataclass(eq=False)
class Statement:
    """A statement at the top of a module, with the comments right above it.

    Attributes:
        node: node of the parsed module.
        first: line of the first comment or decorator, from 1.
        last: last line, including a docstring under an assignment.
        names: names that it binds.
        attached: names of this module that it changes or registers with, as a decorator or by assignment to an item or
            attribute. It is exported if they are.
    """

    node: ast.stmt
    first: int
    last: int
    names: set[str] = field(default_factory=set)
    attached: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Module:
    """A file of the package, parsed.

    Attributes:
        path: path of the file.
        lines: lines of the text.
        statements: statements other than imports, in order.
        imports: local name -> (file of the package, name there).
        outside: local name -> import of another package, as a line without the local name.
    """

    path: Path
    lines: list[str]
    doc: str
    statements: list[Statement]
    imports: dict[str, tuple[Path, str]]
    outside: dict[str, tuple[str, str]]

    def defining(self, name: str) -> list[Statement]:
        return [each for each in self.statements if name in each.names]


def collect_code(modules: Iterable[Path], rows: Mapping[str, Set[str]] | None = None) -> dict[str, str]:
    """Collect the files that the classes of a model and its configuration need, by flat file name.

    Args:
        modules: files of the model's class and of the configuration's. The names in `__all__` are exported, or all
            names if there is none.
        rows: table -> keys that are used, for tables (dictionary literals at the top of a module); other entries, and
            what only they need, are left out.

    Returns:
        File name -> text, in the order of names.

    Raises:
        ValueError: if a file imports the package in a way that flattening breaks, if two files have the same name, or
            two different objects of `modeling/` do.
    """
    entries = [Path(path) for path in modules]
    kept = _Reach(rows or {})
    for path in entries:
        for name in _public_names(path):
            kept.want(path, name)
    kept.want_registered()
    return _written(kept, entries)


def _public_names(path: Path) -> list[str]:
    module = _parsed(path)
    for statement in module.defining("__all__"):
        assert isinstance(statement.node, ast.Assign)
        return [str(name) for name in ast.literal_eval(statement.node.value)]
    return [name for statement in module.statements for name in sorted(statement.names)]


class _Reach:
    """Collector of the needed statements of all modules."""

    def __init__(self, rows: Mapping[str, Set[str]]) -> None:
        self.rows = rows
        self.modules: dict[Path, Module] = {}
        self.statements: dict[Path, set[Statement]] = {}
        self.used: dict[Path, set[str]] = {}  # names that the statements mention

    def module(self, path: Path) -> Module:
        if path not in self.modules:
            same = [other for other in self.modules if other.name == path.name]
            if same:
                raise ValueError(f"{same[0]} and {path} must have different names, as a Hub folder is flat")
            self.modules[path] = module = _parsed(path)
            self.statements[path], self.used[path] = set(), set()
            # Statements that bind nothing have effects on import, e.g. a loop that registers classes.
            self.take(path, [each for each in module.statements if not each.names and not each.attached])
        return self.modules[path]

    def take(self, path: Path, statements: list[Statement]) -> None:
        module = self.module(path)
        pending = [each for each in statements if each not in self.statements[path]]
        self.statements[path].update(pending)
        for statement in pending:
            for name in _mentioned(statement.node, self.rows):
                self.want(path, name)
            for node in walk(statement.node):
                if isinstance(node, ast.ImportFrom) and node.level:
                    there = _file_of(path, node)
                    for alias in node.names:
                        self.want(there, alias.name)
        bound = {name for each in pending for name in each.names}
        attached = [each for each in module.statements if each.attached & bound]
        if attached:
            self.take(path, attached)

    def want_registered(self) -> None:
        """Take the classes of cache layers whose `_layer_type` occurs in the statements taken so far."""
        taken = -1
        while taken != (taken := sum(map(len, self.statements.values()))):
            texts = {text for each in self.statements.values() for statement in each for text in _texts(statement.node)}
            for path, module in list(self.modules.items()):
                self.take(path, [each for each in module.statements if _layer_type(each.node) in texts])

    def want(self, path: Path, name: str) -> None:
        module = self.module(path)
        self.used[path].add(name)
        found = module.defining(name)
        if found:
            self.take(path, found)
        elif name in module.imports:
            there, original = module.imports[name]
            self.want(there, original)


def _mentioned(node: ast.AST, rows: Mapping[str, Set[str]]) -> Iterator[str]:
    """Yield the names that a statement mentions, including quoted annotations and only used rows of a table."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        table = next((rows[each.id] for each in targets if isinstance(each, ast.Name) and each.id in rows), None)
        if table is not None:
            for part in (*targets, *([node.annotation] if isinstance(node, ast.AnnAssign) else [])):
                yield from _mentioned(part, {})
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if is_used(key, table):
                    yield from _mentioned(value, {})
            return
    for each in walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Constant) and isinstance(each.value, str) and len(each.value) < 80:
            yield from _STRING_OF_A_NAME.findall(each.value) if _is_annotation_like(each.value) else ()


def _texts(node: ast.AST) -> Iterator[str]:
    for each in walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


def _layer_type(node: ast.stmt) -> str | None:
    """Return the name under which a class registers itself in transformers' table of cache layers."""
    for each in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(each, ast.Assign | ast.AnnAssign) and isinstance(each.value, ast.Constant):
            targets = each.targets if isinstance(each, ast.Assign) else [each.target]
            if "_layer_type" in map(ast.unparse, targets):
                return each.value.value if isinstance(each.value.value, str) else None
    return None


def _is_annotation_like(text: str) -> bool:
    """Return whether a string may be a quoted annotation: names with brackets, dots and bars between them."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.\[\], |]*", text)) and any(letter.isupper() for letter in text)


@cache
def _parsed(path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.split("\n")
    module = Module(path, lines, (ast.get_docstring(tree) or "").split("\n")[0], [], {}, {})
    for index, node in enumerate(tree.body):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if index and module.statements and module.statements[-1].node is tree.body[index - 1]:
                module.statements[-1].last = node.end_lineno or node.lineno
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_import(module, node)
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                _check_import(path, inner)
        statement = Statement(node, _first_line(node, lines), node.end_lineno or node.lineno)
        statement.names, statement.attached = _bound(node)
        module.statements.append(statement)
    own = {name for each in module.statements for name in each.names}
    for each in module.statements:
        each.attached &= own - each.names
    return module


def _first_line(node: ast.stmt, lines: list[str]) -> int:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    return first


def _bound(node: ast.stmt) -> tuple[set[str], set[str]]:
    """Return the names that a statement binds at the top of its module, and those that it changes there."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}, {name for each in node.decorator_list if (name := _owner(each)) is not None}
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = {name for target in targets for each in ast.walk(target) if (name := _stored(each)) is not None}
        changed = {name for each in targets if not isinstance(each, ast.Name) and (name := _owner(each)) is not None}
        if isinstance(node, ast.AugAssign):
            return set(), names
        return names, changed
    if isinstance(node, ast.If | ast.Try):
        names: set[str] = set()
        for each in ast.walk(node):
            if isinstance(each, ast.FunctionDef | ast.ClassDef):
                names.add(each.name)
            elif (name := _stored(each)) is not None:
                names.add(name)
            elif isinstance(each, ast.Import | ast.ImportFrom):
                names.update(alias.asname or alias.name for alias in each.names)
        return names, set()
    return set(), set()


def _stored(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def _owner(node: ast.expr) -> str | None:
    """Return the name at the start of a chain of attributes, items and calls."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _add_import(module: Module, node: ast.Import | ast.ImportFrom) -> None:
    _check_import(module.path, node)
    if isinstance(node, ast.Import):
        for alias in node.names:
            local = alias.asname or alias.name.split(".")[0]
            whole = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
            module.outside[local] = (whole, "")
    elif node.level:
        for alias in node.names:
            module.imports[alias.asname or alias.name] = (_file_of(module.path, node), alias.name)
    else:
        for alias in node.names:
            local = alias.name + (f" as {alias.asname}" if alias.asname else "")
            module.outside[alias.asname or alias.name] = (f"from {node.module} import", local)


def _check_import(path: Path, node: ast.Import | ast.ImportFrom) -> None:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    if any(name.split(".")[0] == "ssm_zoo" for name in names):
        raise ValueError(
            f"{path.name}, line {node.lineno}: an exported file must import the package by relative imports"
        )
    if isinstance(node, ast.ImportFrom) and node.level:
        _file_of(path, node)


def _file_of(path: Path, node: ast.ImportFrom) -> Path:
    """Return the package's file that a relative import names."""
    parts = (node.module or "").split(".")
    if node.level == 1 and len(parts) == 1 and parts[0]:
        return path.parent / f"{parts[0]}.py"
    if node.level == 2 and len(parts) == 2 and parts[0] == "kernels":
        return path.parent.parent / "kernels" / f"{parts[1]}.py"
    raise ValueError(
        f"{path.name}, line {node.lineno}: a relative import must be `from .name import` or "
        "`from ..kernels.name import`, as others cannot be exported"
    )


# Writing


def _written(kept: _Reach, entries: list[Path]) -> dict[str, str]:
    shared = _in_order(
        kept, [path for path in kept.modules if path.parent == entries[0].parent and path not in entries]
    )
    files = {path.name: [path] for path in kept.modules if path not in shared}
    if shared:
        if SHARED in files:
            raise ValueError(f"a module must not be called {SHARED}, the name of the exported file. Rename it")
        files[SHARED] = shared
        _check_names(kept, shared)
    home = {path: name for name, paths in files.items() for path in paths}
    return {name: _file(kept, name, files[name], home) for name in sorted(files)}


def _in_order(kept: _Reach, paths: list[Path]) -> list[Path]:
    """Sort modules so that each comes after those that it imports."""
    done: dict[Path, None] = {}
    under_way: list[Path] = []

    def place(path: Path) -> None:
        if path in done:
            return
        if path in under_way:
            raise ValueError(f"modules must not import each other: {', '.join(each.name for each in under_way)}")
        under_way.append(path)
        module = kept.modules[path]
        for name in sorted(kept.used[path]):
            there = module.imports.get(name, (path, name))[0]
            if there != path and there in paths:
                place(there)
        under_way.pop()
        done[path] = None

    for path in sorted(paths):
        place(path)
    return list(done)


def _check_names(kept: _Reach, paths: list[Path]) -> None:
    """Raise ValueError if a name has different meanings in modules that become one file."""
    meaning: dict[str, tuple[str, Path]] = {}
    for path in paths:
        module = kept.modules[path]
        for statement in kept.statements[path]:
            text = "\n".join(module.lines[statement.first - 1 : statement.last])
            for name in statement.names:
                other = meaning.setdefault(name, (text, path))
                if other[0] != text:
                    raise ValueError(f"{name} differs in {path.name} and {other[1].name}: rename one")
        for name in kept.used[path]:
            if name in module.outside:
                text = " ".join(module.outside[name])
                other = meaning.setdefault(name, (text, path))
                if other[0] != text:
                    raise ValueError(f"{name} differs in {path.name} and {other[1].name}: rename one")
            local, original = name, module.imports.get(name, (path, name))[1]
            if local != original and module.imports[local][0] in paths:
                raise ValueError(f"{path.name} must import {original} under its own name, got {local}")


def _file(kept: _Reach, name: str, paths: list[Path], home: dict[Path, str]) -> str:
    def target(path: Path, node: ast.ImportFrom) -> str | None:
        there = home[_file_of(path, node)]
        return None if there == name else there.removesuffix(".py")

    outside: dict[str, set[str]] = {}
    inside: dict[str, set[str]] = {}
    body: list[str] = []
    seen: set[str] = set()
    for path in paths:
        module = kept.modules[path]
        for local in kept.used[path]:
            if module.defining(local):
                continue
            if local in module.outside:
                line, part = module.outside[local]
                outside.setdefault(line, set()).update({part} - {""})
            elif local in module.imports:
                there, original = module.imports[local]
                if home[there] != name:
                    shown = original if local == original else f"{original} as {local}"
                    inside.setdefault(home[there].removesuffix(".py"), set()).add(shown)
        for statement in module.statements:
            if statement in kept.statements[path]:
                lines = module.lines[statement.first - 1 : statement.last]
                numbered = dict(enumerate(lines, start=statement.first))
                text = statement_text(numbered, statement.node, kept.rows, lambda node, at=path: target(at, node))
                if text not in seen or not statement.names:
                    seen.add(text)
                    body.append(text)
    doc = kept.modules[paths[0]].doc if len(paths) == 1 else "Code that the models of ssm-zoo share."
    head = [f'{HEADER}\n\n"""{doc}"""']
    plain = sorted(line for line, parts in outside.items() if not parts)
    members = sorted((line, parts) for line, parts in outside.items() if parts)
    first = [*plain, *(_import_lines(line, parts) for line, parts in members)]
    second = [_import_lines(f"from .{stem} import", parts) for stem, parts in sorted(inside.items())]
    if any("annotations" in kept.modules[path].outside for path in paths):
        head.append("from __future__ import annotations")
    head += ["\n".join(part) for part in (first, second) if part]
    return "\n\n".join(head) + "\n\n" + _spaced(body) + "\n"


def _import_lines(start: str, parts: Set[str]) -> str:
    line = f"{start} {', '.join(sorted(parts))}"
    if len(line) <= 120:
        return line
    return f"{start} (\n" + "".join(f"    {part},\n" for part in sorted(parts)) + ")"


def _spaced(statements: list[str]) -> str:
    """Join statements, with an empty line around functions and classes and none between assignments."""
    text, block_before = "", True
    for statement in statements:
        block = "\n" in statement
        text += ("\n" if block or block_before else "") + statement + "\n"
        block_before = block
    return text.strip("\n")

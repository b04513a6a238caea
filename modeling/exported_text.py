"""The exported text of a statement: without comments and marked methods, with short docstrings."""

import ast
import textwrap
from collections.abc import Callable, Iterator, Mapping, Set

_MARK = "distillation"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a statement, without the methods that are left out."""
    pending = [node]
    while pending:
        each = pending.pop()
        yield each
        pending += [inner for inner in ast.iter_child_nodes(each) if not is_marked(inner)]


def is_marked(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(each, ast.Name) and each.id == _MARK for each in node.decorator_list
    )


def is_used(key: ast.expr | None, used: Set[str]) -> bool:
    return not (isinstance(key, ast.Constant) and key.value not in used)


def statement_text(
    lines: dict[int, str],
    statement: ast.stmt,
    rows: Mapping[str, Set[str]],
    target: Callable[[ast.ImportFrom], str | None],
) -> str:
    """Return the exported text of a statement: docstrings shortened, unused rows removed, inner imports flattened.

    Args:
        lines: lines of the statement and its docstring, by number.
        statement: the statement.
        rows: see :func:`exported_code.collect_code`.
        target: maps a relative import inside the statement to the module to name; None if it is the same module.
    """
    last = max(lines)
    for node in ast.walk(statement):
        if is_marked(node):
            assert isinstance(node, ast.FunctionDef)
            first = min(each.lineno for each in node.decorator_list)
            for number in range(first, (node.end_lineno or node.lineno) + 1):
                lines.pop(number)
    documented = [
        node
        for node in walk(statement)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node)
    ]
    docs = [node.body[0] for node in documented]
    docs += [
        after
        for node in walk(statement)
        if isinstance(node, ast.ClassDef)
        for after in node.body[1:]
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    ]
    for doc in docs:
        _shorten(lines, doc)
    for node in documented:
        inner = node is not statement and not isinstance(node, ast.ClassDef)
        if (inner or node.name.startswith("_")) and len(node.body) > 1:
            for number in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1):
                lines.pop(number, None)
    end = statement.end_lineno or statement.lineno
    if last > end:  # the docstring under an assignment
        for number in range(end + 1, last + 1):
            lines.pop(number)
    for node in walk(statement):
        if isinstance(node, ast.ImportFrom) and node.level:
            stem, indent = target(node), " " * node.col_offset
            if stem is None:
                _replace(lines, node, None)
            else:
                names = ", ".join(each.name + (f" as {each.asname}" if each.asname else "") for each in node.names)
                _replace(lines, node, f"{indent}from .{stem} import {names}")
    _drop_rows(lines, statement, rows)
    for node in walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _fill_signature(lines, node)
    _close_up(lines, statement)
    return "\n".join(lines[number] for number in sorted(lines)).strip("\n")


def _close_up(lines: dict[int, str], node: ast.stmt) -> None:
    """Remove comments and empty lines, except before methods and inner functions and in multi-line strings."""
    texts = {
        number
        for each in ast.walk(node)
        if isinstance(each, ast.Constant | ast.JoinedStr) and each.end_lineno is not None
        for number in range(each.lineno, each.end_lineno + 1)
        if each.end_lineno > each.lineno
    }
    following = ""
    for number in sorted(lines, reverse=True):
        if number not in texts and lines[number].lstrip().startswith("#"):
            lines.pop(number)
        elif lines[number].strip():
            following = lines[number].lstrip()
        elif number not in texts and not following.startswith(("def ", "async def ", "@", "class ")):
            lines.pop(number)


def _fill_signature(lines: dict[int, str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """Put the parameters of a function on shared lines, unless there are comments between them."""
    last = node.body[0].lineno - 1
    while last > node.lineno and lines.get(last, "").lstrip()[:1] in ("", "#"):  # between the signature and the body
        last -= 1
    numbers = range(node.lineno, last + 1)
    if last < node.lineno + 2 or any("#" in lines[number] for number in numbers[1:]):
        return
    first, end = lines.pop(node.lineno), lines.pop(last)
    indent = " " * (node.col_offset + 4)
    parameters = " ".join(lines.pop(number).strip() for number in numbers[1:-1])
    lines[node.lineno] = first
    for offset, line in enumerate(textwrap.wrap(parameters, 120, initial_indent=indent, subsequent_indent=indent), 1):
        lines[node.lineno + offset] = line
    lines[last] = end


def _replace(lines: dict[int, str], node: ast.stmt, text: str | None) -> None:
    for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
        lines.pop(number)
    if text is not None:
        lines[node.lineno] = text
    elif node.lineno - 1 in lines and not lines[node.lineno - 1].strip():
        lines.pop(node.lineno - 1)


def _shorten(lines: dict[int, str], doc: ast.stmt) -> None:
    """Cut a docstring of several lines to its first paragraph."""
    last = doc.end_lineno or doc.lineno
    if last == doc.lineno or doc.lineno not in lines:
        return
    summary: list[str] = []
    for number in range(doc.lineno, last + 1):
        line = lines.pop(number)
        if not line.strip():
            break
        summary.append(line.rstrip())
    for number in range(doc.lineno + len(summary), last + 1):
        lines.pop(number, None)
    if summary[-1].strip() == '"""':
        summary.pop()
    if not summary[-1].endswith('"""') or summary[-1].strip() == '"""':
        summary[-1] += '"""'
    for offset, line in enumerate(summary):
        lines[doc.lineno + offset] = line


def _drop_rows(lines: dict[int, str], node: ast.stmt, rows: Mapping[str, Set[str]]) -> None:
    if not (isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)):
        return
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        if isinstance(target, ast.Name) and target.id in rows:
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if not is_used(key, rows[target.id]):
                    assert key is not None
                    for number in range(key.lineno, (value.end_lineno or value.lineno) + 1):
                        lines.pop(number, None)

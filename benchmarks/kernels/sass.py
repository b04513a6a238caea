"""Read the machine code of a kernel: its loops, and the widths of its accesses to global memory.

nvdisasm, which Triton brings along, prints the instructions with their lines of the source. Loops are the natural loops
of the control flow graph. Each is assigned to the loop of the source that most of its instructions come from, whose
number of iterations is known (`kernel_loops.py`).
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_LINE = re.compile(r'File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"^\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_UNCONDITIONAL = re.compile(r"^BRA(\.U)?\s+`\(\.L\w+\)$")
_MATRIX = re.compile(r"^(?:HGMMA\.(\d+)x(\d+)x(\d+)|[HI]MMA\.(\d{4,5}))\b")
# Sizes of a warp's product, by the digits that HMMA shows.
_WARP_PRODUCTS = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT", "KILL")

# Instructions of loops that wait for a copy or a product, and their most instructions.
_WAITING, _SHORTEST = ("SYNCS", "NANOSLEEP", "YIELD", "WARPSYNC"), 12

Frame = tuple[str, int]


@dataclass(frozen=True)
class SourceLoop:
    """A loop of a kernel's source: its function, its number there, and its lines."""

    function: str
    number: int
    first: int
    last: int


@dataclass
class Instruction:
    """An instruction, with the lines that it comes from: innermost call first."""

    text: str
    frames: tuple[Frame, ...]

    @property
    def predicated(self) -> bool:
        return self.text.startswith("@")

    @property
    def body(self) -> str:
        return _PREDICATE.sub("", self.text)

    @property
    def name(self) -> str:
        return self.body.partition(" ")[0]

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def flops(self) -> int:
        """FLOPs of a matrix product: of a warp, or of four together (HGMMA), each of which counts a quarter."""
        match = _MATRIX.match(self.name)
        if match is None:
            return 0
        if match[1]:
            m, n, k = (int(match[i]) for i in (1, 2, 3))
            return 2 * m * n * k // 4
        m, n, k = _WARP_PRODUCTS.get(match[4], (0, 0, 0))
        return 2 * m * n * k


@dataclass
class Loop:
    """A loop of the machine code.

    Attributes:
        instructions: numbers of all its instructions, those of inner loops included.
        source: loop of the source, None if there is none.
        inner: loops directly inside.
    """

    instructions: frozenset[int]
    source: SourceLoop | None = None
    inner: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> frozenset[int]:
        """Numbers of the instructions that are in no inner loop."""
        return self.instructions.difference(*(loop.instructions for loop in self.inner))


@dataclass
class Code:
    """The instructions of a kernel, and its outermost loops."""

    instructions: list[Instruction]
    loops: list[Loop]

    def count(self, *kinds: str) -> int:
        return sum(one.kind in kinds for one in self.instructions)

    def widths(self, *kinds: str) -> dict[int, int]:
        """Return the number of instructions of these kinds by the bytes that a thread moves."""
        found = Counter(_bytes(one.name) for one in self.instructions if one.kind in kinds)
        return dict(sorted(found.items()))


def read(cubin: bytes, source: Path, disassembler: Path) -> Code:
    """Disassemble a kernel whose source file is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [disassembler, "--print-line-info-inline", "--print-code", path]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions, labels = _parse(listing)
    loops = _nest(_natural_loops(instructions, labels))
    for loop in loops:
        _assign(loop, instructions, str(source), ())
    return Code(instructions, loops)


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    frames: list[Frame] = []
    fresh = True  # whether the next line of the source begins a new list of frames
    for line in listing.splitlines():
        if line.lstrip().startswith("//##"):
            if fresh:
                frames, fresh = [], False
            match = _LINE.search(line)
            if match is not None:
                frames.append((match[1], int(match[2])))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            fresh = True
            instructions.append(Instruction(match[1], tuple(frames)))
    return instructions, labels


def _successors(instructions: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    found: list[list[int]] = []
    barriers: dict[str, int] = {}  # where the threads that leave a branch meet again
    for at, one in enumerate(instructions):
        target = _TARGET.search(one.text)
        to = labels.get(target[1]) if target else None
        following = [at + 1] if at + 1 < len(instructions) else []
        if one.kind == "BSSY":
            if to is not None:
                barriers[one.body.split()[1].rstrip(",")] = to
        elif one.kind == "BSYNC":
            meeting = barriers.get(one.body.split()[-1])
            following += [] if meeting is None else [meeting]
        elif one.kind in _ENDS and not one.predicated:
            following = []
        elif to is not None:
            # Code for sm_80 leaves loops by calls that do not return (CALL.REL.NOINC, with a predicate).
            following = [to] if _UNCONDITIONAL.match(one.text) else [*following, to]
        found.append([place for place in following if place < len(instructions)])
    return found


def _natural_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[frozenset[int]]:
    """Return the natural loops, those of one header together; instructions are the nodes of the graph."""
    successors = _successors(instructions, labels)
    order = _post_order(successors)
    place = {node: number for number, node in enumerate(order)}
    before: list[list[int]] = [[] for _ in instructions]
    for node in order:
        for after in successors[node]:
            before[after].append(node)
    dominator = {0: 0} if instructions else {}
    changed = True
    while changed:  # Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm (2001)
        changed = False
        for node in reversed(order[:-1]):
            known = [other for other in before[node] if other in dominator]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    while place[best] < place[other]:
                        best = dominator[best]
                    while place[other] < place[best]:
                        other = dominator[other]
            if dominator.get(node) != best:
                dominator[node], changed = best, True

    def dominates(header: int, node: int) -> bool:
        while place[node] < place[header]:
            node = dominator[node]
        return node == header

    loops: dict[int, set[int]] = {}
    for node in order:
        for header in successors[node]:
            if dominates(header, node):
                body = loops.setdefault(header, {header})
                pending = [node]
                while pending:
                    one = pending.pop()
                    if one not in body:
                        body.add(one)
                        pending += before[one]
    return [frozenset(body) for body in loops.values() if len(body) > 1]


def _post_order(successors: list[list[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))] if successors else []
    while stack:
        node, rest = stack[-1]
        after = next((one for one in rest if one not in seen), None)
        if after is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(successors[after])))
    return order


def _nest(bodies: list[frozenset[int]]) -> list[Loop]:
    outermost: list[Loop] = []
    placed: list[Loop] = []
    for body in sorted(bodies, key=len, reverse=True):
        loop = Loop(body)
        around = [other for other in placed if body < other.instructions]
        (min(around, key=lambda other: len(other.instructions)).inner if around else outermost).append(loop)
        placed.append(loop)
    return outermost


@cache
def source_loops(path: str) -> tuple[SourceLoop, ...]:
    """Return the loops of a file's functions, except those that Triton unrolls; numbered by function in order."""
    found = []
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            loops = [one for one in ast.walk(node) if isinstance(one, ast.For) and "static_range" not in _over(one)]
            for number, loop in enumerate(sorted(loops, key=lambda one: one.lineno)):
                found.append(SourceLoop(node.name, number, loop.lineno, loop.end_lineno or loop.lineno))
    return tuple(found)


def _over(loop: ast.For) -> str:
    return ast.unparse(loop.iter)


def _around(frames: tuple[Frame, ...], source: str) -> tuple[SourceLoop, ...]:
    """Return the loops of the source around an instruction, outermost first."""
    found: list[SourceLoop] = []
    for path, line in reversed(frames):
        if path == source:
            found += [loop for loop in source_loops(source) if loop.first <= line <= loop.last]
    return tuple(dict.fromkeys(found))


def _assign(loop: Loop, instructions: list[Instruction], source: str, taken: tuple[SourceLoop, ...]) -> None:
    own = [instructions[number] for number in loop.own]
    if len(own) <= _SHORTEST and any(one.kind in _WAITING for one in own):
        return  # waits for something, inside or outside a loop of the source
    # Before Triton 3.9 the lines of a called function come without the call, so that they say nothing.
    nests = Counter(nest for one in own if set(nest := _around(one.frames, source)).difference(taken))
    nest = max(nests, key=lambda nest: nests[nest]) if nests else ()
    candidates = [one for one in nest if one not in taken]
    # The counter of a loop is raised at the line of its `for`. A loop that was unrolled has none.
    heads = {line for one in own for path, line in one.frames if path == source}
    counted = [one for one in candidates if one.first in heads]
    loop.source = next(iter(counted or candidates), None)
    if loop.source is None:
        raise ValueError(f"{source}: no loop of the source belongs to one of {len(own)} instructions: {own[0].text}")
    for inner in loop.inner:
        _assign(inner, instructions, source, taken if loop.source is None else (*taken, loop.source))


def _bytes(name: str) -> int:
    """Return the bytes that a thread moves by a load or store: LDG.E.128 moves 16."""
    parts = name.split(".")[1:]
    for part, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return size
    return 32 if any(part.endswith("2") and part.startswith("ENL") for part in parts) else 4

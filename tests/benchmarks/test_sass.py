"""Machine code as the disassembler prints it: loops, their lines of the source, widths of accesses."""

from pathlib import Path

import pytest
import sass

SOURCE = """
def inner(x, count):
    for step in range(0, count):
        x += step
    return x

def some_kernel(x_ptr, rows, count):
    for row in range(0, rows):
        for lane in tl.static_range(4):
            x_ptr += lane
        inner(x_ptr, count)
    return x_ptr
"""
# Two nested loops, a branch out of line that comes back into the inner one, and the parking loop after the exit.
LISTING = """
.text.some_kernel:
	//## File "{path}", line 7
        /*0000*/                   LDG.E.128 R0, [R2] ;
.L_x_0:
	//## File "{path}", line 8
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], [R2] ;
.L_x_1:
	//## File "{path}", line 4 inlined at "{path}", line 11
	//## File "{path}", line 11
        /*0030*/                   LDG.E.U16 R0, [R2] ;
	//## File "{path}", line 3 inlined at "{path}", line 11
	//## File "{path}", line 11
        /*0040*/                   ISETP.GE.AND P0, PT, R0, R5, PT ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
	//## File "{path}", line 8
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   STG.E.64 [R2], R0 ;
        /*00b0*/                   EXIT ;
.L_x_3:
	//## File "{path}", line 4 inlined at "{path}", line 11
	//## File "{path}", line 11
        /*00c0*/                   MUFU.EX2 R0, R0 ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
"""


def read(folder: Path, listing: str) -> sass.Code:
    source = folder / "some_triton.py"
    source.write_text(SOURCE, encoding="utf-8")
    tool = folder / "nvdisasm"
    listing = listing.replace("{path}", str(source))
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}\nEND\n", encoding="utf-8")
    tool.chmod(0o755)
    return sass.read(b"", source, tool)


@pytest.fixture
def code(tmp_path: Path) -> sass.Code:
    return read(tmp_path, LISTING)


def test_loops_are_those_of_the_source(code: sass.Code) -> None:
    (outer,) = code.loops
    (inner,) = outer.inner
    assert (outer.source, inner.source) == (sass.SourceLoop("some_kernel", 0, 8, 11), sass.SourceLoop("inner", 0, 3, 4))
    assert inner.inner == [] and inner.own == inner.instructions == {3, 4, 5, 6, 7, 12, 13}
    assert outer.own == {1, 2, 8, 9}


def test_a_loop_may_be_left_by_a_call_that_does_not_return(tmp_path: Path) -> None:
    branch = "        /*0070*/              @!P0 BRA `(.L_x_1) ;"
    call = "        /*0070*/              @P0 CALL.REL.NOINC `(.L_x_5) ;\n"
    back = "        /*0078*/                   BRA `(.L_x_1) ;\n.L_x_5:"
    code = read(tmp_path, LISTING.replace(branch, call + back))
    (outer,) = code.loops
    (inner,) = outer.inner
    assert (outer.source, inner.source) == (sass.SourceLoop("some_kernel", 0, 8, 11), sass.SourceLoop("inner", 0, 3, 4))
    assert inner.own == {3, 4, 5, 6, 7, 8, 13, 14} and outer.own == {1, 2, 9, 10}


def test_accesses_and_products_are_counted(code: sass.Code) -> None:
    assert code.widths("LDG", "LDGSTS") == {2: 1, 16: 2}
    assert code.widths("STG") == {8: 1}
    assert code.count("BAR") == 1
    assert sum(one.flops for one in code.instructions) == 2 * 16 * 8 * 16


@pytest.mark.parametrize(
    ("name", "flops"),
    [("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 2), ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8), ("FFMA", 0)],
)
def test_flops_of_an_instruction(name: str, flops: int) -> None:
    assert sass.Instruction(f"{name} R0, R1, R2", ()).flops == flops

"""The shared fixtures do what the tests that use them rely on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.usefixtures("poisoned_empty")
def test_poisoned_empty_fills_every_way_to_allocate():
    base = torch.zeros(2, 3)
    floats = (
        torch.empty(2, 3),
        torch.empty_like(base),
        torch.empty_strided((2, 3), (3, 1)),
        base.new_empty(2, 3),
        base.new_empty_strided((2, 3), (3, 1)),
        torch.empty(2, 3, dtype=torch.bfloat16, requires_grad=True),
    )
    for tensor in floats:
        assert tensor.shape == (2, 3)
        assert tensor.isnan().all()
    assert floats[-1].requires_grad
    assert floats[-1].is_leaf
    assert (torch.empty(4, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty(4, dtype=torch.bool).all()


def test_triton_is_interpreted_without_a_cuda_device():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, the kernels run natively")
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize(("values", "refused"), [('{"a", "b"}', True), ('["a", "b"]', False)])
def test_a_test_parametrized_over_a_set_is_refused(tmp_path: Path, values: str, refused: bool) -> None:
    test = f"import pytest\n@pytest.mark.parametrize('letter', {values})\ndef test_letter(letter): pass\n"
    (tmp_path / "test_letters.py").write_text(test)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--collect-only", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("`parametrize('letter', ...)` was given a set; sort it." in run.stdout) == refused
    assert ("test_letter[a]" in run.stdout) != refused
    assert bool(run.returncode) == refused

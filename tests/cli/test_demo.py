"""What the demonstration gives the commands that it runs."""

import subprocess
from typing import Any

import pytest

from ssm_zoo.cli import demo


@pytest.mark.parametrize("own", [None, "glibc.malloc.hugetlb=0"])
def test_the_allocator_is_tuned_unless_the_user_has_done_so(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    given: list[dict[str, str]] = []

    def run(command: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        given.append(env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    monkeypatch.setattr(subprocess, "run", run)
    demo._command("distill", "demo", "runs/demo", environment={"HF_TOKEN": "x"})
    assert given[0]["GLIBC_TUNABLES"] == (own or demo.ALLOCATOR["GLIBC_TUNABLES"])
    assert given[0]["HF_TOKEN"] == "x" and "PATH" in given[0]

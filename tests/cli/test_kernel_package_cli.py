"""`python -m ssm_zoo.cli.kernel_package`: what it writes, checks, says and refuses."""

from pathlib import Path

from typer.testing import CliRunner, Result

from ssm_zoo.cli.kernel_package import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_program_writes_a_package_and_tells_whether_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "package"
    result = run(folder, "--repo-id", "someone/kernels")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{folder}: version 1 for cpu and cuda, ")
    assert 'repo-id = "someone/kernels"' in (folder / "build.toml").read_text(encoding="utf-8")
    result = run(folder, "--check")
    assert (result.exit_code, result.output) == (0, f"{folder}: a whole kernel package\n")
    (folder / "LICENSE").unlink()
    for arguments in ([folder, "--check"], [folder]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "LICENSE is missing" in result.stderr and result.stderr.count("\n") == 1


def test_a_repository_has_no_effect_on_a_check(tmp_path: Path) -> None:
    result = run(tmp_path, "--check", "--repo-id", "someone/kernels")
    assert result.exit_code == 2
    assert "--repo-id has no effect with --check, got someone/kernels" in result.stderr

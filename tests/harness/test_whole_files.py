"""Files and folders that appear whole: what a kill, a second process and a planted link leave behind."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssm_zoo.harness import whole_files
from ssm_zoo.harness.run_folder import check_output_folder, claim_output_folder, claimed_folders_end, write_json
from ssm_zoo.harness.whole_files import new_folder, repair, sweep, write_text_whole

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and links as POSIX has them")


def fork(work: Callable[[], object]) -> int:
    """Exit code of a process that does some work; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_and_die(folder: Path) -> None:
    with new_folder(folder, overwrite=True) as made:
        (made / "half").write_text("half")
        die()


def test_what_a_killed_process_left_goes_at_the_next_start_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    assert fork(lambda: fill_and_die(tmp_path / "out")) == -signal.SIGKILL
    left = names(tmp_path)
    assert fork(lambda: whole_files.write_whole(tmp_path / "a.json", lambda _: die())) == -signal.SIGKILL
    assert len(left) == len(names(tmp_path)) == 1 and left != names(tmp_path)  # the second start swept the first one's
    assert all(name.startswith(".tmp-ssm-zoo-") for name in [*left, *names(tmp_path)])
    (tmp_path / ".tmp-somebody-elses").mkdir()
    (tmp_path / ".tmp-ssm-zoo-link").symlink_to(tmp_path / ".tmp-somebody-elses")
    with new_folder(tmp_path / "first") as first:
        (first / "file").write_text("first")
        with new_folder(tmp_path / "second") as second:  # sweeps while the first one is being written
            (second / "file").write_text("second")
    assert names(tmp_path) == [".tmp-somebody-elses", ".tmp-ssm-zoo-link", "first", "second"]
    assert contents(tmp_path) == {"first/file": "first", "second/file": "second"}


@pytest.mark.parametrize("at", ["os.replace", "os.rename", "exchange", "_delete"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_moment_loses_neither_the_old_folder_nor_half_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, can_exchange: bool
) -> None:
    """Killed before and after each call of a function that renames or removes, until it gets through."""
    out, old, new = tmp_path / "out", {"a": "old", "b": "old"}, {"a": "new"}
    if not can_exchange:
        monkeypatch.setattr(whole_files, "exchange", lambda _first, _second: False)
    owner, name = (os, at.removeprefix("os.")) if at.startswith("os.") else (whole_files, at)
    real = getattr(owner, name)

    def write(values: dict[str, str]) -> None:
        with new_folder(out, overwrite=True) as made:
            for key, value in values.items():
                (made / key).write_text(value)

    def killed_at(moment: int) -> int:
        calls = 0

        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls * 2 - 1 == moment:
                die()
            found = real(*arguments, **options)
            if calls * 2 == moment:
                die()
            return found

        def work() -> None:
            setattr(owner, name, call)
            write(new)

        return fork(work)

    for moment in range(1, 20):
        write(old)
        ended = killed_at(moment)
        repair(out)
        assert contents(out) in (old, new)
        if ended == 0:
            break
    else:
        pytest.fail("it never got through")
    write(old)
    assert names(tmp_path) == ["out"] and contents(out) == old


def test_a_failure_leaves_nothing_not_even_the_parents_that_were_made(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"something else made or filled .*out in the meantime"), new_folder(out):
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert contents(tmp_path) == {"out/theirs": "theirs"}
    out.joinpath("theirs").unlink()
    with new_folder(out) as made:  # an empty one is
        (made / "ours").write_text("ours")
    assert contents(tmp_path) == {"out/ours": "ours"}


def test_a_link_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with (
        pytest.raises(ValueError, match="out must be a new or empty folder, got a link"),
        new_folder(tmp_path / "out", overwrite=True),
    ):
        pytest.fail("not to be reached")
    assert names(tmp_path) == ["out", "there"]


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "fifo"])
def test_only_a_regular_file_is_replaced(tmp_path: Path, kind: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "r.json"
    victim.write_text("mine")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"r\.json must be a new name or a regular file, which is replaced, got a"):
        write_json(path, {})
    assert names(tmp_path) == before and victim.read_text() == "mine"


def test_planted_links_are_not_followed_and_permissions_are_kept(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "r.json"
    victim.write_text("mine")
    (tmp_path / ".tmp-r.json").symlink_to(victim)
    path.write_text("{}")
    path.chmod(0o640)
    write_text_whole(path, "{}\n")
    assert victim.read_text() == "mine" and path.read_text() == "{}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == [".tmp-r.json", "r.json", "victim"]


CHILD = (
    "import os, sys, time; from ssm_zoo.conversion.isolated_load import end_with_parent; end_with_parent();"
    "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
)
PARENT = (
    "import os, sys; from ssm_zoo.harness.processes import run_child;"
    "run_child([sys.executable, '-c', sys.argv[1], sys.argv[2]], os.environ)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the state of a process from /proc")
def test_the_process_that_verifies_an_export_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(file)]) as parent:
        deadline = time.monotonic() + 60
        while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(file.read_text())
        os.kill(child, 0)  # it is there
        parent.kill()
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # ended, and not yet noticed by who has taken it over
        time.sleep(0.05)
    pytest.fail("the child is still there")


HOLD = (
    "import sys, time; from ssm_zoo.harness.run_folder import claim_output_folder as claim;"
    "claim(sys.argv[1], {}); print('claimed', flush=True); time.sleep(60)"
)


def test_one_process_at_a_time_writes_into_the_folder_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"claimed\n"
        for start in (lambda: claim_output_folder(out, {}), lambda: check_output_folder(out)):
            with pytest.raises(ValueError, match=r"out is in use by another process, whose run has not ended"):
                start()
        other.kill()
    check_output_folder(out)
    with claimed_folders_end():
        assert claim_output_folder(out, {}) is not None
        assert claim_output_folder(out, {}) is not None  # this process's own
        assert fork(lambda: claim_output_folder(out, {})) == 0  # a part of it, as a worker that loads data
        program = [sys.executable, "-c", HOLD, str(out)]
        assert b"in use by another process" in subprocess.run(program, capture_output=True).stderr
    assert whole_files.fcntl is not None
    handle = os.open(out, os.O_RDONLY)
    whole_files.fcntl.flock(handle, whole_files.fcntl.LOCK_EX | whole_files.fcntl.LOCK_NB)
    os.close(handle)


def test_an_output_folder_is_checked_before_the_run(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="MiB of free disk space, but the run needs at least"):
        check_output_folder(tmp_path / "a", bytes_needed=2**60)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file must be a new or empty folder, or this run's own, got a file"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot be made, because .*file is no folder"):
        check_output_folder(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match=r"got one that is not empty and holds no run\.json"):
        check_output_folder(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="got a link to nothing"):
        check_output_folder(tmp_path / "dangling")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_before_the_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="no permission to write in"):
        check_output_folder(tmp_path / "out")


def test_sweeping_takes_no_time_and_no_file_of_others(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"file-{number}").touch()
    started = time.monotonic()
    sweep(tmp_path)
    assert len(names(tmp_path)) == 2000 and time.monotonic() - started < 1

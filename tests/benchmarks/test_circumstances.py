"""What rows of results say of how they came about."""

from datetime import UTC, datetime
from pathlib import Path

from circumstances import circumstances


def test_the_command_names_a_file_and_not_where_a_machine_has_it(tmp_path: Path):
    arguments = [str(tmp_path / "some text.txt"), "data/other.txt", "--threads", "1", "--output", str(tmp_path)]
    row = circumstances(datetime(2026, 1, 2, tzinfo=UTC), "claims/stories.py", arguments)
    options = f"--threads 1 --output {tmp_path.name}"
    expected = f"python benchmarks/claims/stories.py 'some text.txt' data/other.txt {options}"
    assert row["command"] == expected
    assert row["date"] == "2026-01-02T00:00:00+00:00"

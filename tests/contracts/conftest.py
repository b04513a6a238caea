"""The options of `make test-contracts`, and its result: a table of families and tests, each skip with a reason.

A test that fails is accepted where `reasons.py` says why it does; it then has to fail. One that skips itself is
accepted where `reasons.py` has its words. Everything else fails the run.
"""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests that need a model of the Hub's fail at once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)

OUTCOMES = ("passed", "failed", "not applicable", "failed as expected", "passed unexpectedly", "skipped unexpectedly")
BAD = {"failed", "passed unexpectedly", "skipped unexpectedly"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contracts")
    group.addoption("--transformers-checkout", metavar="DIR", help="take from here what the source distribution lacks")
    group.addoption("--contracts-json", metavar="FILE", help="write the table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["CONTRACTS_CHECKOUT"] = config.getoption("--transformers-checkout") or ""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(config), "contracts-table")


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # the process that writes the table imports none of the tests itself
        from library_tests import TRANSFORMERS

        output["absent"] = TRANSFORMERS.absent


class Table:
    """Collects what happened, whichever process it happened in."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seen: dict[str, dict[str, str]] = defaultdict(dict)  # outcome to its text, of each test
        self.broken: list[str] = []
        self.absent: set[str] = set()  # test modules that no source has

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.absent.update(getattr(node, "workeroutput", {}).get("absent", ()))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid}: {report.longreprtext}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # of a part of a test, too
            self.seen[report.nodeid].setdefault("failed", report.longreprtext)
        elif report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.seen[report.nodeid].setdefault("skipped", text.removeprefix("Skipped: "))
        elif report.when == "call":
            self.seen[report.nodeid].setdefault("passed", "")

    def rows(self) -> list[dict[str, str]]:
        from reasons import reason_to_fail, reason_to_skip

        rows = []
        for node, outcomes in sorted(self.seen.items()):
            path, family, test = node.split("::")
            suite, family = Path(path).stem.removeprefix("contract_"), family.removeprefix("Test_")
            expected = reason_to_fail(suite, family, test)
            if "failed" in outcomes:
                text = outcomes["failed"]
                outcome = "failed" if expected is None else "failed as expected"
            elif "skipped" in outcomes:  # all of it, or a part
                text = outcomes["skipped"]
                known = reason_to_skip(suite, family, text)
                outcome = "skipped unexpectedly" if known is None else "not applicable"
                expected = known
            else:
                text = ""
                outcome = "passed" if expected is None else "passed unexpectedly"
            row = {"suite": suite, "family": family, "test": test, "outcome": outcome}
            if expected is not None:
                row["reason"] = expected
            if text:
                row["text"] = text if outcome in BAD else text.strip().rpartition("\n")[2]
            rows.append(row)
        return rows

    def whole_run(self) -> bool:
        """Whether no test was left out that the sources hold."""
        option = self.config.option
        named = [Path(argument).resolve() for argument in self.config.args]
        return named == [Path(__file__).parent] and not (option.keyword or option.markexpr or option.deselect)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # interrupted, or nothing ran
        bad = self.broken or any(row["outcome"] in BAD for row in self.rows())
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if bad else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        from library_tests import PEFT, TRANSFORMERS
        from reasons import all_reasons

        rows, write = self.rows(), terminalreporter.write_line
        absent = sorted(self.absent.union(TRANSFORMERS.absent))
        sources = {"transformers": TRANSFORMERS.sources, "peft": PEFT.sources}
        for row in rows:
            if row["outcome"] in BAD:
                write(f"\n{row['suite']} {row['family']} {row['test']}: {row['outcome']}\n{row.get('text', '')}")
        for text in self.broken:
            write(text)
        counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        for row in rows:
            counts[row["suite"], row["family"]][row["outcome"]] += 1
        write(f"\n{'suite':<14}{'family':<24}" + "".join(f"{outcome:>22}" for outcome in OUTCOMES))
        for (suite, family), counter in sorted(counts.items()):
            write(f"{suite:<14}{family:<24}" + "".join(f"{counter[outcome]:>22}" for outcome in OUTCOMES))
        reasons = Counter((row["outcome"], row["reason"]) for row in rows if "reason" in row)
        for (outcome, reason), count in sorted(reasons.items()):
            write(f"{count:>6} {outcome}: {reason}")
        if self.whole_run():
            for reason in sorted(set(all_reasons()) - {row.get("reason") for row in rows}):
                also = ", if the absent files do not need it" if absent else ""
                write(f"stale{also}: {reason}")
        for library, where in sources.items():
            for source, version in where.items():
                write(f"{library}: {source} {version}")
        if absent:
            write("not in the sources, so that their tests did not run: " + ", ".join(absent))
        target = self.config.getoption("--contracts-json")
        if target:
            report = {"sources": sources, "absent": absent, "broken": self.broken, "tests": rows}
            temporary = Path(f"{target}.part")
            temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
            temporary.replace(target)

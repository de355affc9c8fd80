"""`python -m tests.faults`: the fault tests, and a table of what they saw. `--all` adds those that take minutes.

Other words go to pytest: `python -m tests.faults --all -k save`.
"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class Table:
    """One row for each figure that a test recorded under the name of its fault, and for each test that failed."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, found = report.nodeid.rsplit("::", 1)[-1], list[tuple[str, str, str]]()
        if report.failed or report.skipped:
            why = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else report.when
            found = [("?", f"{name}: {why}", "FAILED" if report.failed else "skipped")]
        elif report.when == "call":
            found = [(fault, str(seen), "pass") for fault, seen in report.user_properties]
        for row in found:  # at once, too: all of them take long
            print(" | ".join(row), file=sys.stderr, flush=True)
        self.rows += found

    def text(self) -> str:
        rows = sorted(
            self.rows, key=lambda row: (not row[0][1:].isdigit(), int(row[0][1:] or 0) if row[0][1:].isdigit() else 0)
        )
        return "\n".join(["| fault | seen | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def main(words: list[str]) -> int:
    everything = "--all" in words
    rest = [word for word in words if word != "--all"]
    table = Table()
    code = pytest.main(["-n", "0", "-q", "-m", "" if everything else "not long", str(HERE), *rest], plugins=[table])
    print(table.text())
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

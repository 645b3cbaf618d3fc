"""A pytest session over one file of tests that notes each in a file of JSON lines as soon as it is done, for gpu_tests.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


class Log:
    """Hooks of pytest. A session that is killed has written down what it had."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, str] = {}
        """Of tests that have begun."""

    def _note(self, **entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many there are to be."""
        self._note(collected=len(session.items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is done with its teardown. What failed in any part of it failed, what was skipped before it ran was skipped."""
        name = report.nodeid.partition("::")[2]
        if name not in self._outcomes or not report.passed:
            self._outcomes[name] = report.outcome
        if report.when == "teardown":
            self._note(test=name, outcome=self._outcomes[name])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """That nothing more comes."""
        self._note(ended=int(exitstatus))


if __name__ == "__main__":  # gpu_tests_session.py TESTS LOG
    # caches are shared with the sessions beside this one, and what torch.compile logs would hide why a test failed
    options = ["-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*options, sys.argv[1]], plugins=[Log(Path(sys.argv[2]))]))

"""Hypothesis draws the same examples on every run; `--update-golden` rewrites the files in tests/golden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ci")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt with what the tests give")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """`golden(name, value)`: str(value) is what stands in tests/golden/<name>.txt."""

    def check(name: str, value: object) -> None:
        path, text = GOLDEN / f"{name}.txt", f"{value}\n"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; run pytest --update-golden and look at what it wrote"
        assert text == path.read_text(encoding="utf-8"), (
            f"differs from {path}; if that is meant: pytest --update-golden"
        )

    return check

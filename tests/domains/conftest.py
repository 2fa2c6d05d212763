"""Tests of spatial domains: they need torch, so they run in the environment that `make setup STAGES=domains` makes."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]


def pytest_report_header() -> str:
    """Say so where they are left out."""
    return (
        "NO TORCH HERE: tests/domains run in .venv/domains (make setup STAGES=domains)" if collect_ignore_glob else ""
    )

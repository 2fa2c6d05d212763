"""Tests of spatial domains: they need torch, so they run in the environment that `make setup STAGES=domains` makes."""

import pytest

pytest.importorskip("torch", reason="no torch here: .venv/domains has it (make setup STAGES=domains)")

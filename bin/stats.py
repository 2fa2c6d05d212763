#!/usr/bin/env python3
"""The task of this name: `cellquilt stats --help` explains it."""

from cellquilt.cli import task

task("stats", "slide")

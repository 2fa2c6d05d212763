#!/usr/bin/env python3
"""The task of this name: `cellquilt segment --help` explains it."""

from cellquilt.cli import task

task("segment")

#!/usr/bin/env python3
"""The task of this name: `cellquilt explorer write --help` explains it."""

from cellquilt.cli import task

task("explorer", "write")

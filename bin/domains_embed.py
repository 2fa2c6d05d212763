#!/usr/bin/env python3
"""The task of this name: `cellquilt domains embed --help` explains it."""

from cellquilt.cli import task

task("domains", "embed")

#!/usr/bin/env python3
"""The task of this name: `cellquilt convert --help` explains it."""

from cellquilt.cli import task

task("convert")

#!/usr/bin/env python3
"""The task of this name: `cellquilt domains train --help` explains it."""

from cellquilt.cli import task

task("domains", "train")

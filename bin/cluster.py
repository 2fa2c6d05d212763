#!/usr/bin/env python3
"""The task of this name: `cellquilt cluster --help` explains it."""

from cellquilt.cli import task

task("cluster")

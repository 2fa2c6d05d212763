#!/usr/bin/env python3
"""The task of this name: `cellquilt patchify transcripts --help` explains it."""

from cellquilt.cli import task

task("patchify", "transcripts")

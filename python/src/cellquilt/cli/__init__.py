"""The command line. One verb a step, the same steps as the pipeline's and the API's.

Nothing heavy is imported here, and a verb's module only when the verb is used: ``cellquilt --help`` is instant.
"""

import errno
import importlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import click

from cellquilt import __version__
from cellquilt.core.errors import CellquiltError, did_you_mean

#: Verb → "module:command" and its line in the help.
_VERBS: dict[str, tuple[str, str]] = {
    "convert": ("slide:convert", "Read a machine's output into a store."),
    "tissue": ("slide:tissue", "Find the tissue."),
    "patchify": ("slide:patchify", "Cut a slide into patches."),
    "segment": ("slide:segment", "Segment patches with one method."),
    "resolve": ("slide:resolve", "Put the patches' cells together; nuclei to cells."),
    "aggregate": ("slide:aggregate", "Count transcripts and measure channels in cells."),
    "split": ("slide:split", "Split a slide into its regions."),
    "assemble": ("slide:assemble", "Put a sample's parts into one store, with its QC."),
    "report": ("slide:report", "Write a sample's report."),
    "export": ("slide:export", "Write cells for Xenium Ranger, VPT or QuPath."),
    "explorer": ("explorer:explorer", "Write a slide for Xenium Explorer, and take back what was drawn there."),
    "compare": ("slide:compare", "Compare segmentations of one slide."),
    "cluster": ("cell_types:cluster", "Cluster the cells of a slide."),
    "annotate": ("cell_types:annotate", "Name the types of a slide's cells."),
    "stats": ("spatial:stats", "Measure cells in space, of a slide or of a cohort."),
    "domains": ("domains:domains", "Find spatial domains, and see what they say."),
    "samples": ("slide:samples", "Write the table of all samples of a run."),
    "preview": ("slide:preview", "Try parameters on a few windows of a slide."),
    "simulate": ("tools:simulate", "Simulate slides whose cells are known."),
    "check": ("tools:check", "Check a sample sheet and parameters."),
    "estimate": ("tools:estimate", "Say what a run will take, from headers."),
    "demo": ("tools:demo", "Make the demo's input, or show the demo's result."),
    "download-weights": ("tools:download_weights", "Fetch a model of Cellpose's or StarDist's hub, once."),
    "provenance": ("tools:provenance", "Show how a store was made."),
    "doctor": ("tools:doctor", "Show what is installed here."),
}
_SYNONYMS = {"segmentation": "segment"}


class _LazyGroup(click.Group):
    """Imports a verb's module when the verb is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        target = _VERBS.get(_SYNONYMS.get(name, name))
        if target is None:
            return None
        module, attribute = target[0].split(":")
        return getattr(importlib.import_module(f"cellquilt.cli.{module}"), attribute)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in _VERBS.items()])

    def resolve_command(self, context: click.Context, args: list[str]):  # type: ignore[no-untyped-def]
        if args and not args[0].startswith("-") and _SYNONYMS.get(args[0], args[0]) not in _VERBS:
            raise CellquiltError("verb-unknown", f'unknown verb "{args[0]}"', did_you_mean(args[0], _VERBS))
        return super().resolve_command(context, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cellquilt")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def _cellquilt(verbose: bool) -> None:
    """Raw spatial-omics output to cells, tables and domains."""
    from cellquilt.core.log import setup_logging

    setup_logging(verbose)


#: A task killed for memory exits like this, so that schedulers and the pipeline try again with more.
_OUT_OF_MEMORY = 137


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code; a user's mistake is a message, never a traceback."""
    try:
        _cellquilt.main(args=args, prog_name="cellquilt", standalone_mode=False)
    except CellquiltError as error:
        _fail(error, 1)
    except click.exceptions.NoSuchOption as error:
        known = error.possibilities or []
        hint = f'did you mean "{known[0]}"?' if known else "see --help"
        _fail(CellquiltError("parameter-unknown", f'unknown parameter "{error.option_name}"', hint), 2)
    except click.UsageError as error:
        _fail(CellquiltError("usage", error.format_message(), "see --help"), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (MemoryError, OSError, ImportError) as error:
        if _refused_memory(error):
            hint = "lower --memory-mb, or give more"
            _fail(CellquiltError("out-of-memory", f"out of memory {error}", hint), _OUT_OF_MEMORY)
        if not isinstance(error, OSError):
            _unexpected(error)
        where = f": {error.filename}" if error.filename else ""
        _fail(CellquiltError("file-system", f"{error.strerror or error}{where}", "check the disk, then run again"), 1)
    except Exception as error:
        _unexpected(error)
    if stage := os.environ.get("CELLQUILT_TASK"):
        from cellquilt.core.record import write_versions

        write_versions(stage, Path("versions.yml"))
    sys.exit(0)


def _refused_memory(error: Exception) -> bool:
    """Whether the system had no memory to give; libraries say it in their own ways, the loader only in words."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, ImportError) and re.search("failed to map|[Cc]annot allocate", str(error)) is not None)
    )


def _unexpected(error: Exception) -> NoReturn:
    """A mistake of ours: the message is for its user, where it is from for who mends it."""
    level = logging.ERROR if os.environ.get("CELLQUILT_TASK") else logging.DEBUG  # a task's log keeps it
    logging.getLogger("cellquilt").log(level, "unexpected error", exc_info=True)
    hint = "this should not happen: please report it with the output of `cellquilt --verbose ...`"
    _fail(CellquiltError("unexpected", f"{type(error).__name__}: {error}", hint), 1)


def task(*verb: str) -> NoReturn:
    """Run one verb as a task of the pipeline: the head job can read its errors, and versions are written."""
    os.environ["CELLQUILT_TASK"] = "_".join(verb + tuple(sys.argv[1:2] if verb == ("segment",) else ()))
    main([*verb, *sys.argv[1:]])


def _fail(error: CellquiltError, exit_code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    if os.environ.get("CELLQUILT_TASK"):
        print(f"CELLQUILT_ERROR {json.dumps(error.as_dict(), sort_keys=True)}", file=sys.stderr)
    sys.exit(exit_code)

"""What the site needs beyond mkdocs.yml: the front page is README.md, and files of the repository are no pages."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Make README.md the front page."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of README.md go to the pages; of what is no page the path is named."""
    here = PurePosixPath(page.file.src_uri).parent
    start = PurePosixPath() if page.file.src_uri == "index.md" else PurePosixPath("docs") / here

    def mended(found: re.Match[str]) -> str:
        text, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        path = (ROOT / start / target).resolve()
        if "://" in target or target.startswith("mailto:") or not path.is_relative_to(ROOT) or not path.exists():
            return found.group(0)
        if path.suffix == ".md" and path.is_relative_to(ROOT / "docs"):
            relative = path.relative_to(ROOT / "docs").as_posix()
            if text.endswith(".md"):  # in the repository a file is named, here its title
                text = path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
            return f"[{text}]({'../' * len(here.parts)}{relative}{anchor})"
        name = path.relative_to(ROOT).as_posix()
        return f"`{name}`" if name in text else f"{text} (`{name}`)"

    return _LINK.sub(mended, markdown)

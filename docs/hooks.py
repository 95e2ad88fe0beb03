"""Part of the build of the site: pages of the repository that lie outside docs/ join it, and links lead to them.

In the sources, links are those of the repository (`../jobs/README.md`), so that they also work without the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "jobs/README.md",
    "jobs/*.sbatch",
    "benchmarks/README.md",
    "benchmarks/**/table*.md",
    "benchmarks/**/throughput.png",
    "containers/*",
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and files from outside, at their places in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between places of the repository into links between places of the site."""
    there = files.get_file_from_path
    own = page.file.src_uri
    outside = own.startswith(("jobs/", "benchmarks/", "containers/")) or own in OUTSIDE
    in_repository = own if outside else f"docs/{own}"

    def moved(match: re.Match[str]) -> str:
        target, mark, anchor = match[1].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        place = os.path.normpath(os.path.join(os.path.dirname(in_repository), target)).replace(os.sep, "/")
        place = "index.md" if place == "README.md" else place.removeprefix("docs/")
        if there(place) is None:
            return match[0]  # the strict build names it
        return f"]({os.path.relpath(place, os.path.dirname(own) or '.').replace(os.sep, '/')}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)

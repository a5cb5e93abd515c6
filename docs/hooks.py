"""What MkDocs needs to know of this repository: pages link to its files as they lie in it, so that they can be read without the site too.

A file outside `docs/` that a page links to, a picture, a program or another page, gets a place below `repository/` in the site, and
links are changed to fit. A link to a folder shows the page README.md in it, and where there is none, it becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS, REPOSITORY = "docs/", "repository/"  # where pages are, and where the site has the rest
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def in_repository(uri: str) -> str:
    """Where a file of the site lies in the repository."""
    return uri.removeprefix(REPOSITORY) if uri.startswith(REPOSITORY) else DOCS + uri


def in_site(path: str) -> str:
    """The other way round."""
    return path.removeprefix(DOCS) if path.startswith(DOCS) else REPOSITORY + path


def target(page: str, link: str) -> str | None:
    """The file of the repository that a link on a page means, both as paths in it; None for a folder without a page."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
        return path if (ROOT / path).is_file() else None
    if path.startswith("..") or not (ROOT / path).is_file():
        raise PluginError(f"{page} links to {link}, and the repository has no such file")
    return path


def reached(paths: Iterable[str]) -> list[str]:
    """These files of the repository, those that they link to, and so on."""
    waiting, seen = list(paths), dict[str, None]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen[path] = None
        if path.endswith(".md"):
            prose = FENCE.split((ROOT / path).read_text(encoding="utf-8"))[::2]
            waiting += filter(None, (target(path, found[3]) for part in prose for found in LINK.finditer(part)))
    return list(seen)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the files that the navigation names or pages link to, and those that these link to."""
    pages = [in_repository(file.src_uri) for file in files.documentation_pages()]
    for path in reached([*pages, *map(in_repository, re.findall(rf"{REPOSITORY}[^'\"]+", str(config.nav)))]):
        if files.get_file_from_path(in_site(path)) is None:
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Changes a page's links to those of the site."""
    here = page.file.src_uri

    def changed(found: re.Match[str]) -> str:
        mark, label, link, anchor = found.groups()
        path = target(in_repository(here), link)
        if path is None:
            return label
        return f"{mark}[{label}]({posixpath.relpath(in_site(path), posixpath.dirname(here))}{anchor or ''})"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(changed, part) for part in parts[::2]]
    return "".join(parts)

"""Hooks of mkdocs: the site's pages are those of the repository, in its layout.

Pages link to each other, to figures and to source files by their paths in the repository, also outside docs/. Every
file keeps that path as its name in mkdocs, so these links hold in the site without being rewritten, and
`mkdocs build --strict` checks them.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md"),
    *("training/README.md", "examples/README.md", "model_cards/README.md", "model_cards/*/README.md"),
]
STYLES = ["docs/site.css"]
LINK = re.compile(r"\]\(([^)#\s]+)")
BADGE = re.compile(r"\[!\[[^]]*\]\([^)]*\)\]\([^)]*\)\s*")  # a linked image, from another host


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and the repository's pages and what they link to in place of those of docs/."""
    site = Files([file for file in files if file.src_dir != config.docs_dir])
    pages = sorted(path for pattern in PAGES for path in ROOT.glob(pattern))
    for path in dict.fromkeys([*pages, *linked_files(pages), *(ROOT / style for style in STYLES)]):
        name = path.relative_to(ROOT).as_posix()
        site.append(File(name, str(ROOT), config.site_dir, use_directory_urls=False, dest_uri=site_path(name)))
    return site


def linked_files(pages: list[Path]) -> list[Path]:
    """Figures, source files and other files of the repository that the pages link to."""
    targets = [page.parent.joinpath(link).resolve() for page in pages for link in LINK.findall(page.read_text())]
    return sorted({path for path in targets if path.is_file() and path.suffix != ".md" and ROOT in path.parents})


def site_path(name: str) -> str:
    """Path in the site of a file of the repository: that of docs/ at the top, and source files as text to read."""
    if name == "README.md":  # docs/README.md is the home page
        return "readme.html"
    path = PurePosixPath(name.removeprefix("docs/"))
    if path.name == "README.md":
        return str(path.with_name("index.html"))
    if path.suffix == ".md":
        return str(path.with_suffix(".html"))
    if path.suffix in ("", ".py", ".sh", ".toml", ".yaml"):
        return f"{path}.txt"
    return str(path)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page without the badges, which the site would load from other hosts, and with its folded tables rendered."""
    return BADGE.sub("", markdown).replace("<details>", "<details markdown>")

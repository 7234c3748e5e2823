"""The documentation as a site: it builds without a network, loads nothing from another host, and shows every page as
GitHub does.
"""

import functools
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt

import concat_ensemble

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs/site_pages.py"))
PAGES = sorted(path for pattern in SITE["PAGES"] for path in ROOT.glob(pattern))
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
# Elements that a browser loads something for, and where they name it.
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
LINKING = LOADING | {"a": "href", "link": "href"}
BLOCKS = re.compile(r"<(table|tr|td|ul|ol|li|pre|h[1-6]|img|p|a|code|strong|em)\b")


class Elements(HTMLParser):
    """Start tags of a page with their attributes."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@functools.cache
def elements(page: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(page.read_text())
    return parser.tags


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Links and anchors that lead nowhere, and pages that are not in the navigation, fail it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | NO_NETWORK | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def built(site: Path, page: Path) -> Path:
    return site / SITE["site_path"](page.relative_to(ROOT).as_posix())


def test_no_page_loads_anything_from_another_host(site):
    for page in site.rglob("*.html"):
        for tag, attributes in elements(page):
            address = attributes.get(LOADING.get(tag, "")) or ""
            if tag == "link" and attributes.get("rel") != "canonical":
                address = attributes["href"]
            assert not urlsplit(address).netloc, (page.name, tag, address)
            assert "mermaid" not in (attributes.get("class") or "").split(), "the theme loads its code from a host"
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text()), style.name


def test_every_public_name_has_an_anchor(site):
    anchors = {attributes.get("id") for _, attributes in elements(site / "api.html")}
    public = [f"concat_ensemble.{name}" for name in concat_ensemble.__all__]
    assert not {*public, "concat_ensemble.features.ntk.NTK"} - anchors
    methods = ["ConcatEnsembleModel.forward", "ConcatEnsembleForImageClassification.freeze_members", "LinearProbe.fit"]
    assert not {f"concat_ensemble.{method}" for method in methods} - anchors


def test_every_page_is_in_the_navigation(site):
    links = {attributes.get("href") for tag, attributes in elements(site / "index.html") if tag == "a"}
    assert {built(site, page).relative_to(site).as_posix() for page in PAGES} <= links
    assert {ROOT / path for path in ROOT.glob("docs/*.md")} <= set(PAGES)


def test_what_pages_link_to_is_in_the_site(site):
    for page in site.rglob("*.html"):
        for tag, attributes in elements(page):
            address = urlsplit(attributes.get(LINKING.get(tag, "")) or "")
            if address.path and not address.scheme and page.name != "404.html":
                assert (page.parent / address.path).exists(), (page.name, address.path)


@pytest.mark.parametrize("name", [page.relative_to(ROOT).as_posix() for page in PAGES if page.name != "api.md"])
def test_a_page_has_the_blocks_that_github_shows(site, name):
    """Python-Markdown, which mkdocs uses, has another idea of nested lists, tables in HTML, and blank lines."""
    page = ROOT / name
    source = re.sub(r"\A---\n.*?\n---\n", "", SITE["BADGE"].sub("", page.read_text()), flags=re.DOTALL)
    expected = MarkdownIt("commonmark").enable("table").render(source)
    html = built(site, page).read_text()
    article = html[html.index("<article") : html.index("</article>")]
    shown = re.sub(r'<a class="headerlink".*?</a>', "", article)
    assert Counter(BLOCKS.findall(shown)) == Counter(BLOCKS.findall(expected))

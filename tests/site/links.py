"""Follows every link of the built site to the site itself: `python -m tests.site.links SITE`.

Links to other hosts are counted and not followed, so that the check needs no network.
"""

import pathlib
import sys
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and the anchors in it to which others can link."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)


class Found(NamedTuple):
    """The links of a site.

    Attributes:
        inside: the number of links to the site itself.
        outside: the number of links to other hosts.
        broken: the page and the link, for each of those inside that lead nowhere.
    """

    inside: int
    outside: int
    broken: list[str]


def check(site: pathlib.Path) -> Found:
    """Follows the links of all pages of a site."""
    pages = {path: Page(path.read_text()) for path in sorted(site.resolve().rglob("*.html"))}
    inside, outside, broken = 0, 0, []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            # Pictures within the page, as "data:...", are links to nothing.
            if parts.scheme or parts.netloc:
                outside += not link.startswith("data:")
                continue
            inside += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            exists = target.is_file() and target.is_relative_to(site.resolve())
            if exists and anchor and target in pages:
                exists = anchor in pages[target].anchors
            if not exists:
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return Found(inside, outside, broken)


def main() -> None:
    """Checks the site whose folder is the argument."""
    found = check(pathlib.Path(sys.argv[1]))
    for line in found.broken:
        print(line)
    print(
        f"links: {found.inside} inside the site, {len(found.broken)} of them broken; "
        f"{found.outside} to other hosts, not followed"
    )
    sys.exit(bool(found.broken) or not found.inside)


if __name__ == "__main__":
    main()

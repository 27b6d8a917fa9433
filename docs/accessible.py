"""Mends in the built pages what Sphinx, the theme and MyST-NB write against WCAG 2.1.

`make check-site` runs axe, which found each of these.
"""

import pathlib
import re
from typing import Any

_SCROLLS = re.compile(r'(<pre|<div class="(?:formula|cell_output|table-wrapper)\b[^">]*")>')
_SIGNATURE = re.compile(r'<dt class="sig .*?</dt>', re.S)


def mend(html: str) -> str:
    """The text of a page with what follows put right; a page that is right stays as it is."""
    # A heading that is made of a paragraph has to say its level.
    html = html.replace(
        '<p class="caption" role="heading">', '<p class="caption" role="heading" aria-level="2">'
    )
    # The text of a button is its name: another name hides it from those who hear or speak it.
    html = html.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    # What scrolls has to be reached without a mouse.
    html = _SCROLLS.sub(r'\1 tabindex="0">', html)
    # The parameters of a long signature are a list of definitions without terms.
    return _SIGNATURE.sub(_without_lists, html)


def _without_lists(signature: re.Match[str]) -> str:
    text = signature[0].replace("<dl>", '<span class="parameters">').replace("</dl>", "</span>")
    return text.replace("<dd>", '<span class="parameter">').replace("</dd>", "</span>")


def mend_pages(app: Any, exception: Exception | None) -> None:
    """Mends all pages of a site that has been built."""
    if exception is None and app.builder.format == "html":
        for path in pathlib.Path(app.outdir).rglob("*.html"):
            before = path.read_text()
            after = mend(before)
            if after != before:
                path.write_text(after)


def setup(app: Any) -> dict[str, bool]:
    """Registers the function above."""
    app.connect("build-finished", mend_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The parts of `make check-site`: broken links are found, and pages are made accessible."""

import pytest

from docs import accessible
from tests.site import links


@pytest.fixture
def site(tmp_path):
    """A site of two pages, with four links inside the site and one to another host."""
    (tmp_path / "deeper").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">A</h1><a href="deeper/page.html#there">x</a><a href="#top">x</a>'
        '<a href="https://example.org/none">x</a><img src="picture%20one.svg">'
    )
    (tmp_path / "deeper" / "page.html").write_text('<p id="there">B <a href="../index.html">x</a>')
    (tmp_path / "picture one.svg").write_text("<svg/>")
    return tmp_path


def test_links_that_lead_somewhere_pass(site):
    assert links.check(site) == (4, 1, [])


@pytest.mark.parametrize(
    "link", ["none.html", "deeper/page.html#nowhere", "#nowhere", "deeper", "../secret.html"]
)
def test_links_that_lead_nowhere_are_named(site, link):
    (site.parent / "secret.html").write_text("")
    (site / "other.html").write_text(f'<a href="{link}">x</a>')
    assert links.check(site).broken == [f"other.html: {link}"]


# HTML that axe objects to, and what it becomes.
MENDED = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<summary aria-label="Toggle hidden content">': "<summary>",
    "<pre>": '<pre tabindex="0">',
    '<div class="formula">': '<div class="formula" tabindex="0">',
    '<div class="cell_output docutils">': '<div class="cell_output docutils" tabindex="0">',
    '<dt class="sig py"><dl><dd>a</dd></dl></dt><dl><dd>b</dd></dl>': '<dt class="sig py">'
    '<span class="parameters"><span class="parameter">a</span></span></dt><dl><dd>b</dd></dl>',
}


@pytest.mark.parametrize("before", MENDED)
def test_pages_are_mended_once(before):
    """What is mended already stays as it is."""
    after = accessible.mend(before)
    assert after == MENDED[before]
    assert accessible.mend(after) == after

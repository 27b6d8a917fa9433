"""All formulas of pages and docstrings can be set, and no page has a formula in plain text."""

import ast
import pathlib
import re
import xml.etree.ElementTree

import pytest

from docs import formulas

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
SOURCES = sorted((ROOT / "msgd_jax").rglob("*.py"))
# Formulas in plain text, as the pages had them before they had LaTeX.
PLAIN = re.compile(
    r"alpha N F|beta N\^2|grad L grad L|\^T|sqrt\(|\bgrad\(L|E max"
    r"|∇|ᵀ|√|Σ|\u2113|[a-zA-Zηθ][²³ᵢₖ]|[^|] ≤ "
)


def without_code(page: pathlib.Path) -> str:
    """The text of a page without its blocks and literals of code."""
    text = re.sub(r"^(```+)[^`].*?^\1$", "", page.read_text(), flags=re.S | re.M)
    return re.sub(r"(`+)[^`]+\1", "", text)


def formulas_of(page: pathlib.Path) -> list[str]:
    """The LaTeX of each formula of a page."""
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", without_code(page), re.S)]


def literals(path: pathlib.Path) -> list[str]:
    """All that the docstrings of a file have in double backticks."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (
        ast.get_docstring(x) for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, kinds)
    )
    return [text for doc in found for text in re.findall(r"``([^`]+)``", doc or "")]


def check(latex: str) -> None:
    """Asserts that the MathML of a formula is well-formed XML and has no LaTeX command left."""
    for display in ("inline", "block"):
        mathml = formulas.to_mathml(latex, display)
        text = "".join(xml.etree.ElementTree.fromstring(mathml).itertext())
        assert "\\" not in text, (latex, text)
        assert text.strip(), latex


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_formulas_of_a_page_can_be_set_and_none_is_plain_text(page):
    for latex in formulas_of(page):
        check(latex)
    rest = re.sub(r"\$\$.+?\$\$|\$.+?\$", "", without_code(page), flags=re.S)
    if page.stem not in ("scaling", "changelog"):
        assert not PLAIN.findall(rest)


def test_the_pages_and_docstrings_have_formulas():
    assert sum(len(formulas_of(page)) for page in PAGES) > 150
    found = 0
    for text in (text for path in SOURCES for text in literals(path)):
        try:
            latex = formulas.to_latex(text)
        except formulas.NotAFormulaError:
            continue
        check(latex)
        found += 1
    assert found > 150


@pytest.mark.parametrize(
    ("plain", "latex"),
    [
        (
            "Cov(W) = alpha I + beta 1 1^T",
            r"\operatorname{Cov}(W) = \alpha I + \beta \mathbf{1} \mathbf{1}^{\top}",
        ),
        (
            "alpha N F + beta N^2\n    grad L grad L^T",
            r"\alpha N F + \beta N^{2} \,\nabla L \,\nabla L^{\top}",
        ),
        ("grad(L . W)/sqrt(bN)", r"\nabla (L\cdot W)/\sqrt{bN}"),
        ("eta^(1/4) C dW", r"\eta ^{1/4} C \,dW"),
        (
            "E sup_{||x' - x|| <= radius} |x|",
            r"\mathbb{E} \operatorname{sup}_{\|x' - x\|\le \operatorname{radius}} |x|",
        ),
    ],
)
def test_plain_text_becomes_latex(plain, latex):
    def without_spaces(text):
        return re.sub(r"\s+", "", text)

    assert without_spaces(formulas.to_latex(plain)) == without_spaces(latex)


@pytest.mark.parametrize(
    "code",
    [
        "law.sample(key, step)",
        "[N, D]",
        "grad=",
        "()",
        "has_keys=True",
        "L . weights",
        "sgd(N, b)",
        "N",
    ],
)
def test_code_stays_code(code):
    with pytest.raises(formulas.NotAFormulaError):
        formulas.to_latex(code)

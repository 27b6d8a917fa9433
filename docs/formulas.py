"""Formulas of the pages and docstrings as MathML, which browsers set without a script or a network.

Pages write LaTeX between dollar signs. Docstrings write the same formulas in plain text, which
`help()` shows, in double backticks or indented after "::": ``Cov(W) = alpha I + beta 1 1^T``. On
the pages of the reference, such a text is set as a formula if all its words are in `WORDS`.
"""

import re
from typing import Any

import latex2mathml.converter
from docutils import nodes

GREEK = "alpha beta delta eta theta Theta Lambda lambda mu nu pi rho sigma tau xi"
OPERATORS = "Cov Var ln log max mean min pinv sup tr"
NAMES = "counts errors radius scale smoothness substeps"
WORDS = {
    **{word: rf"\{word} " for word in GREEK.split()},
    **{word: rf"\operatorname{{{word}}}" for word in (OPERATORS + " " + NAMES).split()},
    **{word: rf"\,d{letter}" for word, letter in (("dt", "t"), ("dp", "p"), ("dW", "W"))},
    **{word: word for word in ("bN", "HC")},
    "E": r"\mathbb{E}",
    **{f"{letter}{index}": f"{letter}_{index}" for letter in "KW" for index in "12"},
    "dTheta": r"\,d\Theta ",
    "eps": r"\varepsilon ",
    "grad": r"\,\nabla ",
    "int": r"\int ",
    "sum": r"\sum ",
}
SYMBOLS = {
    "->": r"\to ",
    "<=": r"\le ",
    ">=": r"\ge ",
    "+-": r"\pm ",
    "...": r"\dots ",
    "\u2003": r"\qquad ",
    " . ": r"\cdot ",
    " * ": r"\,",
    "*": "^{*}",
    "~": r"\sim ",
    "||": r"\|",
    **{symbol: symbol for symbol in "=+-/<>,()[]|"},
}
TOKENS = re.compile(
    r"(?P<ones>\b1(?=\^T| 1\^T| \. )|(?<=\^T )1\b)"
    r"|(?P<number>\d+(\.\d+)?)"
    r"|(?P<word>[A-Za-z][A-Za-z0-9]*'*)"
    r"|(?P<script>[\^_])"
    r"|(?P<symbol>\u2003| [.*] |->|<=|>=|\+-|\.\.\.|\|\||[=+\-/<>,()\[\]|~*])"
    r"|(?P<space> +)"
)


class NotAFormulaError(ValueError):
    """The text is code, or has a word that is not in the notation."""


def to_latex(plain: str) -> str:
    """The LaTeX of a formula in plain text.

    Raises:
        NotAFormulaError: if it is none.
    """
    plain = re.sub(r"[ \n]+", " ", re.sub(r",   +", ",\u2003", plain.strip()))
    letters, signs = re.search("[A-Za-z]", plain), re.search(r"[\s^_=/|(]", plain)
    if not letters or not signs or plain.startswith("[") or plain.endswith("="):
        raise NotAFormulaError(plain)
    # A gradient stands off from what it multiplies, and from nothing else.
    return re.sub(r"(^|[-+=/(|\[,]) *\\,", r"\1", _all(plain)).strip()


def _all(plain: str) -> str:
    """The LaTeX of all tokens."""
    latex, position = "", 0
    while position < len(plain):
        piece, position = _next(plain, position)
        latex += piece
    return latex


def _next(plain: str, position: int) -> tuple[str, int]:
    """The LaTeX of the token at a position, with its argument if it has one, and where it ends."""
    token = TOKENS.match(plain, position)
    if token is None:
        raise NotAFormulaError(plain)
    kind, text, end = token.lastgroup, token.group(), token.end()
    if kind == "script":
        argument, end = _argument(plain, end)
        return f"{text}{{{argument}}}", end
    if text == "sqrt":
        argument, end = _argument(plain, end)
        return rf"\sqrt{{{argument}}}", end
    if kind == "word":
        word = text.rstrip("'")
        if len(word) > 1 and word not in WORDS:
            raise NotAFormulaError(plain)
        return WORDS.get(word, word) + text[len(word) :], end
    if kind == "ones":
        return r"\mathbf{1}", end
    return {"space": " ", "number": text}.get(str(kind)) or SYMBOLS[text], end


def _argument(plain: str, position: int) -> tuple[str, int]:
    """What a script or a root acts on: a group without its parentheses, or one token."""
    opened = plain[position : position + 1]
    if opened in ("(", "{"):
        depth, end, closed = 0, position, {"(": ")", "{": "}"}[opened]
        while depth or end == position:
            if end == len(plain):
                raise NotAFormulaError(plain)
            depth += (plain[end] == opened) - (plain[end] == closed)
            end += 1
        return _all(plain[position + 1 : end - 1]), end
    latex, end = _next(plain, position)
    return (r"\top", end) if latex == "T" else (latex, end)


def to_mathml(latex: str, display: str = "inline") -> str:
    """The MathML of a formula in LaTeX; `display` is "inline" or "block"."""
    if "&" in latex or r"\\" in latex:
        raise ValueError(f"latex must be one line without alignment, got {latex[:200]}.")
    # MathML of browsers has no bold digits: the vector of ones is a character of its own.
    latex = latex.replace(r"\mathbf{1}", "\U0001d7cf")
    mathml = latex2mathml.converter.convert(latex, display=display)
    # Browsers put wide spaces around a slash and around names such as Cov, which the converter
    # writes as operators: a slash has none, and a name only where no parenthesis follows.
    mathml = mathml.replace("<mo>&#x0002F;</mo>", '<mo lspace="0" rspace="0">/</mo>')
    mathml = re.sub(r"<mo>(\w\w+)</mo>(?=<mo)", r'<mo lspace="0.1em" rspace="0">\1</mo>', mathml)
    return re.sub(r"<mo>(\w\w+)</mo>", r'<mo lspace="0.1em" rspace="0.2em">\1</mo>', mathml)


def set_formulas(app: Any, doctree: Any) -> None:
    """Plain formulas of docstrings become formulas on the pages of the reference."""
    if not app.env.docname.startswith("api/"):
        return
    for literal in list(doctree.findall(nodes.literal)):
        if not literal["classes"] and literal.children:
            _replace(literal, [literal.astext()], nodes.math)
    for block in list(doctree.findall(nodes.literal_block)):
        _replace(block, block.astext().splitlines(), nodes.math_block)


def _replace(node: Any, lines: list[str], kind: Any) -> None:
    try:
        formulas = [to_latex(line) for line in lines]
    except NotAFormulaError:
        return
    node.replace_self([kind(latex, latex, nowrap=True, number=None) for latex in formulas])


def visit_inline(translator: Any, node: Any) -> None:
    """Writes a formula in a line."""
    translator.body.append(to_mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(translator: Any, node: Any) -> None:
    """Writes a formula of its own."""
    translator.body.append(f'<div class="formula">{to_mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Registers the renderer and what makes formulas of docstrings."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("doctree-read", set_formulas)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

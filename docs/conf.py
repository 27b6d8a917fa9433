"""The documentation site: `make docs` builds it, every warning an error."""

import os
import pathlib
import sys
from typing import Any

import matplotlib
from cycler import cycler
from sphinx.util.nodes import make_refnode

import msgd_jax

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for the extensions in docs, and for `experiments`
from experiments import styles  # noqa: E402

project = "msgd_jax"
author = "The msgd_jax authors"
copyright = f"2026, {author}"
release = msgd_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docs.accessible",
    "docs.formulas",
    "docs.pages",
]
html_math_renderer = "mathml"  # of docs/formulas.py: no script, no network
myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_digits = False
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"msgd_jax {release}"
# For browsers on machines without a font for mathematics.
MATH_FONT = pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/STIXGeneral.ttf")
html_static_path = ["static", str(MATH_FONT)]
html_css_files = ["site.css"]
html_show_sphinx = False

# Pages whose cells are run, all in processes of their own: what they show is what happens now.
os.environ["PYTHONPATH"] = str(ROOT)  # for the two pages of records; the others need no checkout
# Pages share small programs, and the next build the large ones.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / "docs/_build/programs")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_output_stderr = "remove"
myst_heading_anchors = 3

# The reference, from the docstrings: in the order of each module's `__all__`, a line an argument.
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
default_role = "py:obj"


# How the cells of all pages draw, of which nothing is in the pages themselves.
_LOOKS = [styles.style(place) for place in (3, 2, 1, 5, 4, 6, 7, 8)]
PICTURES = styles.RC | {
    "axes.prop_cycle": cycler(
        color=[look.colour for look in _LOOKS], linestyle=[look.line for look in _LOOKS]
    ),
    "figure.constrained_layout.use": True,
}


def set_pictures(app: Any) -> None:
    """Gives the processes that run cells a configuration of their own: sharp lines, our colours."""
    profile = pathlib.Path(app.doctreedir, "ipython", "profile_default")
    profile.mkdir(parents=True, exist_ok=True)
    profile.joinpath("ipython_kernel_config.py").write_text(
        "from cycler import cycler\n"
        "c.InlineBackend.figure_formats = {'svg'}\n"
        f"c.InlineBackend.rc = {PICTURES!r}\n"
    )
    os.environ["IPYTHONDIR"] = str(profile.parent)


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples are described in the docstrings of their classes."""
    del app, what, name, skip, options
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field") else None


def short_types(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """`Float[Array, "N D"]`, without where jax keeps its array."""
    del app, what, name, obj, options
    short = [text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returns)]
    return short[0], short[1]


def find_reference(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """`loss.per_example`, as docstrings say it, is `msgd_jax.loss.per_example`."""
    target = node.get("reftarget", "")
    module, dot, _ = target.partition(".")
    if node.get("refdomain") != "py" or not dot or module not in msgd_jax.__all__:
        return None
    entry = env.get_domain("py").objects.get(f"msgd_jax.{target}")
    if entry is None:
        return None
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, target)


def setup(app: Any) -> None:
    """Registers the functions above."""
    app.connect("builder-inited", set_pictures)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", short_types)
    app.connect("missing-reference", find_reference)

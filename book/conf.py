"""Sphinx configuration of the book; sources in nbs/, this folder is the confdir.

HTML needs no network, neither while it is built nor while it is read: MathJax comes from
a wheel, fonts and search are local. `-t pdf` gives the plain single page that pdf.py sets.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = HERE / "_build"
sys.path.insert(0, str(HERE / "_ext"))
# A backend set in the environment, such as agg, would keep figures out of the outputs.
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

project = "nanochat: the book"
author = "The nanochat book authors"
copyright = "2026, " + author
extensions = [
    "myst_nb",
    "plain_pages",
    "sphinx_external_toc",
    "sphinx_multitoc_numbering",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_togglebutton",
]
external_toc_path = str(HERE / "_toc.yml")
external_toc_exclude_missing = False
exclude_patterns = ["**.ipynb_checkpoints", "_*"]
nitpicky = True

# ---- Notebooks: executed once, cached.
nb_custom_formats = {".ipynb": ["nbdev_reader.read", {}, False]}
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_output_stderr = "remove"
nb_render_markdown_format = "myst"


def fingerprint() -> str:
    "Hash everything besides its own cells that a notebook's outputs depend on."
    digest = hashlib.sha256()
    sources = [("nanochat", "*.py"), ("rustbpe/src", "*.rs")]
    for folder, pattern in [*sources, ("dev/records", "*.*"), ("book/widgets", "*")]:
        for file in sorted((ROOT / folder).rglob(pattern)):
            digest.update(file.read_bytes())
    manifest = ROOT / "nanochat" / "data" / "manifest.json"
    digest.update(manifest.read_bytes() if manifest.exists() else b"")
    return digest.hexdigest()[:12]


nb_execution_cache_path = str(BUILD / f"cache-{fingerprint()}")
# The kernels inherit these: small matrices need one thread, figures are vectors, and
# files written by notebooks stay in the build folder.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ["NANOCHAT_BASE_DIR"] = str(BUILD / "home")
os.environ["IPYTHONDIR"] = str(BUILD / "ipython")
profile = BUILD / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text(
    "c = get_config()\n"
    "c.InlineBackend.figure_formats = {'svg'}\n"
    "c.InlineBackend.rc = {'svg.hashsalt': 'nanochat', 'figure.dpi': 100}\n"
    "c.HistoryManager.enabled = False\n"
    "c.IPKernelApp.log_level = 40\n"
)

# ---- Text and numbers.
myst_enable_extensions = [
    "amsmath",
    "attrs_block",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 4
myst_heading_slug_func = "plain.slug"
myst_ref_domains = ["std"]  # an equation has a target of its own
numfig = True
numfig_format = {"figure": "Figure %s"}
math_numfig = True
numfig_format = {"figure": "Figure %s"}
numfig_secnum_depth = 1

# ---- HTML.
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "github-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
mathjax_path = "mathjax/tex-chtml.js"

if tags.has("pdf"):  # type: ignore[name-defined]  # noqa: F821 (Sphinx puts it here)
    html_theme = "basic"
    html_theme_options = {}
    html_css_files = []
    html_js_files = []
    html_sidebars: dict = {}
    html_permalinks = False


def copy_mathjax(app, error):
    "Copy the 4 MB of MathJax that pages need (its extension would copy 24 MB)."
    if error or app.builder.format != "html" or app.builder.name == "singlehtml":
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    assert spec and spec.origin, "pip install 'nanochat[book]' brings it"
    source = Path(spec.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tex-chtml.js", target)
    for part in ("output/chtml", "input/tex/extensions"):
        shutil.copytree(source / part, target / part, dirs_exist_ok=True)


def setup(app):
    "Register the hook above."
    app.connect("build-finished", copy_mathjax)

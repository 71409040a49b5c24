"""The Sphinx extension that goes with plain.py: pages that are no notebooks, and solutions."""

from pathlib import Path

from docutils import nodes
from plain import SOLUTION, to_myst
from sphinx.transforms import SphinxTransform


class FoldSolutions(SphinxTransform):
    "Turn each section with a solution, its code and outputs included, into a folded box."

    default_priority = 400

    def apply(self) -> None:
        for section in list(self.document.findall(nodes.section)):
            title = section.next_node(nodes.title)
            if title is None or not SOLUTION.match("### " + title.astext()):
                continue
            folded = nodes.admonition(classes=["dropdown", "solution"])
            for key in ("ids", "names"):
                folded[key] = section[key]
            for name in section["ids"]:
                self.document.ids[name] = folded
            folded += section.children
            section.replace_self(folded)


def read_page(app, docname, source) -> None:
    "Translate a page that is no notebook."
    if Path(app.env.doc2path(docname)).suffix == ".md":
        source[0] = to_myst(source[0])


def setup(app):
    "Register the two hooks above."
    app.connect("source-read", read_page)
    app.add_transform(FoldSolutions)
    return {"parallel_read_safe": True}

"""A bibliography style with the labels used in citations: surname and year, [Miller, 2024]."""

from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style
from pybtex.style.labels import BaseLabelStyle


class Labels(BaseLabelStyle):
    "Format labels as one author, two authors, or the first `et al.`, then the year."

    def format_labels(self, entries):
        labels = list(map(self.label, entries))
        for i, label in enumerate(labels):  # duplicates: 2025, 2025b, 2025c
            yield label + " bcdefg"[labels[:i].count(label)].strip()

    def label(self, entry) -> str:
        "Return the label without a distinguishing letter."
        names = [" ".join(p.last_names) for p in entry.persons.get("author", [])]
        names = [name.strip("{}") for name in names] or [entry.key]
        who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        if names[-1] == "others":
            who = f"{names[0]} et al."
        return f"{who}, {entry.fields['year']}"


class AuthorYear(Style):
    "Pybtex's plain style with these labels, sorted by author."

    default_label_style = Labels
    default_sorting_style = "author_year_title"


register_plugin("pybtex.style.formatting", "author_year", AuthorYear)

"""Write nbs/bibliography.md from references.bib: plain Markdown, one anchor for each key.

    python book/bibliography.py          `make export` runs it

A chapter cites with a link: `([Polyak, 1964](bibliography.md#polyak1964methods))`. What
stands in the brackets is the work's label here; dev/check.py compares the two.
"""

import argparse
from pathlib import Path

from pybtex.database import Entry, Person, parse_file
from pybtex.richtext import Text

HERE = Path(__file__).parent
SOURCE = HERE / "references.bib"
PAGE = HERE.parent / "nbs" / "bibliography.md"
HEAD = """# Bibliography

> The works that the book cites, by first author and year.
"""


def plain(latex: str) -> str:
    "Return a field without LaTeX: accents composed, braces gone, dashes drawn."
    text = str(Text.from_latex(latex.replace(r"\$", "$")))
    return text.replace("--", "–").replace("*", r"\*")


def surname(person: Person) -> str:
    "Return a family name with its particles: Ben Allal, La Malfa, de Jong."
    return plain(" ".join([*person.prelast_names, *person.last_names]))


def full_name(person: Person) -> str:
    "Return a name as it is said."
    given = plain(" ".join([*person.first_names, *person.middle_names]))
    return f"{given} {surname(person)}".strip()


def by(entry: Entry, name) -> str:
    "Join the authors; more than three, or `others`, become `et al.`."
    people = entry.persons["author"]
    named = [name(p) for p in people if surname(p) != "others"]
    if name is surname and (len(people) > 2 or len(named) < len(people)):
        return f"{named[0]} et al."
    if len(named) < len(people):
        return f"{', '.join(named)} et al."
    if len(named) < 3:
        return " and ".join(named)
    return f"{', '.join(named[:-1])} and {named[-1]}"


def label(entry: Entry) -> str:
    "Return what a citation says: one author, two, or the first `et al.`, then the year."
    return f"{by(entry, surname)}, {entry.fields['year']}"


def labels(entries: dict[str, Entry]) -> dict[str, str]:
    "Return the label of each key, with a letter where two would be the same."
    given: dict[str, str] = {}
    for key in in_order(entries):
        base = label(entries[key])
        others = sum(name.startswith(base) for name in given.values())
        given[key] = base + " bcdefg"[others].strip()
    return given


def in_order(entries: dict[str, Entry]) -> list[str]:
    "Return the keys by authors, then year, then title."

    def order(key: str) -> tuple[str, str, str]:
        entry = entries[key]
        names = " ".join(map(surname, entry.persons["author"]))
        return names.lower(), entry.fields["year"], entry.fields["title"]

    return sorted(entries, key=order)


def place(entry: Entry) -> str:
    "Return where a work appeared, with volume, number and pages."
    fields = entry.fields
    kinds = ("journal", "booktitle", "publisher", "institution", "howpublished")
    where = next((plain(fields[kind]) for kind in kinds if kind in fields), "")
    if where.startswith("arXiv"):
        where = "arXiv"
    volume = fields.get("volume", "")
    if "number" in fields:
        volume += f"({fields['number']})"
    parts = [f"{where} {volume}".strip(), plain(fields.get("pages", ""))]
    return ", ".join([*filter(None, parts), fields["year"]])


def address(entry: Entry) -> str:
    "Return a link to the work: its DOI, its number at arXiv, or an address."
    fields = entry.fields
    if "doi" in fields:
        return f"[doi:{fields['doi']}](https://doi.org/{fields['doi']})"
    if "eprint" in fields:
        return f"[arXiv:{fields['eprint']}](https://arxiv.org/abs/{fields['eprint']})"
    return f"<{fields['url']}>"


def line(key: str, entry: Entry, name: str) -> str:
    "Return an entry as a paragraph."
    title = plain(entry.fields["title"]).rstrip(".")
    end = "" if title.endswith("?") else "."
    who = by(entry, full_name).removesuffix(".")
    told = f"{who}. *{title}*{end} {place(entry)}. {address(entry)}"
    return f'<a id="{key}"></a>**{name}.** {told}'


def load() -> dict[str, Entry]:
    "Read references.bib."
    return dict(parse_file(str(SOURCE)).entries.items())


def page() -> str:
    "Return the text of nbs/bibliography.md."
    entries = load()
    names = labels(entries)
    lines = [line(key, entries[key], names[key]) for key in in_order(entries)]
    return "\n".join([HEAD, "\n\n".join(lines), ""])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    PAGE.write_text(page(), encoding="utf-8")

"""Typeset Sphinx's single HTML page as a PDF: BeautifulSoup, pandoc, Typst, all from wheels.

    python book/pdf.py book/_build/single book/_build/nanochat-book.pdf

Every number (chapter, figure, equation, exercise) is the one that Sphinx printed. A formula
that pandoc cannot convert or a link that leads nowhere makes the exit code 1.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pypandoc
import typst
from bs4 import BeautifulSoup

HERE = Path(__file__).parent
AUTHOR = "The nanochat book authors"
LANGUAGES = {"ipython3": "python", "ipython": "python", "default": "python"}
LANGUAGES |= {"none": "", "myst-ansi": "", "text": ""}
# Symbols for which pandoc still uses the names from before Typst 0.14.
RENAMED = [
    (r"\b(dot|times|plus|minus|ast|div)\.circle\b", r"\1.o"),
    (r"\bangle\.(l|r)\b", r"chevron.\1"),
    (r"\bsect\b(?=[. ])", "inter"),
]
NOISE = ".headerlink, button, script, input, style, .toctree-wrapper > ul, .backlinks"
NOISE += ", .cell_output:has(.widget)"


def clean_headings(body) -> None:
    "Keep small headings of the front page and the glossary out of the contents."
    for heading in body.select("h2"):
        if not heading.find_parent(class_="toctree-wrapper"):
            heading.name = "h4"
    for heading in body.select("h3"):
        if len(heading.get_text().strip()) == 1:
            heading.name = "h4"


def gather_solutions(soup, body) -> None:
    "Move the solutions of all chapters behind everything else."
    last = soup.new_tag("section", id="all-solutions")
    heading = soup.new_tag("h2")
    heading.string = "Solutions"
    last.append(heading)
    for title in body.select("section > h3"):
        chapter = title.find_parent("section").find_parent("section")
        if not title.get_text().strip(" .0123456789¶") == "Solutions" or not chapter:
            continue
        # The chapter's name replaces the section's.
        title.string = chapter.find("h2").get_text().rstrip("¶")
        last.append(title.parent.extract())
    if last.find("h3"):
        wrapper = soup.new_tag("div", attrs={"class": "toctree-wrapper"})
        wrapper.append(last)
        body.append(wrapper)


def clean_links(body) -> None:
    "Make links local and identifiers unique."
    for a in body.select('a[href^="#document-"]'):  # Sphinx: '#document-x#y'
        parts = a["href"].split("#")
        a["href"] = "#" + parts[2] if len(parts) > 2 else a["href"]
    # A label of Typst is letters, digits and four signs; a heading's anchor has others.
    for tag in body.select('[id], a[href^="#"]'):
        for key in {"id", "href"} & tag.attrs.keys():
            if key == "id" or tag[key].startswith("#"):
                name = re.sub(
                    r"[^A-Za-z0-9_.:-]", "_", unquote(tag[key].removeprefix("#"))
                )
                tag[key] = name if key == "id" else "#" + name
    seen = set()
    for tag in body.select("[id]"):
        if tag["id"] in seen:
            del tag["id"]
        else:
            seen.add(tag["id"])


def clean_notes(soup, body) -> None:
    "Turn each footnote and each entry of the bibliography into a paragraph."
    for tag in body.select("[role]"):  # otherwise pandoc makes empty footnotes
        del tag["role"]
    for tag in body.select(".fn-bracket, .cite-bracket"):
        tag.unwrap()
    for note in body.select("div.citation[id], div.footnote[id]"):
        label, text = note.select_one(".label"), note.select_one("p")
        if label and text:
            label.name = "span"
            label.string = label.get_text() + " "
            text.insert(0, label.extract())
    for paragraph in body.select("p[id]"):  # pandoc gives these no identifier
        paragraph.insert(0, soup.new_tag("span", id=paragraph["id"]))
        del paragraph["id"]
    for term in body.select("dl dt[id]"):
        anchor = soup.new_tag("span", id=term["id"])
        del term["id"]
        term.insert(0, anchor)
    for term in reversed(body.select("dl dt")):  # synonyms share one line
        after = term.find_next_sibling()
        if after is not None and after.name == "dt":
            term.append(", ")
            term.extend(list(after.contents))
            after.decompose()


def clean_code(soup, body) -> None:
    "Convert code to plain text with its language, for Typst to highlight."
    for block in body.select("div.highlight"):
        classes = block.parent.get("class", [])

        # Sphinx wraps code in the class of its language: `highlight-python`.
        name = next((c[10:] for c in classes if c.startswith("highlight-")), "")
        for number in block.select(".linenos"):
            number.decompose()
        pre, code = soup.new_tag("pre"), soup.new_tag("code")
        if language := LANGUAGES.get(name, name):
            pre["class"] = language
        code.string = block.get_text().rstrip("\n")
        pre.append(code)
        block.replace_with(pre)

    # Two boxes that the template draws in its own way.
    for caption in body.select(".code-block-caption"):
        caption["class"] = ["lstcap"]
    for cell in body.select("div.cell.tag_exported"):
        cell["class"] = ["exported"]


def clean_math(soup, body) -> None:
    "Turn each displayed formula into a paragraph with its number as an attribute."
    for div in body.select("div.math"):
        for anchor in div.select("span[id]"):
            div.insert_before(soup.new_tag("div", id=anchor["id"]))
        number = div.select_one(".eqno")
        number = number.extract().get_text().strip() if number else ""
        found = re.search(r"\\\[(.*)\\\]", div.get_text(), re.S)
        assert found, f"an equation without a formula: {div}"
        formula = found[1]
        div.clear()
        div["class"] = ["equation"]
        div["data-no"] = number
        paragraph = soup.new_tag("p")
        paragraph.string = r"\[" + formula.strip().replace(r"\!", "") + r"\]"
        div.append(paragraph)


def embolden(soup, tag) -> None:
    "Turn a label into a bold paragraph."
    tag.name = "p"
    if not tag.find("strong"):
        strong = soup.new_tag("strong")
        strong.extend(list(tag.contents))
        tag.append(strong)


def clean(html: str) -> tuple[str, str]:
    "Return the page's body in a form that pandoc can read, and its title."
    soup = BeautifulSoup(html, "lxml")
    body = soup.select_one("div.body") or soup.body
    assert body, "a page without a body"
    clean_links(body)
    gather_solutions(soup, body)
    for tag in body.select(NOISE):
        tag.decompose()
    clean_headings(body)
    for tag in body.select(
        "summary"
    ):  # 'Show code cell source': the PDF shows it anyway
        tag.decompose()
    clean_notes(soup, body)
    for tag in body.select("details"):  # folded on the screen, open in the PDF
        del tag["class"]
    for tag in body.select("details, section, aside"):
        tag.name = "div"
    clean_code(soup, body)
    clean_math(soup, body)
    for tag in body.select(".admonition-title, .sd-tab-set > label"):
        embolden(soup, tag)
    return str(body), soup.title.get_text() if soup.title else "Book"


def modern(line: str) -> str:
    "Rename symbols in the formulas of a line."

    def formula(m):
        text = m[0]
        for pattern, new in RENAMED:
            text = re.sub(pattern, new, text)
        return text

    return re.sub(r"(?<!\\)\$.+?(?<!\\)\$", formula, line)


def to_typst(html: Path) -> tuple[str, list[str]]:
    "Convert with pandoc; return the Typst source and the broken links."
    # fmt: off
    command = [
        pypandoc.get_pandoc_path(), "-f", "html+tex_math_single_backslash", "-t", "typst",
        "--wrap=none", f"--lua-filter={HERE / 'pdf.lua'}", str(html),
    ]
    # fmt: on
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if done.stderr:
        sys.exit(f"pandoc: {done.stderr}")
    source = "\n".join(map(modern, done.stdout.split("\n")))
    link = r"#link\(<([^>]*)>\)"
    defined = set(re.findall(r"<([\w.:-]+)>", re.sub(link, "", source)))
    dead = sorted({name for name in re.findall(link, source) if name not in defined})

    def keep(m):
        return m[0] if m[1] in defined else "#box"

    return re.sub(link, keep, source), dead


def main(source: str, out: str) -> None:
    "Write the PDF, keeping Typst's input next to it."
    began = time.time()
    pages = Path(source)
    body, title = clean((pages / "index.html").read_text(encoding="utf-8"))
    work = Path(out).with_suffix(".typst")
    work.mkdir(parents=True, exist_ok=True)
    (work / "body.html").write_text(body, encoding="utf-8")

    # The pages are kept beside the PDF, for when Typst complains about a line.
    typ, dead = to_typst(work / "body.html")
    if (pages / "_images").is_dir():
        shutil.copytree(pages / "_images", work / "_images", dirs_exist_ok=True)
    template = (HERE / "pdf.typ").read_text(encoding="utf-8")
    template = template.replace("TITLE", title).replace("AUTHOR", AUTHOR)
    (work / "book.typ").write_text(template + typ, encoding="utf-8")

    # The fonts of the book alone: the same pages on every machine.
    fonts = [str(HERE / "fonts")]
    try:
        file = str(work / "book.typ")
        typst.compile(file, output=out, ignore_system_fonts=True, font_paths=fonts)
    except typst.TypstError as error:
        sys.exit(f"typst: {error.diagnostic}")
    if dead:
        sys.exit(f"links that lead nowhere: {', '.join(dead)}")
    size = Path(out).stat().st_size / 1e6
    print(f"{out}: {size:.1f} MB in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Check the repository as a whole; `make check` and tests/test_house.py run this.

    python dev/check.py

Each check returns a list of complaints. Nothing in this file is about a specific chapter:
which module belongs to which chapter is read from the notebooks.
"""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nanochat"
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "book"), str(ROOT / "book" / "_ext")]
import markup
from nbdev_reader import module_file, read, split_directives

# Exceptions to the order of chapters. Architecture is taught top-down: chapter 4 uses what
# chapter 5 explains. And a training stage (chapter 6) connects chapters: it uses the
# optimizer, the evaluation and the mixtures, which chapters 7 and 9 explain.
FORWARD_IMPORTS = {
    ("gpt", "attention"),
    ("stage", "optim"),
    ("stage", "loss_eval"),
    ("stage", "tasks.mixtures"),
}
MACHINE = re.compile(r"/(root|work|home/\w+|tmp/\w+/src)/|/Users/\w")


# ---- What is there


def notebooks() -> list[Path]:
    "Return the chapters and appendices in order."
    return sorted((ROOT / "nbs").glob("*.ipynb"))


def modules() -> dict[str, Path]:
    "Return the generated modules: `tasks.arc` -> nanochat/tasks/arc.py."
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if not file.name.startswith("_"):
            parts = file.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(parts)] = file
    return found


def chapters() -> dict[str, str]:
    "Return the notebook that exports each module."
    found: dict[str, str] = {}
    for notebook in notebooks():
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
            directives, _ = split_directives("".join(cell["source"]))
            if cell["cell_type"] == "code" and (file := module_file(directives)):
                module = file[len("nanochat/") : -len(".py")].replace("/", ".")
                found.setdefault(module, notebook.stem)
    return found


def tracked() -> list[Path]:
    "Return the files that git tracks or would add."
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [f for line in done.stdout.splitlines() if (f := ROOT / line).is_file()]


# ---- The checks


def export_is_clean() -> list[str]:
    "Exporting and cleaning a copy of the notebooks changes no byte."
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        export_copy(copy)
        ours = {f.relative_to(ROOT) for f in [*modules().values(), *notebooks()]}
        ours |= {f.relative_to(copy) for f in (copy / "nanochat").rglob("*.py")}
        for name in sorted(ours):
            if not same_file(copy / name, ROOT / name):
                problems.append(f"{name}: run `make export` and commit what it changes")
    return problems


def export_copy(copy: Path) -> None:
    "Copy the notebooks into a folder, and export and clean them there."
    shutil.copytree(ROOT / "nbs", copy / "nbs")
    ignore = shutil.ignore_patterns("data", "__pycache__")
    shutil.copytree(PACKAGE, copy / "nanochat", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)

    # Otherwise a module that no notebook exports anymore would look up to date.
    for file in modules().values():
        (copy / file.relative_to(ROOT)).unlink()

    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    env["PYTHONPATH"] = str(copy)
    for tool in ("nbdev-export", "nbdev-clean"):
        command = [str(Path(sys.executable).parent / tool)]
        subprocess.run(command, cwd=copy, env=env, check=True)


def same_file(one: Path, other: Path) -> bool:
    "Return whether two files exist and have the same bytes."
    both = one.exists() and other.exists()
    return both and one.read_bytes() == other.read_bytes()


def imports(file: Path) -> set[str]:
    "Return the modules that a file imports, as absolute names: `nanochat.tasks.common`."
    found: set[str] = set()
    package = file.relative_to(ROOT).parts[:-1]
    tree = ast.parse(file.read_text("utf-8"))
    # What only a type checker imports makes no module depend on another.
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join(filter(None, [*base, node.module]))
            found |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return found


def comes_later(chapter: str, other: str) -> bool:
    "Return whether one notebook comes after another; appendices have no order."
    numbered = chapter[:2].isdigit() and other[:2].isdigit()
    return numbered and chapter[:2] > other[:2]


def imports_follow_the_chapters() -> list[str]:
    "A module imports from its own or an earlier chapter, or an appendix; no cycle."
    problems = []
    graph: dict[str, set[str]] = {}
    home = chapters()
    for name, file in modules().items():
        if name not in home:
            problems.append(f"{file.relative_to(ROOT)}: exported by no notebook")
            continue
        graph[name] = set()
        for target in imports(file):
            if target.split(".")[0] in ("scripts", "tests", "dev"):
                problems.append(f"{name} imports {target}")
            other = target.removeprefix("nanochat.")
            if not target.startswith("nanochat.") or other not in home:
                continue
            graph[name].add(other)
            if comes_later(home[other], home[name]):
                if (name, other) not in FORWARD_IMPORTS:
                    problems.append(
                        f"{name} ({home[name]}) imports {other} ({home[other]})"
                    )

    # Appendices may import from each other, as long as there is no cycle.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        problems.append("cycle: " + " -> ".join(error.args[1]))
    return problems


def requirements(package: str) -> list[str]:
    "Return the packages that a plain install of a package includes."
    found = []
    for requirement in metadata.requires(package) or []:
        name = re.match(r"[\w-]+", requirement)
        if name and "extra ==" not in requirement:
            found.append(name[0].lower())
    return found


def loaded_packages(file: Path) -> set[str]:
    "Return the packages that a file imports when it is loaded."
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def every_import_is_declared() -> list[str]:
    "What package and scripts import when they are loaded, a plain install brings along."
    # Our own dependencies, and theirs in turn.
    brought = set(requirements("nanochat"))
    for package in requirements("nanochat"):
        brought.update(requirements(package))

    problems = []
    present = {"nanochat", "rustbpe", "scripts"} | sys.stdlib_module_names
    homes = metadata.packages_distributions()
    for file in [*modules().values(), *(ROOT / "scripts").glob("*.py")]:
        for module in loaded_packages(file) - present:
            if not {x.lower() for x in homes.get(module, [])} & brought:
                problems.append(
                    f"{file.relative_to(ROOT)} imports {module}: declare it"
                )
    return problems


def absolute(line: str, module: str) -> str:
    "Undo nbdev's `from .gpt import` in a generated line."
    dots = re.match(r"(\s*from )(\.+)(\S*)( import .*)", line)
    if not dots:
        return line
    package = ["nanochat", *module.split(".")[:-1]]
    base = package[: len(package) - len(dots[2]) + 1]
    return dots[1] + ".".join([*base, *filter(None, [dots[3]])]) + dots[4]


def exported_lines() -> dict[str, list[str]]:
    "Return the lines of each generated module without nbdev's own."
    found = {}
    for module, file in modules().items():
        text = file.read_text("utf-8")
        body = text.partition("# %% auto")[2] or text
        body = re.sub(r"^__all__ = \[.*?\]$", "", body, flags=re.M | re.S)
        lines = [absolute(line, module) for line in body.splitlines()[1:]]
        skip = ("# %% ", "from __future__")
        found[module] = [x for x in lines if x.strip() and not x.startswith(skip)]
    return found


def printed(notebook: Path) -> set[str]:
    "Return the code lines that a reader of this chapter sees."
    page = ROOT / "book" / "_build" / "html" / f"{notebook.stem}.html"
    if page.exists() and page.stat().st_mtime > notebook.stat().st_mtime:
        found = re.findall(r"<pre>(.*?)</pre>", page.read_text("utf-8"), re.S)
        plain = [html.unescape(re.sub(r"<[^>]*>", "", block)) for block in found]
        return set("\n".join(plain).splitlines())
    unseen = {"remove-cell", "remove-input"}
    shown = []
    for cell in read(notebook.read_text("utf-8")).cells:
        if cell.cell_type == "code" and not unseen & set(cell.metadata["tags"]):
            shown += cell.source.splitlines()
    return set(shown)


def every_exported_line_is_printed() -> list[str]:
    "What ships is what the book shows: in the built pages, else as the reader gives it."
    home = chapters()
    problems = []
    seen = {
        stem: printed(ROOT / "nbs" / f"{stem}.ipynb") for stem in set(home.values())
    }
    for module, lines in exported_lines().items():
        missing = [x for x in lines if x not in seen.get(home.get(module, ""), ())]
        problems += [f"{module}: not printed: {x}" for x in missing]
    return problems


def characters_of_the_book() -> set[str]:
    "Return the non-ASCII characters in chapters, pages and the crate's source."
    files = [*notebooks(), *(ROOT / "nbs").glob("*.md")]
    files += [*(ROOT / "rustbpe").glob("src/*.rs"), *(ROOT / "rustbpe").glob("*/*.rs")]
    found: set[str] = set()
    for file in files:
        text = file.read_text("utf-8")
        if file.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "".join("".join(cell["source"]) for cell in cells)
        found.update(text)
    return {c for c in found if ord(c) > 126}


def every_character_has_a_glyph() -> list[str]:
    "The PDF's fonts cover the book: DejaVu Sans Mono and the subsets in book/fonts."
    from fontTools.ttLib import TTFont
    from matplotlib import get_data_path

    fonts = [Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"]
    fonts += [
        f for f in (ROOT / "book" / "fonts").iterdir() if f.suffix in (".ttf", ".otf")
    ]
    covered = {0xA0, 0xAD, 0x200B, 0x200D, 0xFE0F}  # spaces and joiners draw nothing
    for font in fonts:
        covered |= set(TTFont(font, lazy=True).getBestCmap())
    missing = sorted(c for c in characters_of_the_book() if ord(c) not in covered)
    remedy = "run book/fonts/make.py"
    return [f"no font of the PDF has {c!r} (U+{ord(c):04X}): {remedy}" for c in missing]


CITATION = re.compile(r"\[([^\]\[]*)\]\(bibliography\.md#([\w-]+)\)")


def bibliography_is_sound() -> list[str]:
    "No work has two entries, its page is up to date, and citations agree with it."
    import bibliography

    text = (ROOT / "book" / "references.bib").read_text("utf-8")
    keys = re.findall(r"^@\w+\{\s*([^,\s]+)", text, re.M)
    problems = [
        f"{key}: twice in references.bib" for key in keys if keys.count(key) > 1
    ]

    # What a citation says in brackets is the label of the work.
    names = bibliography.labels(bibliography.load())
    for file in notebooks():
        for words, key in CITATION.findall(file.read_text("utf-8")):
            if words.replace(" (", ", ").rstrip(")") != names.get(key):
                problems.append(f"{file.name} cites {key} as {words}")
    if bibliography.page() != bibliography.PAGE.read_text("utf-8"):
        problems.append("bibliography.md: run python book/bibliography.py")
    return sorted(set(problems))


def nothing_of_this_machine() -> list[str]:
    "No tracked text names a folder that exists on one machine only."
    problems = []
    for file in tracked():
        if file.is_relative_to(PACKAGE / "data") or file == Path(__file__).resolve():
            continue
        try:
            lines = file.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found = [i for i, line in enumerate(lines, 1) if MACHINE.search(line)]
        problems += [
            f"{file.relative_to(ROOT)}:{i}: {lines[i - 1][:80]}" for i in found
        ]
    return problems


def lines_of(file: Path) -> tuple[int, int]:
    "Return the number of lines without blank ones and nbdev's markers, and of all lines."
    text = file.read_text("utf-8").partition("#[cfg(test)]")[0]
    own = re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.M | re.S)
    told = [x for x in own.splitlines() if x.strip() and not x.startswith("# %% ")]
    return len(told), len(text.splitlines())


PARTS = {  # part of the repository -> names of its files
    "package": r"nanochat/(?!.*\b_modidx\.py$).*\.py$",
    "web page": r"nanochat/ui/.*\.(html|css|js)$",
    "scripts": r"scripts/.*\.py$|speedrun\.sh$",
    "crate": r"rustbpe/src/",
    "tests": r"(tests|rustbpe/tests)/.*\.(py|rs)$",
}


def sizes() -> dict[str, tuple[int, int]]:
    "Count the lines of each part, without blank ones and in total."
    told = dict.fromkeys([*PARTS, "all but tests"], 0)
    every = dict(told)
    for file in tracked():
        name = file.relative_to(ROOT).as_posix()
        found = [part for part, names in PARTS.items() if re.match(names, name)]
        if found and found != ["tests"]:
            found.append("all but tests")
        for part in found:
            counts = lines_of(file)
            told[part] += counts[0]
            every[part] += counts[1]
    return {part: (told[part], every[part]) for part in told}


# ---- Readability


@dataclass(frozen=True)
class Limits:
    "Limits for a function that can be read in one go."

    lines: int = 30  # of its body
    parameters: int = 5  # positional ones
    silent: int = 14  # lines that need no comment


SHIPPED = Limits()
# A test goes through one case from start to finish, and its name says why.
TESTS = Limits(lines=45, silent=45)

# Signatures that are determined by others.
FIXED_SIGNATURES = {
    ("attention", "KVCache.__init__"): "nanochat's",
    ("attention", "BlockAttention.forward"): "of an autograd.Function",
    ("head", "LinearCrossEntropy.forward"): "of an autograd.Function",
    ("download", "KeepLinked.redirect_request"): "of the standard library",
    ("tests/no_posix/sitecustomize", "open_with_newlines"): "of the standard library",
    ("tests/test_attention", "stand_in.flash_attn_func"): "of flash_attn",
    ("tests/test_attention", "FlashOnCPU.forward"): "of an autograd.Function",
    ("tests/test_attention", "FlashOnCPU.backward"): "of an autograd.Function",
    ("tests/test_head", "plainly"): "of its fast twin",
    ("tests/test_eval", "Scripted.generate_many"): "of the engine",
}
# The formatter puts two spaces before a comment that follows code.
COMMENT = re.compile(r"^ *# |  # ", re.M)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, Function]]:
    "Yield every function with its name, prefixed by the name of its class."
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            continue  # expressions define no functions
        name = f"{outer}{getattr(node, 'name', '')}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, outer)


def body_lines(node: Function) -> int:
    "Count the lines of a function's body without its docstring."
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return 0
    return (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


def is_silent(node: Function, source: list[str]) -> bool:
    "Return whether a function's body has no comment."
    body = node.body[1:] if ast.get_docstring(node) else node.body
    text = "\n".join(source[body[0].lineno - 1 : node.end_lineno]) if body else ""
    # A comment may also stand between the docstring and the first statement.
    between = source[node.body[0].end_lineno : body[0].lineno] if body else []
    return not COMMENT.search("\n".join([*between, text]))


def positional(node: Function) -> int:
    "Count the parameters that may be positional."
    names = [p.arg for p in [*node.args.posonlyargs, *node.args.args]]
    return len([name for name in names if name not in ("self", "cls", "ctx")])


def filled_by_name(node: Function) -> bool:
    "Return whether a function is a test or a fixture, which pytest calls by name."
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    return node.name.startswith("test_") or "pytest.fixture" in decorators


def is_named_lambda(node: ast.AST) -> bool:
    "Recognize `name = lambda ...`; an attribute of an object does not count."
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return False
    return isinstance(node.value, ast.Lambda) and isinstance(target, ast.Name)


def is_packed(node: ast.AST) -> bool:
    "Recognize two statements in one: a tuple of names = a tuple of unrelated values."
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    if not isinstance(node.targets[0], ast.Tuple):
        return False
    values = node.value.elts
    plain = all(isinstance(v, (ast.Name, ast.Attribute, ast.Constant)) for v in values)
    calls = [v for v in values if isinstance(v, ast.Call)]
    alike = (
        {ast.unparse(v.func) for v in calls},
        {", ".join(map(ast.unparse, v.args)) for v in calls},
    )
    # A swap, two attributes, or one function of two things are related pairs.
    together = len(calls) == len(values) and 1 in map(len, alike)
    return not (plain or together)


def too_many(module: str, name: str, node: Function, most: int) -> bool:
    "Return whether one of our signatures has too many positional parameters."
    if positional(node) <= most or (module, name) in FIXED_SIGNATURES:
        return False
    return not filled_by_name(node)


def long_functions(
    module: str, tree: ast.AST, source: str, limits: Limits
) -> list[str]:
    "Return the functions that are too long, take too much, or have no comment."
    problems = []
    lines = source.splitlines()
    for name, node in functions(tree):
        length = body_lines(node)
        if length > limits.lines:
            problems.append(f"{module}.{name}: {length} lines, {limits.lines} at most")
        if length > limits.silent and is_silent(node, lines):
            problems.append(f"{module}.{name}: {length} lines without a comment")
        if too_many(module, name, node, limits.parameters):
            problems.append(
                f"{module}.{name}: {positional(node)} positional parameters"
            )
    return problems


def folded_statements(module: str, tree: ast.AST) -> list[str]:
    "Return the places where one statement does the work of two."
    problems = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign, *COMPREHENSIONS)):
            continue
        place = f"{module}:{node.lineno}"
        if is_named_lambda(node):
            problems.append(f"{place}: a lambda with a name: use def")
        if is_packed(node):
            problems.append(f"{place}: two statements in one: {ast.unparse(node)}")
        if isinstance(node, COMPREHENSIONS):
            inner = [x for x in ast.walk(node) if isinstance(x, COMPREHENSIONS)]
            if len(inner) > 1:
                problems.append(f"{place}: a comprehension inside another")
    return problems


def habits(module: str, source: str, limits: Limits = SHIPPED) -> list[str]:
    "Return everything that makes a module hard to read."
    tree = ast.parse(source)
    problems = long_functions(module, tree, source, limits)
    return problems + folded_statements(module, tree)


def python_files() -> dict[str, Path]:
    "Return all Python files, handwritten and generated: `gpt`, `dev/check`."
    found = modules()
    for folder in ("scripts", "dev", "book", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT).with_suffix("").as_posix()
            if "/_build/" not in name:
                found[name] = file
    return found


def code_is_unfolded() -> list[str]:
    """Functions are short, take few parameters, say one thing at a time, and say why.

    Tests have looser limits. A test may have 45 lines, because it goes through one case
    from start to finish, and it needs no comment, because its name states what it shows.
    Parameters that pytest passes by name (fixtures, parametrization) do not count. Packed
    assignments, named lambdas and nested comprehensions are as hard to read there as
    anywhere.
    """
    problems = []
    for name, file in python_files().items():
        limits = TESTS if name.startswith("tests/") else SHIPPED
        problems += habits(name, file.read_text("utf-8"), limits)
    return problems


CHECKS = [
    export_is_clean,
    imports_follow_the_chapters,
    every_import_is_declared,
    every_exported_line_is_printed,
    every_character_has_a_glyph,
    bibliography_is_sound,
    *markup.CHECKS,
    nothing_of_this_machine,
    code_is_unfolded,
]


def main() -> int:
    "Run all checks, print the size table, return the exit code."
    failed = 0
    for check in CHECKS:
        problems = check()
        failed += bool(problems)
        print("FAIL" if problems else "ok  ", check.__name__.replace("_", " "))
        for problem in problems[:20]:
            print("      ", problem)
        if len(problems) > 20:
            print(f"       and {len(problems) - 20} more")
    print("\n  lines  with blank ones and markers, for information")
    for part, (told, every) in sizes().items():
        print(f"{told:7,d}  {every:7,d}  {part}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

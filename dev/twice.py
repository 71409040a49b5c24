"""Run each cell of a chapter twice in a row, as readers do, and report what fails then.

    python dev/twice.py nbs/07_optimization.ipynb [nbs/...]

A reader changes a cell and runs it again. So no cell may need a state that it destroys
itself: it may not move what it finds, nor add to a list that an earlier cell has made.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from execnb.shell import CaptureShell

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "book" / "_ext")]
from markup import cells, source
from nbdev_reader import split_directives

SKIPPED = {"notest", "slow"}


def runs(cell: dict) -> bool:
    "Return whether a cell is code that the book executes."
    directives, code = split_directives(source(cell))
    if cell["cell_type"] != "code" or SKIPPED & directives.keys():
        return False
    return bool(code.strip()) and directives.get("eval") != "false"


def twice(file: Path) -> list[str]:
    "Run a notebook in its folder; return the cells that fail the second time."
    problems = []
    shell = CaptureShell(file)
    home = os.getcwd()
    os.chdir(file.parent)
    try:
        for cell in filter(runs, cells(file)):
            # A failure the first time is a fault of another kind, and ends the notebook.
            for attempt in (1, 2):
                shell.run(source(cell))
                if shell.exc is None:
                    continue
                what = f"{type(shell.exc).__name__}: {str(shell.exc)[:200]}"
                problems.append(f"{file.name} [{cell['id']}] run {attempt}: {what}")
                if attempt == 1:
                    return problems
                shell.exc = None
    finally:
        os.chdir(home)
    return problems


def main() -> int:
    "Check the notebooks of the command line."
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", type=Path, nargs="+")
    files = parser.parse_args().notebooks

    # All names first: a chapter takes minutes.
    for file in files:
        if not file.is_file():
            parser.error(f"there is no notebook {file}")
    failed = 0
    for file in files:
        began = time.perf_counter()
        problems = twice(file.resolve())
        failed += len(problems)
        print(f"{file.name}: {len(problems)} ({time.perf_counter() - began:.0f} s)")
        for problem in problems:
            print("   ", problem)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

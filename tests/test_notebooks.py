"""Every chapter runs from top to bottom, as a reader would run it, in a fresh shell."""

from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook  # pytest would collect the name test_nb

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    passed, _ = run_notebook(notebook, skip_flags=["notest", "slow"], basepath=ROOT)
    assert passed

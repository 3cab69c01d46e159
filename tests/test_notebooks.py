"""Every notebook runs, one test each: `pytest -m book`. With NB_FLAGS="slow gpu", flagged cells run
too.

The runner is nbdev's own, which honours the flags and needs no Jupyter kernel. Each notebook
gets a process of its own, as it does with a reader: seeds, default dtypes, patched names and
open figures of one chapter must neither help nor hurt the next.
"""
import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT/'nbs').glob('[!_.]*.ipynb'))
RUN = '''
import sys
from pathlib import Path
from nbdev.test import test_nb
path, root, skip, force = sys.argv[1:]
ok, _ = test_nb(Path(path), skip_flags=skip.split(), force_flags=force.split(), basepath=root)
sys.exit(not ok)
'''


def run(nb):
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/'settings.ini')
    force = os.environ.get('NB_FLAGS', '')
    return subprocess.run(
        [sys.executable, '-c', RUN, nb, ROOT, cfg['DEFAULT']['tst_flags'], force],
        cwd=ROOT,
        env={**os.environ, 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors='replace',
        timeout=None if force else 900)  # a chapter takes three minutes at most


# one short chapter runs with every `pytest`; the others where the whole book does
SMOKE = '02_prompts'
CHAPTERS = [pytest.param(nb, id=nb.stem, marks=[] if nb.stem == SMOKE else pytest.mark.book)
            for nb in NBS]

@pytest.mark.parametrize('nb', CHAPTERS)
def test_notebook(nb):
    r = run(nb)
    assert r.returncode == 0, f'{nb.name} failed:\n{r.stderr[-8000:]}'


def test_every_chapter_prepares_an_empty_environment():
    "The same cell after each title: Colab opens a notebook alone"
    cells = {nb.stem: json.loads(nb.read_text(encoding='utf-8'))['cells'][1] for nb in NBS}
    sources = {stem: ''.join(c['source']) for stem, c in cells.items() if stem != 'index'}
    assert len(set(sources.values())) == 1, {stem: s[:60] for stem, s in sources.items()}
    [source] = set(sources.values())
    assert source.startswith('#| hide\n') and 'git clone' in source and '[book]' in source

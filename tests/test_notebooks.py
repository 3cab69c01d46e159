"""Every notebook runs, one test each: `pytest -m book`. With NB_FLAGS="slow gpu", flagged cells run
too.

The runner is nbdev's own, which honours the flags and needs no Jupyter kernel. Each notebook
gets a process of its own, as it does with a reader: seeds, default dtypes, patched names and
open figures of one chapter must neither help nor hurt the next.
"""
import atexit
import configparser
import json
import os
import sys
from multiprocessing import get_all_start_methods, get_context, set_start_method
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT/'nbs').glob('[!_.]*.ipynb'))
NBS.sort(key=lambda nb: nb.name[0] != '1')  # the methods take longest, and begin
# What every chapter needs, and what takes ten times as long to import as the chapter's own modules
LIBRARIES = ['torch', 'open_clip', 'pandas', 'seaborn', 'sklearn.linear_model', 'nbdev.test']


def server():
    "Where processes are copied from one that has imported the libraries, and nothing of ours"
    if 'forkserver' not in get_all_start_methods(): return get_context('spawn')
    context = get_context('forkserver')
    context.set_forkserver_preload(LIBRARIES)
    return context


def run_here(nb, flags, force, log):
    "The notebook, in this process, which says in a file what went wrong"
    set_start_method(None, force=True)  # as a reader's process has it, not as this one was made
    for stream in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    from nbdev.test import test_nb
    ok, _ = test_nb(nb, skip_flags=flags, force_flags=force, basepath=str(ROOT))
    atexit._run_exitfuncs()  # temporary folders go; a copied process would skip that
    sys.exit(not ok)


def run(nb, log):
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/'settings.ini')
    force = os.environ.get('NB_FLAGS', '').split()
    flags = cfg['DEFAULT']['tst_flags'].split()
    p = server().Process(target=run_here, args=(nb, flags, force, str(log)))
    p.start()
    p.join(None if force else 600)  # a chapter takes a minute at most
    if p.exitcode is None: p.kill()
    return p.exitcode


# one short chapter runs with every `pytest`; the others where the whole book does
SMOKE = '02_prompts'
CHAPTERS = [pytest.param(nb, id=nb.stem, marks=[] if nb.stem == SMOKE else pytest.mark.book)
            for nb in NBS]

@pytest.mark.parametrize('nb', CHAPTERS)
def test_notebook(nb, tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert run(nb, tmp_path/'log') == 0, f'{nb.name}:\n{(tmp_path/"log").read_text()[-8000:]}'


def test_every_chapter_prepares_an_empty_environment():
    "The same cell after each title: Colab opens a notebook alone"
    cells = {nb.stem: json.loads(nb.read_text(encoding='utf-8'))['cells'][1] for nb in NBS}
    sources = {stem: ''.join(c['source']) for stem, c in cells.items() if stem != 'index'}
    assert len(set(sources.values())) == 1, {stem: s[:60] for stem, s in sources.items()}
    [source] = set(sources.values())
    assert source.startswith('#| hide\n') and 'git clone' in source and '[book]' in source

"""A method in somebody else's package: named in that package's pyproject.toml and nowhere here, it
is in the command line, the comparison, the sweeps, the hub and the checks."""
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib  # Python 3.10, where pytest brings tomli

from clipprompt.check import check_learner
from helpers import one_line, shapes, tiny_clip, works
from test_hub import hub  # noqa: F401, the fixture

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT/'tests'/'plugin'
methods = pytest.importorskip('clipprompt.methods')


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data')/'photos')


def install(folder, entry_points, **modules):
    "What pip leaves behind: modules, and a folder of metadata that says what they offer"
    info = folder/f'{folder.name}-1.0.dist-info'
    info.mkdir(parents=True)
    (info/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {folder.name}\nVersion: 1.0\n')
    lines = [f'{name} = {where}' for name, where in entry_points.items()]
    (info/'entry_points.txt').write_text('\n'.join(['[clipprompt.methods]', *lines]))
    for name, text in modules.items(): (folder/f'{name}.py').write_text(text)


@pytest.fixture
def low_rank(tmp_path, monkeypatch):
    "The package of tests/plugin, installed"
    project = tomllib.loads((PLUGIN/'pyproject.toml').read_text(encoding='utf-8'))['project']
    install(tmp_path/'good', project['entry-points']['clipprompt.methods'],
            lowrank=(PLUGIN/'lowrank.py').read_text(encoding='utf-8'))
    monkeypatch.syspath_prepend(tmp_path/'good')
    methods._found.cache_clear()   # installed while Python runs
    yield importlib.import_module('lowrank').LowRank
    del sys.modules['lowrank']
    methods._found.cache_clear()


def test_contributing_shows_this_very_package():
    shown = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    for kind, file in (('python', 'lowrank.py'), ('toml', 'pyproject.toml')):
        first = re.search(rf'```{kind}\n(.*?)```', shown, re.S)[1]
        assert first == (PLUGIN/file).read_text(encoding='utf-8'), file


def test_it_keeps_the_contract(low_rank):
    assert (check_learner(low_rank).result == 'passed').all()


def test_it_is_a_method_like_the_others(low_rank):
    assert methods.methods()['low-rank'] is low_rank
    assert set(methods.BOOK) < set(methods.methods().values())
    assert methods.find_method('low-rank').cls is low_rank
    assert 'low-rank' in works('info').out
    with pytest.raises(ValueError) as e: methods.find_method('low-rang')
    one_line(e, "'low-rang'", 'did you mean low-rank')
    assert methods.look('low-rank') == low_rank.look


def test_train_evaluate_predict(low_rank, photos, tmp_path):
    prompts = tmp_path/'p.safetensors'
    works('train', photos, '--method', 'low-rank', '--shots', 2, '--epochs', 2, '--out', prompts)
    assert 'low-rank' in works('evaluate', prompts, photos).out
    assert '%' in works('predict', prompts, photos/'disc'/'0.png').out
    assert 'low-rank' in works('info', prompts).out


def test_compare_and_sweep(low_rank, photos, tmp_path):
    "Beside a method of the book, with a row, a colour and a record that can be run again"
    args = ['--task', photos, '--methods', 'zero-shot,low-rank', '--protocol', 'few-shot',
            '--shots', 2, '--seeds', 1, '--epochs', 2, '--out', tmp_path/'out']
    assert 'low-rank' in works('compare', *args).out
    rows = pd.read_csv(tmp_path/'out'/'results.csv')
    assert rows.method.tolist() == ['zero-shot', 'low-rank']
    assert rows.trainable[1] == 4*2 + 2*128   # [M, r] and [r, D]
    assert (tmp_path/'out'/'compare.png').stat().st_size > 1000
    assert '2 runs, 2 done, 0 missing' in works('sweep', *args, '--plan').out
    works('rerun', tmp_path/'out'/'results.csv', '--run', rows.run[1][:8])


def test_hub(low_rank, hub):  # noqa: F811
    "Pushed and loaded by its name alone"
    clip = tiny_clip()
    learner = low_rank(clip, ['disc', 'ring'], rank=3, seed=1)
    again = methods.load(learner.push_to_hub('ada/low'), clip)
    assert type(again) is low_rank and again.hparams == learner.hparams
    assert torch.equal(again.directions, learner.directions)
    assert 'low-rank' in hub.repos['ada/low']['commits'][0][1]['README.md'].decode()


@pytest.mark.parametrize('where,text', [
    ('broken:Mine', 'import nothing_of_this_name'), ('broken:Mine', 'x = 1/0'),
    ('broken:Gone', 'x = 1'), ('absent:Mine', ''), ('broken:x', 'x = 1')])
def test_a_plugin_that_fails_is_named_and_the_rest_works(low_rank, tmp_path, monkeypatch, where,
                                                         text):
    install(tmp_path/'bad', dict(mine=where), broken=text)
    monkeypatch.syspath_prepend(tmp_path/'bad')
    methods._found.cache_clear()
    with pytest.warns(UserWarning) as told: found = methods.methods()
    sys.modules.pop('broken', None)
    said = [str(w.message) for w in told if 'mine' in str(w.message)]
    assert len(said) == 1 and '\n' not in said[0] and where.split(':')[0] in said[0], said
    assert found['low-rank'] is low_rank and 'coop' in found and 'mine' not in found


@pytest.mark.stress
def test_pip_installs_it_and_the_command_knows_it(photos, tmp_path):
    "In processes of their own, without network: what a stranger does"
    pytest.importorskip('setuptools', '77')
    shutil.copytree(PLUGIN, tmp_path/'source', ignore=shutil.ignore_patterns('__pycache__'))
    run = lambda *args, **env: subprocess.run(
        [sys.executable, '-m', *map(str, args)], cwd=tmp_path, env=os.environ | env, text=True,
        capture_output=True)
    r = run('pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--no-index',
            '--target', tmp_path/'site', tmp_path/'source')
    assert r.returncode == 0, r.stderr
    r = run('clipprompt', 'compare', '--task', photos, '--methods', 'zero-shot,low-rank',
            '--protocol', 'few-shot', '--shots', 2, '--epochs', 1, '--seeds', 1, '--out', 'out',
            PYTHONPATH=os.pathsep.join([str(tmp_path/'site'), str(ROOT)]))
    assert r.returncode == 0 and 'low-rank' in r.stdout, r.stderr

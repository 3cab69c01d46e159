"""What a user of the package relies on: it imports alone and offline, and its metadata agree."""
import configparser
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib  # Python 3.10, where pytest brings tomli

import clipprompt
from clipprompt.backbone import assets

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))

IMPORT_ALL = '''
import importlib, pkgutil, socket, sys

class NoSocket(socket.socket):  # a class, because ssl derives from it
    def __init__(self, *args, **kwargs): raise OSError("the network was asked for at import")
def refuse(*args, **kwargs): raise OSError("the network was asked for at import")
socket.socket, socket.create_connection, socket.getaddrinfo = NoSocket, refuse, refuse

import clipprompt
names = [m.name for m in pkgutil.iter_modules(clipprompt.__path__)]
for name in names: importlib.import_module(f"clipprompt.{name}")
tools = {"nbdev", "fastcore", "execnb"} & sys.modules.keys()
assert not tools, f"importing clipprompt imported {tools}"
print(*names)
'''


def test_every_module_imports_alone_and_offline(tmp_path):
    r = subprocess.run([sys.executable, '-c', IMPORT_ALL], cwd=tmp_path, capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stderr
    exported = {p.stem for p in (ROOT/'clipprompt').glob('*.py')} - {'__init__'}
    assert set(r.stdout.split()) == exported


def test_one_version():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/'settings.ini')
    assert clipprompt.__version__ == cfg['DEFAULT']['version']
    assert 'version' in PYPROJECT['project']['dynamic']


def names(requirements):
    return {re.split(r'[\s<>=!~;\[]', r)[0].lower().replace('-', '_') for r in requirements}

# where a distribution's name is not that of its module
MODULES = dict(open_clip_torch='open_clip', scikit_learn='sklearn', pillow='PIL')
INDIRECT = {'tabulate'}   # pandas asks for it when it writes Markdown

def imported(files):
    "Modules of others that some code imports, wherever in it"
    text = '\n'.join(f.read_text(encoding='utf-8') for f in files)
    found = set(re.findall(r'^\s*(?:import|from) ([a-z]\w*|PIL)', text, re.M))
    return found - sys.stdlib_module_names - {'clipprompt'}


def test_dependencies():
    """What the code imports is asked for, and nothing is asked for that it does not import; extras
    are what some of it can do without"""
    project = PYPROJECT['project']
    run, extras = names(project['dependencies']), project['optional-dependencies']
    asked = {MODULES.get(n, n) for n in run - INDIRECT}
    optional = {'ray', 'tensorboard', 'resvg_py', 'IPython', 'matplotlib_inline',
                'anywidget'}
    assert imported((ROOT/'clipprompt').glob('*.py')) - optional == asked
    assert {'ray', 'tensorboard', 'resvg_py', 'anywidget'} <= names(extras['dev'])
    for extra in ('ray', 'tensorboard', 'pretrain', 'live', 'book'):
        assert set(extras[extra]) <= set(extras['dev'])


def test_assets():
    "A checkout, an editable install and a wheel all find what the book ships"
    folder = assets()
    assert isinstance(folder, Path) and folder.is_dir()
    assert list(folder.rglob('*.safetensors')) and list(folder.rglob('*.csv'))


def test_types_are_told():
    "py.typed says that the annotations are meant for users; it has to come with the package"
    assert (ROOT/'clipprompt'/'py.typed').is_file()
    assert 'py.typed' in PYPROJECT['tool']['setuptools']['package-data']['clipprompt']


def test_python_m_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['clipprompt', '--version'])
    with pytest.raises(SystemExit) as e:
        runpy.run_module('clipprompt', run_name='__main__', alter_sys=True)
    assert not e.value.code
    assert capsys.readouterr().out == f'clipprompt {clipprompt.__version__}\n'


@pytest.mark.stress
def test_the_wheel_has_the_package_the_data_and_nothing_else(tmp_path):
    pytest.importorskip('setuptools', '77')
    source = tmp_path/'source'   # a build leaves files where it is made
    for name in ('clipprompt', 'data'): shutil.copytree(ROOT/name, source/name)
    (source/'data'/'backbones').mkdir(exist_ok=True)
    (source/'data'/'backbones'/'another.safetensors').write_bytes(b'for clones only')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, source)
    args = ['-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index',
            '--wheel-dir', tmp_path, source]
    r = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    (wheel,) = tmp_path.glob('*.whl')
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in n}
    code = {f'clipprompt/{p.name}' for p in (ROOT/'clipprompt').glob('*.py*') if p.is_file()}
    data = {f'clipprompt/assets/{p.relative_to(ROOT/"data").as_posix()}'
            for p in (ROOT/'data').rglob('*') if p.is_file() and p.parent.name != 'backbones'}
    assert inside == code | data | {'clipprompt/py.typed'}

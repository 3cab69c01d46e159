"""What a user of the package relies on: it imports alone and offline, and its metadata agree."""
import configparser
import re
import subprocess
import sys
from pathlib import Path

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


def test_dependencies():
    run = names(PYPROJECT['project']['dependencies'])
    assert run >= {
        'torch', 'torchvision', 'open_clip_torch', 'safetensors', 'numpy', 'pandas', 'matplotlib',
        'seaborn', 'tqdm', 'typer', 'rich'
    }
    assert not run & {'nbdev', 'fastcore', 'execnb'}
    extras = PYPROJECT['project']['optional-dependencies']
    assert set(extras['pretrain']) | set(extras['tensorboard']) <= set(extras['dev'])


def test_assets():
    "A checkout, an editable install and a wheel all find what the book ships"
    folder = assets()
    assert isinstance(folder, Path) and folder.is_dir()
    assert list(folder.rglob('*.safetensors')) and list(folder.rglob('*.csv'))

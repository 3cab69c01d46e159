"""`import clipprompt as cp`: every name works, and the import itself costs nothing."""
import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
import torch

import clipprompt as cp
from clipprompt.methods import BOOK, RIVALS
from helpers import one_line, shapes

IMPORT = '''
import sys, json
from time import perf_counter
start = perf_counter()
import clipprompt as cp
seconds = perf_counter()-start
early = sorted({'torch', 'open_clip', 'pandas', 'matplotlib'} & sys.modules.keys())
cp.Recipe
print(json.dumps(dict(seconds=seconds, early=early, late='torch' in sys.modules,
                      version=cp.__version__)))
'''


def test_the_import_waits_for_nothing(tmp_path):
    "PyTorch comes with the first name that needs it"
    r = subprocess.run([sys.executable, '-c', IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    said = json.loads(r.stdout)
    assert said['early'] == [] and said['late'] and said['version'] == cp.__version__
    assert said['seconds'] < 2, said   # a full import takes several


def test_every_front_name_is_there():
    "And is the one that its module has"
    for name in cp.__all__:
        found = getattr(cp, name)
        home = importlib.import_module(found.__module__)
        assert home.__name__.startswith('clipprompt.') and getattr(home, name) is found
    assert {'load_backbone', 'load_dataset', 'as_dataset', 'fit', 'evaluate', 'compare', 'predict',
            'load', 'Recipe', 'Method', 'check_learner'} <= set(cp.__all__)
    assert set(cp.__all__) <= set(dir(cp))


def test_every_method_is_at_the_front():
    assert {cls.__name__ for cls in (*BOOK, *RIVALS)} <= set(cp.__all__)
    assert all(getattr(cp, cls.__name__) is cls for cls in (*BOOK, *RIVALS))


def test_no_module_shadows_a_front_name():
    "`import clipprompt.fit` would put a module where the function was"
    modules = {m.name for m in pkgutil.iter_modules(cp.__path__)}
    assert not modules & set(cp.__all__)


def test_a_name_that_nobody_knows():
    with pytest.raises(AttributeError) as e: cp.CoOpp
    one_line(e, 'CoOpp')


def test_from_a_folder_to_a_prediction(tmp_path):
    "The README's way, with nothing but the front"
    photos = shapes(tmp_path/'photos')
    data = cp.load_dataset(photos).few_shot(2)
    learner = cp.LinearProbe(cp.load_backbone(device='cpu'), data.classnames)
    cp.fit(learner, data, cp.LinearProbe.budget(), progress=False)
    assert cp.evaluate(learner, data).accuracy > 50
    learner.save(tmp_path/'p.safetensors')
    again = cp.load(tmp_path/'p.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(),
                                                 learner.state_dict().values(), strict=True))
    found = cp.predict(again, photos/'ring')
    assert len(found) == 6 and all(isinstance(p, cp.Prediction) for p in found)
    rows = cp.compare([cp.ZeroShot, cp.Method(cp.ZeroShot, dict(templates='{}'), label='names')],
                      tasks=[str(photos)], shots=[1], protocol_name='few-shot', progress=False)
    assert rows.method.tolist() == ['zero-shot', 'names']

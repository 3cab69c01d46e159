import os
import sys
from functools import lru_cache

import pytest

# Tests run in two processes (pyproject.toml), and towers as small as theirs gain little from a
# second thread. Set before PyTorch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')


def pytest_collection_modifyitems(items):
    "The longest tests first, so that no worker waits for another at the end"
    items.sort(key=lambda item: item.get_closest_marker('book') is None)


@pytest.fixture(scope='session', autouse=True)
def one_tokenizer():
    """Hundreds of tests build a small CLIP, and each would read CLIP's vocabulary of 49,408 words:
    a minute of the suite"""
    if 'open_clip' not in sys.modules: return (yield)   # a test of the site
    import open_clip
    with pytest.MonkeyPatch.context() as m:
        m.setattr(open_clip, 'SimpleTokenizer', lru_cache(open_clip.SimpleTokenizer))
        yield


# ---- small worlds, for every test file that does not make its own; imported late, because tests of
# the site do without PyTorch

@pytest.fixture(scope='module')
def clip():
    "A tiny CLIP in double precision"
    import torch
    from helpers import tiny_clip
    return tiny_clip(dtype=torch.float64)

@pytest.fixture(scope='module')
def half():
    "The same as it trains, in single precision"
    from helpers import tiny_clip
    return tiny_clip()

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A data set of drawn shapes"
    from clipprompt.sets import load_dataset
    from helpers import shapes
    return load_dataset(shapes(tmp_path_factory.mktemp('photos')))

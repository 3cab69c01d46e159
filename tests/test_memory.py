"Bytes counted on shapes"
import pytest
import torch

from clipprompt.memory import Alive, peak_bytes


def test_alive_counts_storages_once():
    old = torch.zeros(10, device='meta')
    with Alive(old) as alive:
        x = torch.zeros(1000, device='meta')
        views = [x[:10], x.view(10, 100), old[:5]]
        assert alive.now == alive.peak == 4000
        y = x + 1
        del x, views
        assert alive.now == 4000 and alive.peak == 8000
        del y
        assert alive.now == 0 and alive.peak == 8000


@pytest.mark.parametrize('name', ['ViT-S-32-alt', 'ViT-B-16-SigLIP'])
def test_chunks_and_recomputation_save(name):
    def step(**how): return peak_bytes(name, n_classes=40, batch=1, n_ctx=4, **how)['step']
    kept, less, least = (step(chunk=None, checkpoint=False), step(chunk=20), step(chunk=5))
    assert least < less < kept
    double = peak_bytes(name, 2, 1, 4, torch.float32)['weights']
    assert double == 2*peak_bytes(name, 2, 1, 4)['weights']

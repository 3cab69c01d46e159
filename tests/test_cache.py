"""Frozen features on disk: the same numbers, never a wrong file, never two writers in each other's
way. Half precision."""
import multiprocessing as mp
import time
import shutil

import pytest
import torch

from clipprompt import learner as learner_module
from clipprompt.cocoop import CoCoOp
from clipprompt.coop import CoOp
from clipprompt.pictures import test_transform, train_transform
from clipprompt.sets import load_dataset
from clipprompt.deep import IVLP, VPT, MaPLe
from clipprompt.files import keep
from clipprompt.learner import FP16_SCALE, Classifier, Recipe
from clipprompt.evaluation import encode, evaluate
from clipprompt.training import fit
from clipprompt.zeroshot import ZeroShot
from helpers import shapes, tiny_clip


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data')/'photos')

@pytest.fixture
def data(folder): return load_dataset(folder).few_shot(3)

@pytest.fixture
def clip(tmp_path):
    clip = tiny_clip()
    clip.cache = tmp_path/'cache'
    return clip

def files(clip): return sorted(clip.cache.rglob('*.safetensors'))

def never(): raise AssertionError('computed although it was kept')


def test_second_evaluation_reads(clip, data, monkeypatch):
    first = evaluate(ZeroShot(clip, data.classnames), data)
    # images, sentences
    assert {p.suffix for p in files(clip)} == {'.safetensors'} and len(files(clip)) == 2
    monkeypatch.setattr(learner_module.VisionTower, '__call__', lambda *_: never())
    monkeypatch.setattr(learner_module.TextTower, '__call__', lambda *_: never())
    second = evaluate(ZeroShot(clip, data.classnames), data)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.labels, second.labels)


def test_equal_to_no_cache(clip, data):
    "Training on kept views and evaluating on kept features changes nothing"
    bare, out = tiny_clip(), []
    # not kept, kept, read
    for backbone in (bare, clip, clip):
        l = CoOp(backbone, data.classnames, n_ctx=2)
        out.append((fit(l, data, Recipe(epochs=3, batch_size=4), views=2,
                        progress=False).losses, l.ctx.tokens.detach(), evaluate(l, data).logits))
    for losses, tokens, logits in out[1:]:
        assert losses == out[0][0]
        assert torch.equal(tokens, out[0][1])
        assert torch.equal(logits, out[0][2])
    # two views and the test set
    assert len(files(clip)) == 3


@pytest.mark.parametrize('damage',
                         ['cut', 'flipped', 'empty', 'garbage', 'other key', 'other tensors'])
def test_damaged_files_are_rebuilt(clip, data, damage, monkeypatch):
    learner = ZeroShot(clip, data.classnames)
    pictures = data.pictures('test', test_transform(clip))
    features, labels = encode(learner, pictures)
    (path,) = files(clip)
    good = path.read_bytes()
    if damage == 'other key':
        encode(learner, data.pictures('train', test_transform(clip)))
        shutil.copy(next(p for p in files(clip) if p != path), path)
    elif damage == 'other tensors':
        from safetensors import safe_open
        from safetensors.torch import save_file
        with safe_open(path, 'pt') as f: meta, ids = f.metadata(), f.get_tensor('ids')
        save_file(dict(rows=torch.zeros_like(features), ids=ids), path, meta)
    else:
        bad = dict(cut=good[:-7], flipped=good[:-1] + bytes([good[-1] ^ 1]), empty=b'',
                   garbage=b'no tensors here')
        path.write_bytes(bad[damage])
    again, _ = encode(learner, pictures)
    assert torch.equal(again, features)
    monkeypatch.setattr(learner_module.VisionTower, '__call__', lambda *_: never())
    # the new file is whole
    assert torch.equal(encode(learner, pictures)[0], features)


def test_what_the_key_depends_on(clip, data):
    "Other weights, precision, dtype, pictures, domain, transform or seed: another file"
    def count():
        encode(Classifier(clip, data.classnames), pictures, seed=seed)
        return len(files(clip))
    pictures, seed = data.pictures('test', test_transform(clip)), None
    assert count() == count() == 1
    pictures = data.pictures('train', test_transform(clip)); assert count() == 2
    pictures = data.pictures('train', train_transform(clip, (.5, 1.), True))
    seed = 1
    assert count() == 3
    seed = 2; assert count() == 4
    clip.precision = 'bf16'; assert count() == 5
    other = tiny_clip(seed=1); other.cache = clip.cache
    clip = other; assert count() == 6


def test_image_side_that_learns_is_never_kept(clip, data):
    for cls in (VPT, IVLP, MaPLe):
        l = cls(clip, data.classnames)
        a = evaluate(l, data).logits
        for p in l.parameters(): p.data += 1
        assert not torch.equal(a, evaluate(l, data).logits)
    # sentences only
    assert all('rows' not in p.read_bytes()[:2000].decode('latin1') for p in files(clip))
    before = files(clip)
    # its views are fixed pictures
    fit(VPT(clip, data.classnames), data, Recipe(epochs=1), views=2, progress=False)
    assert files(clip) == before


def _writer(folder, i, n):
    for k in range(n):
        x = keep(folder, dict(k=k), lambda: dict(x=torch.full((1000,), float(k))))['x']
        assert (x == k).all()

def exit_codes(target, args):
    "Of one process for each entry of `args`"
    if 'fork' not in mp.get_all_start_methods(): pytest.skip('forks')
    ctx = mp.get_context('fork')   # nothing is imported again
    ps = [ctx.Process(target=target, args=a) for a in args]
    for p in ps: p.start()
    for p in ps: p.join()
    return [p.exitcode for p in ps]


def test_processes_share_a_folder(tmp_path):
    assert exit_codes(_writer, [(tmp_path, i, 40) for i in range(3)]) == [0]*3
    # and no temporary file left
    assert len([p for p in tmp_path.iterdir() if p.suffix != '.lock']) == 40


def _maker(folder, name, others):
    (folder/name).touch()
    def make():
        (folder/f'made by {name}').touch()
        while not all((folder/o).exists() for o in others): time.sleep(.001)   # they are at it
        return dict(x=torch.ones(3))
    assert keep(folder/'cache', dict(k=1), make)['x'].sum() == 3

def test_one_computes_and_the_others_wait(tmp_path):
    assert exit_codes(_maker, [(tmp_path, name, 'abc') for name in 'abc']) == [0]*3
    assert len(list(tmp_path.glob('made by *'))) == 1


def test_unwritable_cache_says_so(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='cannot write .*choose a folder'):
        keep(tmp_path/'file'/'cache', dict(a=1), lambda: dict(x=torch.zeros(1)))


def test_views_are_recorded(data):
    clip = tiny_clip()
    fresh, fixed = [fit(CoOp(clip, data.classnames, n_ctx=2), data, Recipe(epochs=2, batch_size=4),
                        views=v, progress=False) for v in (None, 2)]
    assert fresh.views is None
    assert fixed.views == 2 == fixed.recipe.views
    assert fixed.precision == 'float32'


# ---- half precision ------------------------------------------------------------------------------

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('cls', [CoOp, CoCoOp, VPT, IVLP, MaPLe])
def test_half_precision(cls, precision, data):
    """The towers compute in half precision; parameters, logits, loss and gradients stay float32
    and near those of float32"""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y, grads = torch.tensor([0, 1, 2, 0]), {}
    for p in (None, precision):
        clip = tiny_clip(); clip.precision = p
        l = cls(clip, data.classnames)
        assert l(x).dtype == torch.float32
        loss = l.loss(x, y)
        opt = torch.optim.SGD(l.parameters(), 0.)
        assert l.training_step((x, y), opt).item() == pytest.approx(loss.item(), rel=1e-6)
        assert loss.dtype == torch.float32
        grads[p] = torch.cat([q.grad.flatten() for q in l.parameters()])
    assert grads[precision].dtype == torch.float32 and grads[precision].isfinite().all()
    cosine = torch.nn.functional.cosine_similarity(grads[None], grads[precision], dim=0)
    # not multiplied by FP16_SCALE
    assert cosine > .99 and .9 < grads[precision].norm()/grads[None].norm() < 1.1
    assert FP16_SCALE > 1


@pytest.mark.parametrize('precision,says', [
    (None, 'precision float32'), ('bf16', 'precision bf16'), ('fp16', 'precision fp16')])
def test_a_loss_that_is_not_finite_names_step_rate_and_precision(precision, says, data):
    clip = tiny_clip(); clip.precision = precision
    class Sick(CoOp):
        steps = 0
        def loss(self, images, labels):
            self.steps += 1
            return super().loss(images, labels)*(float('nan') if self.steps == 3 else 1)
    l = Sick(clip, data.classnames, n_ctx=2)
    with pytest.raises(
            FloatingPointError,
            match=f'epoch 2, step 1: the loss is nan at learning rate 0.05 and {says}') as e:
        fit(l, data, Recipe(lr=.05, epochs=4, batch_size=6), progress=False)
    assert '\n' not in str(e.value) and l.ctx.tokens.isfinite().all()


def test_unknown_precision():
    from clipprompt.backbone import load_backbone
    with pytest.raises(ValueError, match="unknown precision 'int8'; use 'bf16', 'fp16'"):
        load_backbone(precision='int8')

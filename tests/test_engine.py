"""What feeds and steers training: workers, recipes, hooks, selection, features by picture."""
import copy
import math
import multiprocessing
import pickle
from dataclasses import asdict, replace

import pytest
import torch

from clipprompt.coop import CoOp
from clipprompt.deep import VPT
from clipprompt.evaluation import Evaluation, encode, evaluate, frozen_features
from clipprompt.hooks import Average, Hook, Lines
from clipprompt.learner import Classifier, PromptLearner, Recipe
from clipprompt.metaprompt import MetaPrompt
from clipprompt.pictures import Augmented, mixed, normalised, train_transform
from clipprompt.pictures import test_transform as to_test
from clipprompt.sets import load_dataset
from clipprompt.steps import Collecting, Feed, lr_at, optimizer_of
from clipprompt.training import fit
from helpers import one_line, shapes, tiny_clip

RECIPE = Recipe(lr=.05, epochs=3, batch_size=4)


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return load_dataset(shapes(tmp_path_factory.mktemp('data')/'photos'))


@pytest.fixture(scope='module')
def few(photos): return replace(photos.few_shot(3), val=photos.test)


def trained(clip, data, recipe=RECIPE, cls=CoOp, seed=0, **how):
    learner = cls(clip, data.classnames, **(dict(n_ctx=2) if cls is CoOp else {}))
    report = fit(learner, data, recipe, seed, progress=False, **how)
    return report, [p.detach().clone() for p in learner.parameters()]


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a[1], b[1], strict=True))


# ---- workers -------------------------------------------------------------------------------------

@pytest.mark.parametrize('cls,recipe', [
    (CoOp, RECIPE), (VPT, replace(RECIPE, views=2)), (CoOp, replace(RECIPE, views=2)),
    (VPT, replace(RECIPE, randaugment=(2, 9), crop_scale=(.3, .9), flip=False))])
def test_their_number_changes_no_bit(cls, recipe, clip, few):
    alone, helped = (trained(clip, few, recipe, cls, workers=n) for n in (0, 2))
    assert same(alone, helped) and alone[0].losses == helped[0].losses
    assert not same(alone, trained(clip, few, recipe, cls, seed=1))


def test_a_picture_is_a_function_of_seed_epoch_and_picture(clip, photos, tmp_path):
    "Not of its place in a draw, nor of the folder's name"
    def image(data, path, seed=0, epoch=1):
        pictures = data.pictures('train', train_transform(clip, raw=True))
        at = [i.path for i in data.train].index(str(path))
        return Augmented(pictures, seed)[epoch, at][0]
    path = photos.few_shot(1).train[2].path
    whole, drawn = photos, photos.few_shot(2)
    drawn = replace(drawn, train=[i for i in photos.few_shot(3).train if i.path == path]*2)
    assert torch.equal(image(whole, path), image(drawn, path))
    assert image(whole, path).dtype == torch.uint8
    for other in (dict(seed=1), dict(epoch=2)):
        assert not torch.equal(image(whole, path), image(whole, path, **other))
    moved = load_dataset(shapes(tmp_path/'elsewhere'))
    there = next(i.path for i in moved.train if i.path.endswith(path[path.index('photos')+6:]))
    assert torch.equal(image(whole, path), image(moved, there))


def test_as_many_views_as_epochs_are_fresh_augmentation(clip, few):
    assert same(trained(clip, few, RECIPE, VPT), trained(clip, few, replace(RECIPE, views=3), VPT))


def test_seeds_of_any_size_mix():
    seen = {mixed(a, b) for a in (0, 1, -1, 2**70) for b in range(50)}
    assert len(seen) == 200 and all(0 <= s < 2**64 for s in seen)


def test_workers_on_a_platform_that_cannot_fork(clip, few, monkeypatch):
    monkeypatch.setattr(multiprocessing, 'get_start_method', lambda *_: 'spawn')
    odd = replace(few, domain=lambda image: image)
    with pytest.raises(ValueError) as e: trained(clip, odd, cls=VPT, workers=2)
    one_line(e, 'workers=2', 'use workers=0')
    pictures = few.pictures('train', to_test(clip))
    again = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(again[3][0], pictures[3][0]) and not again.data.train
    assert again.fingerprint == pictures.fingerprint


def test_bits_become_the_floats_of_the_reference(clip, few):
    bits = few.pictures('test', to_test(clip, raw=True))[1][0]
    floats = few.pictures('test', to_test(clip))[1][0]
    assert bits.dtype == torch.uint8
    assert torch.equal(normalised(bits, clip), floats)
    assert normalised(floats, clip) is floats


# ---- features by picture -------------------------------------------------------------------------

def test_another_draw_encodes_only_new_pictures(photos, tmp_path, monkeypatch):
    clip = tiny_clip()
    clip.cache = tmp_path
    learner, made = Classifier(clip, photos.classnames), []
    frozen_image = Classifier.frozen_image
    monkeypatch.setattr(Classifier, 'frozen_image',
                        lambda self, x, **kw: (made.append(1), frozen_image(self, x, **kw))[1])
    def features(data, seed=1):
        pictures = data.pictures('train', train_transform(clip, raw=True))
        return frozen_features(learner, pictures, seed, epoch=2, raw=True)
    whole = features(photos)
    assert made and not torch.allclose(whole.norm(dim=-1), torch.ones(len(whole)))
    made.clear()
    for draw in (1, 2):
        data = photos.few_shot(2, draw)
        places = [photos.train.index(i) for i in data.train]
        assert torch.equal(features(data), whole[places])
    assert not made and not torch.equal(features(photos, seed=2), whole) and made


def test_a_feature_does_not_depend_on_its_company(photos):
    clip = tiny_clip()
    pictures = photos.pictures('train', to_test(clip, raw=True))
    alone = replace(photos, train=photos.train[5:6]).pictures('train', to_test(clip, raw=True))
    learner = Classifier(clip, photos.classnames)
    assert torch.equal(encode(learner, pictures)[0][5:6], encode(learner, alone)[0])


# ---- recipes -------------------------------------------------------------------------------------

def test_recipes_are_data():
    recipe = Recipe(optimizer='adamw', groups={'ctx': dict(lr=.1)}, crop_scale=[.2, 1],
                    randaugment=(2, 9), betas=[.8, .9])
    assert Recipe(**asdict(recipe)) == recipe and recipe.crop_scale == (.2, 1)


@pytest.mark.parametrize('wrong,says', [
    (dict(optimizer='sdg'), ("unknown optimizer 'sdg'", 'did you mean sgd')),
    (dict(select='best'), ("unknown select 'best'", 'best_on')),
    (dict(lr='fast'), ('lr must be a number', "'fast'")),
    (dict(epochs=-1), ('epochs must be at least 0, not -1',)),
    (dict(batch_size=0), ('batch_size must be at least 1',)),
    (dict(accumulate=0), ('accumulate must be at least 1',)),
    (dict(lr=float('nan')), ('lr must be at least 0, not nan',)),
    (dict(patience=2), ('patience', "select='best_on_val'"))])
def test_recipes_that_make_no_sense(wrong, says):
    with pytest.raises(ValueError) as e: Recipe(**wrong)
    one_line(e, *says)


@pytest.mark.parametrize('name', ['adam', 'adamw', 'sgd'])
def test_the_optimiser_is_torchs_own(name, clip, few):
    "Three steps by hand, with the same batches"
    recipe = Recipe(lr=.01, epochs=3, batch_size=12, optimizer=name, betas=(.8, .95), eps=1e-6,
                    weight_decay=.02, schedule='constant', warmup_epochs=0)
    _, (tokens,) = trained(clip, few, recipe)
    learner = CoOp(clip, few.classnames, n_ctx=2)
    how = dict(lr=.01, weight_decay=.02)
    opt = dict(sgd=lambda p: torch.optim.SGD(p, momentum=.9, **how),
               adam=lambda p: torch.optim.Adam(p, betas=(.8, .95), eps=1e-6, **how),
               adamw=lambda p: torch.optim.AdamW(p, betas=(.8, .95), eps=1e-6, **how))[name]
    opt, feed = opt(learner.parameters()), Feed(learner, few, recipe, 0, 1)
    for epoch in (1, 2, 3):
        for batch in feed.epoch(epoch):
            opt.zero_grad()
            learner.loss(*batch).backward()
            opt.step()
    assert torch.equal(tokens, learner.ctx.tokens)


def test_groups_have_rates_of_their_own(clip, few):
    class Two(CoOp):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = torch.nn.Parameter(torch.ones(()))
        def text_features(self): return self.scale*super().text_features()
    learner = Two(clip, few.classnames, n_ctx=2)
    recipe = replace(RECIPE, groups={'scale': dict(lr=.2, weight_decay=0.)}, warmup_epochs=0)
    rates = []
    class Rates(Hook):
        def before_epoch(self, run, epoch): pass
        def after_step(self, run, step):
            rates.append([(g['lr'], g['weight_decay']) for g in run.optimizer.param_groups])
    fit(learner, few, recipe, progress=False, hooks=[Rates()])
    expect = [[(lr_at(recipe, e), 5e-4), (lr_at(recipe, e, lr=.2), 0.)]
              for e in (1, 2, 3) for _ in range(3)]
    assert rates == expect and rates[0] == [(.05, 5e-4), (.2, 0.)]
    with pytest.raises(ValueError) as e:
        optimizer_of(learner, replace(recipe, groups=dict(scael=dict(lr=1.))))
    one_line(e, "'scael'", 'did you mean scale')


def test_clipping_bounds_the_gradient_of_a_step(clip, few):
    norms = []
    class Norms(Hook):
        def after_step(self, run, step):
            grads = [p.grad.flatten() for p in run.learner.parameters()]
            norms.append(torch.cat(grads).norm().item())
    trained(clip, few, replace(RECIPE, clip_norm=1e-3), hooks=[Norms()])
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


def test_collected_batches_are_one_large_batch(clip, few):
    "The mean of three quarters of a batch is the batch; a rest is not lost"
    learner = CoOp(clip, few.classnames, n_ctx=2)
    one, three = copy.deepcopy(learner.state_dict()), []
    batch = next(iter(Feed(learner, few, replace(RECIPE, batch_size=12), 0, 1).epoch(1)))
    for n, flush in ((1, False), (3, False), (5, True)):
        learner.load_state_dict(one)
        opt = Collecting(torch.optim.SGD(learner.parameters(), .1), n)
        for part in zip(*(t.chunk(min(n, 3)) for t in batch)): learner.training_step(part, opt)
        if flush: opt.flush()
        three.append(learner.ctx.tokens.detach().clone())
    torch.testing.assert_close(three[1], three[0])
    torch.testing.assert_close(three[2], three[0])
    with pytest.raises(ValueError) as e:
        trained(clip, few, replace(RECIPE, accumulate=2), MetaPrompt)
    one_line(e, 'metaprompt takes steps of its own', 'accumulate at 1')


def test_a_linear_warm_up_and_rates_by_step(clip, few):
    recipe = Recipe(lr=.1, epochs=4, batch_size=4, warmup='linear', warmup_epochs=2, warmup_lr=.02,
                    per='step')
    seen = []
    class Rates(Hook):
        def after_step(self, run, step): seen.append(run.optimizer.param_groups[0]['lr'])
    trained(clip, few, recipe, hooks=[Rates()])
    ramp = [.02 + .08*i/6 for i in range(6)]
    assert seen[:6] == pytest.approx(ramp) and seen[6] == pytest.approx(.1)
    assert len(seen) == 12 and all(a > b for a, b in zip(seen[6:], seen[7:]))


# ---- selection and hooks -------------------------------------------------------------------------

class Scores(Hook):
    "Parameters after each epoch"
    def __init__(self): self.params = []
    def after_epoch(self, run, epoch):
        self.params.append([p.detach().clone() for p in run.learner.parameters()])


def test_best_on_val_keeps_the_best_epoch(clip, few, monkeypatch):
    from clipprompt import hooks
    planned = iter([10., 40., 30., 40., 20.])
    splits = []
    def scored(learner, data, split):
        splits.append(split)
        return type('E', (), dict(accuracy=next(planned)))
    monkeypatch.setattr(hooks, 'evaluate', scored)
    every = Scores()
    recipe = replace(RECIPE, epochs=9, select='best_on_val', patience=3)
    report, params = trained(clip, few, recipe, hooks=[every])
    assert report.scores == [10., 40., 30., 40., 20.] and splits == ['val']*5
    assert report.epochs == 5                    # three epochs no better than the second
    assert torch.equal(params[0], every.params[1][0])


def test_selecting_needs_validation_pictures(clip, few):
    with pytest.raises(ValueError) as e:
        trained(clip, replace(few, val=[]), replace(RECIPE, select='best_on_val'))
    one_line(e, 'no validation pictures', "leave select at 'last'")


def test_a_run_that_stopped_early_stays_stopped(clip, few, tmp_path):
    recipe = replace(RECIPE, lr=0., epochs=8, select='best_on_val', patience=2)
    first, a = trained(clip, few, recipe, checkpoint=tmp_path/'c')
    again, b = trained(clip, few, recipe, checkpoint=tmp_path/'c')
    assert first.epochs == again.epochs == 3 and again.scores == first.scores
    assert torch.equal(a[0], b[0])


def test_the_average_of_epochs(clip, few):
    every = Scores()
    weight = lambda epoch, epochs: epoch if epoch < epochs else 0
    _, params = trained(clip, few, hooks=[every, Average(weight)])
    a, b, _ = (p[0] for p in every.params)
    torch.testing.assert_close(params[0], (a+2*b)/3)
    with pytest.raises(ValueError) as e: trained(clip, few, hooks=[Average(lambda *_: 0)])
    one_line(e, 'no epoch has a weight')


class Stop(Hook):
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, run, epoch):
        if epoch == self.epoch: raise KeyboardInterrupt


@pytest.mark.parametrize('recipe', [
    dict(optimizer='adamw', lr=.01), dict(select='best_on_val'), dict(views=2, per='step'),
    dict(accumulate=2, clip_norm=.1)], ids=str)
@pytest.mark.parametrize('workers', [0, 1])
def test_everything_is_in_the_checkpoint(recipe, workers, clip, few, tmp_path):
    recipe = replace(RECIPE, epochs=4, **recipe)
    whole = trained(clip, few, recipe, hooks=[Average()], workers=workers)
    path = tmp_path/'c'
    class Later(Stop):
        def before_epoch(self, run, epoch):
            if epoch == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        trained(clip, few, recipe, hooks=[Average(), Later(9)], checkpoint=path)
    resumed = trained(clip, few, recipe, hooks=[Average()], checkpoint=path)
    assert same(whole, resumed) and whole[0].losses == resumed[0].losses
    assert whole[0].scores == resumed[0].scores
    with pytest.raises(ValueError) as e: trained(clip, few, recipe, checkpoint=path)
    one_line(e, 'belongs to another run: hooks differs')


def test_hooks_are_told_in_order(clip, few):
    told = []
    class Told(Hook):
        def __init__(self): pass
    for name in ('start', 'before_epoch', 'after_step', 'after_epoch', 'finish', 'close'):
        setattr(Told, name, lambda self, *args, name=name: told.append((name, *args[1:])))
    trained(clip, few, replace(RECIPE, epochs=1), hooks=[Told()])
    steps = [('after_step', s) for s in (1, 2, 3)]
    assert told == [('start',), ('before_epoch', 1), *steps, ('after_epoch', 1), ('finish',),
                    ('close',)]


def test_lines_where_no_bar_can_move(clip, few, capsys):
    trained(clip, few, hooks=[Lines()])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith('coop: epoch 2 of 3, loss ')
    learner = CoOp(clip, few.classnames, n_ctx=2)
    fit(learner, few, RECIPE)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_loop_waits_for_the_device_once_an_epoch(clip, few, monkeypatch):
    waits = []
    for name in ('item', '__bool__', '__float__', 'tolist'):
        was = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, was=was, name=name: (
            waits.append(name) if self.is_floating_point() else None, was(self))[1])
    class Count(Hook):
        def before_epoch(self, run, epoch): waits.clear()
        def after_epoch(self, run, epoch): seen.append(list(waits))
    seen = []
    trained(clip, few, replace(RECIPE, views=1), hooks=[Count()])
    assert seen[1:] == [['item'], ['item']], seen


def test_other_classes_are_refused(clip, few):
    with pytest.raises(ValueError) as e: fit(CoOp(clip, ['a', 'b'], n_ctx=2), few, RECIPE)
    one_line(e, 'differ in their classes', 'for_classes(data.classnames)')


# ---- evaluation ----------------------------------------------------------------------------------

def test_streamed_scores_are_those_of_all_logits(clip, few):
    learner = CoOp(clip, few.classnames, n_ctx=2)
    kept, streamed = evaluate(learner, few, batch_size=3), evaluate(learner, few, logits=False)
    whole = Evaluation.of(kept.logits, kept.labels)
    for e in (streamed, whole):
        assert torch.equal(e.rank, kept.rank) and torch.equal(e.hits, kept.hits)
        assert e.accuracy == kept.accuracy == e.top(1)
    order = kept.logits.argsort(-1, descending=True)
    for k in (1, 2, 3):
        right = (order[:, :k] == kept.labels[:, None]).any(-1).double().mean().item()
        assert kept.top(k) == pytest.approx(100*right)
    with pytest.raises(ValueError) as e: streamed.logits
    one_line(e, 'were not kept', 'logits=True')


def test_logits_that_are_not_finite_are_said(clip, few):
    learner = CoOp(clip, few.classnames, n_ctx=2)
    learner.ctx.tokens.data.fill_(float('nan'))
    with pytest.raises(ValueError) as e: evaluate(learner, few)
    one_line(e, 'coop gives logits that are not finite')


def test_prompts_survive_a_loss_that_is_not_finite(clip, few):
    class Sick(CoOp):
        def loss(self, *batch):
            self.seen = getattr(self, 'seen', 0)+1
            return super().loss(*batch)*(float('inf') if self.seen > 4 else 1)
    learner, every = Sick(clip, few.classnames, n_ctx=2), Scores()
    with pytest.raises(FloatingPointError) as e:
        fit(learner, few, RECIPE, progress=False, hooks=[every])
    one_line(e, 'epoch 2, step 2: the loss is inf')
    assert torch.equal(learner.ctx.tokens, every.params[0][0])


def test_prepare_is_called_once_by_fit(clip, few):
    class Looks(CoOp):
        looked = 0
        def prepare(self, data): self.looked += len(data.train)
    assert PromptLearner.prepare(Looks(clip, ['a'], n_ctx=1), few) is None
    learner = Looks(clip, few.classnames, n_ctx=2)
    fit(learner, few, RECIPE, progress=False)
    assert learner.looked == 12


# ---- other people's data -------------------------------------------------------------------------

def test_any_data_set_of_images_and_labels(clip, few):
    "The same pixels and order, the same prompts; class names are asked for"
    pictures = few.pictures('train', lambda image: image)
    class Pairs(torch.utils.data.Dataset):
        def __len__(self): return len(pictures)
        def __getitem__(self, i): return pictures[i]
    learner = CoOp(clip, few.classnames, n_ctx=2)
    report = fit(learner, Pairs(), RECIPE, progress=False, classnames=few.classnames)
    assert report.epochs == 3 and learner.ctx.tokens.isfinite().all()
    scores = evaluate(learner, Pairs(), classnames=few.classnames)
    assert torch.equal(scores.logits, evaluate(learner, few, 'train').logits)
    for call in (fit, evaluate):
        with pytest.raises(ValueError) as e: call(learner, Pairs())
        one_line(e, 'Pairs', 'classnames=[...]')


# ---- counted steps -------------------------------------------------------------------------------

class Steps(Hook):
    "The rate of each step"
    def __init__(self): self.rates = []
    def after_step(self, run, step): self.rates.append(run.optimizer.param_groups[0]['lr'])

@pytest.mark.parametrize('steps', [1, 3, 6, 7])
def test_a_recipe_may_count_steps(clip, few, steps):
    "As many as were asked for, and the cosine ends with them; 12 pictures are 3 steps of 4"
    recipe = Recipe(lr=.05, steps=steps, batch_size=4, per='step', warmup_epochs=0, final_lr=1e-3)
    hook = Steps()
    report, _ = trained(clip, few, recipe, hooks=[hook])
    want = [1e-3 + .5*(.05-1e-3)*(1+math.cos(math.pi*i/steps)) for i in range(steps)]
    assert hook.rates == pytest.approx(want, rel=1e-9)
    assert len(report.losses) == -(-steps//3) and report.recipe == recipe
    assert all(math.isfinite(loss) for loss in report.losses)


def test_steps_that_fill_epochs_are_these_epochs(clip, few):
    recipe = Recipe(lr=.05, steps=6, batch_size=4, per='step')
    epochs = replace(recipe, steps=None, epochs=2)
    assert same(trained(clip, few, recipe), trained(clip, few, epochs))
    for wrong in (dict(steps=0), dict(final_lr=-1)):
        with pytest.raises(ValueError) as e: Recipe(**wrong)
        one_line(e, 'must be at least')

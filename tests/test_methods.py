"All methods by name, class or plug-in: settings, budgets, files, looks; one training for all."
import json
import warnings
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from clipprompt import methods as module, protocols
from clipprompt.backbone import assets, load_backbone
from clipprompt.check import check_learner
from clipprompt.coop import CoOp
from clipprompt.data import DataSet
from clipprompt.figures import LOOK
from clipprompt.learner import PromptLearner, Recipe
from clipprompt.methods import (BOOK, RIVALS, find_class, find_method, load, look, methods,
                                settings_of)
from clipprompt.prompts import AUTO
from clipprompt.protocols import Method, arguments, protocol
from clipprompt.records import mark_of, run_id
from clipprompt.runs import grid
from clipprompt.sets import find_data, load_dataset
from clipprompt.sweep import sweep
from clipprompt.training import fit
from helpers import one_line, shapes, tiny_clip
from strangers import Mine


@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Called as a public set whose sentence is another than the usual one"
    return shapes(tmp_path_factory.mktemp('data')/'eurosat')


@pytest.fixture(scope='module')
def data(folder): return load_dataset(folder)


# ---- one training, whoever asks for it -----------------------------------------------------------

@pytest.mark.parametrize('name', [cls.method for cls in (*BOOK, Mine)])
def test_by_hand_by_method_and_by_sweep_the_same_bits(name, clip, folder, data, monkeypatch):
    what = Mine if name == 'mine' else name
    m = find_method(what, protocol_name='few-shot', shots=2, hparams=dict(epochs=1))
    few = data.few_shot(2)
    seeded = dict(seed=1) if 'seed' in arguments(m.cls) else {}
    by_hand = m.cls(clip, few.classnames, **(m.hparams or {}), **seeded)
    fit(by_hand, few, m.recipe, 1, progress=False)
    by_method = m.train(clip, few, 1, m.recipe)
    left, evaluate = [], protocols.evaluate
    monkeypatch.setattr(protocols, 'evaluate', lambda learner, *args, **kwargs:
                        (left.append(learner), evaluate(learner, *args, **kwargs))[1])
    swept = sweep(grid([what], [str(folder)], ['few-shot'], [2], [1], epochs=1), backbone=clip,
                  progress=False)
    assert not swept.failed
    for other in (by_method, *left):
        assert other.hparams == by_hand.hparams
        ours, theirs = by_hand.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert len(left) == 1


# ---- names, classes, plug-ins --------------------------------------------------------------------

def test_the_books_come_first_and_a_copy_changes_nothing():
    assert list(methods())[:len(BOOK)] == [cls.method for cls in BOOK]
    methods()['mine'] = Mine
    assert methods().get('mine') is not Mine


class Impostor(CoOp):
    "Has the name of another"


@pytest.fixture
def installed(monkeypatch):
    "Entry points as if packages had declared them"
    def install(*values):
        entries = [EntryPoint(f'e{i}', value, 'clipprompt.methods')
                   for i, value in enumerate(values)]
        monkeypatch.setattr(module, 'entry_points', lambda group: entries)
        module._found.cache_clear()
    yield install
    module._found.cache_clear()


def test_a_plug_in_is_a_method(installed, clip, tmp_path, data):
    installed('strangers:Mine')
    assert methods()['mine'] is Mine and list(methods())[-1] == 'mine'
    assert find_method('mine').recipe == Mine.budget()
    assert look('mine') == Mine.look
    Mine(clip, data.classnames, seed=3).save(tmp_path/'p')
    assert type(load(tmp_path/'p', clip)) is Mine


@pytest.mark.parametrize('value,says', [
    ('no_such_package:Mine', ['ModuleNotFoundError', 'no_such_package']),
    ('strangers:Gone', ['AttributeError', 'Gone']),
    ('strangers:F', ['no subclass of PromptLearner']),
    ('clipprompt.learner:PromptLearner', ['no name', 'method = ...']),
    ('test_methods:Impostor', ["the name 'coop' is taken by clipprompt.coop"])])
def test_a_broken_plug_in_is_named_and_the_rest_works(installed, value, says):
    installed(value, 'strangers:Mine')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        known = methods()
        methods()                          # told once
    assert len(caught) == 1
    said = str(caught[0].message)
    assert '\n' not in said and all(words in said for words in (value, 'left out', *says)), said
    assert list(known) == [*(cls.method for cls in (*BOOK, *RIVALS)), 'mine']


@pytest.mark.parametrize('what,says', [
    ('co-op', ["unknown method 'co-op'", 'did you mean coop']),
    (7, ['subclass of PromptLearner', '7']), (DataSet, ['subclass of PromptLearner', 'DataSet'])])
def test_what_is_no_method(what, says):
    for ask in (find_class, find_method):
        with pytest.raises(ValueError) as e: ask(what)
        one_line(e, *says)
    with pytest.raises(ValueError) as e: find_method('coop', 'big')
    one_line(e, "unknown budget 'big'", 'book', 'paper')


def test_a_contract_that_a_stranger_fulfils(): check_learner(Mine)


@pytest.fixture(scope='module')
def table(folder):
    "The same pictures as two domains"
    files = sorted(folder.glob('*/*.png'))
    lines = [f'{p},{p.parent.name},{"ab"[i % 2]}' for i, p in enumerate(files)]
    (folder.parent/'t.csv').write_text('\n'.join(['path,label,domain', *lines]))
    return folder.parent/'t.csv'


@pytest.mark.parametrize('name,tested', [
    ('few-shot', 'accuracy'), ('base-to-new', 'base new h'), ('cross', 'accuracy source'),
    ('domain', 'accuracy')])
def test_a_stranger_in_every_protocol(name, tested, clip, data, table):
    here = find_data(f'{table}/b', 'domain') if name == 'domain' else data
    how = dict(targets=[find_data(f'{table}/a')]) if name == 'cross' else {}
    row = protocol(name)(Method(Mine, label='m'), clip, here, 1, 1, Mine.recipe(), **how)
    assert row['method'] == 'm' and row['trainable'] == 2*clip.embed_dim
    assert [s for s in protocols.SCORES if row[s] == row[s]] == [
        s for s in protocols.SCORES if s in tested.split()]


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize('pairs,hparams,changes', [
    (dict(n_ctx='4', lr='.01'), dict(n_ctx=4), dict(lr=.01)),
    (dict(n_ctx=4, betas=[.9, .99]), dict(n_ctx=4), dict(betas=[.9, .99])),
    (dict(csc='true', position='front'), dict(csc=True, position='front'), {}),
    (dict(ctx_init='4', lr='1'), dict(ctx_init='4'), dict(lr=1)),
    (dict(betas='.9,.99', clip_norm='null'), {}, dict(betas=(.9, .99), clip_norm=None)),
    (dict(groups="{'ctx': {'lr': .1}}", flip='False'), {},
     dict(groups={'ctx': {'lr': .1}}, flip=False))])
def test_settings_are_read_as_their_types_ask(pairs, hparams, changes):
    assert settings_of(CoOp, pairs) == (hparams, changes)
    assert settings_of(CoOp, list(pairs.items())) == (hparams, changes)


@pytest.mark.parametrize('pairs,says', [
    (dict(n_ctxs=4), ["coop has no setting 'n_ctxs'", 'did you mean n_ctx']),
    (dict(epoch=4), ["'epoch'", 'did you mean epochs']),
    (dict(n_ctx='four'), ['n_ctx must be a whole number', "'four'"]),
    (dict(n_ctx='4.5'), ['n_ctx must be a whole number']), (dict(n_ctx=True), ['whole number']),
    (dict(lr='fast'), ['lr must be a number']), (dict(csc='maybe'), ['True or False']),
    (dict(clip_norm='x'), ['clip_norm must be a number or None']), (dict(seed=1), ['--seed']),
    (dict(betas='1'), ['betas must be a list']), (dict(lr='('), ['lr must be a number'])])
def test_settings_that_are_none(pairs, says):
    with pytest.raises(ValueError) as e: settings_of(CoOp, pairs)
    one_line(e, *says)


def test_types_of_a_class_without_annotations():
    class Loose(PromptLearner):
        def __init__(self, clip, names, n=4, words=None, share:'float'=.5):
            super().__init__(clip, names)
    assert settings_of(Loose, dict(n='3', words='a b', share='.1'))[0] == dict(n=3, words='a b',
                                                                              share=.1)
    with pytest.raises(ValueError): settings_of(Loose, dict(n='x'))


def test_a_recipe_is_checked_too():
    for wrong in (dict(lr=-1), dict(optimizer='sdg'), dict(batch_size='0')):
        with pytest.raises(ValueError) as e: find_method('coop', hparams=wrong)
        one_line(e, *wrong)


# ---- budgets -------------------------------------------------------------------------------------

def test_what_is_given_holds():
    own = Method(CoOp, dict(n_ctx=2), Recipe(lr=.5), 'coop-2')
    assert find_method(own) == own
    more = find_method(own, hparams=dict(csc=True, epochs=3))
    assert more.hparams == dict(n_ctx=2, csc=True) and more.label == 'coop-2'
    assert (more.recipe.lr, more.recipe.epochs) == (.5, 3)
    filled = find_method(Method(CoOp))
    assert filled.hparams == CoOp.usual_hparams() and filled.recipe == CoOp.budget()
    assert find_method(Method(CoOp, {})).hparams is None


@pytest.mark.parametrize('cls', [cls for cls in BOOK if cls.recipe().epochs],
                         ids=lambda cls: cls.method)
def test_every_budget_is_the_affordable_recipe_with_what_tuning_chose(cls):
    "Rate, length and arguments are those of tuned.json; all else is the paper's, cut by the rule"
    method, cut, theirs = find_method(cls), cls.affordable(), cls.recipe('base-to-new', 16)
    chosen = json.loads((assets()/'tuned.json').read_text()).get(cls.method)
    if chosen is None:
        assert method.recipe == cut and method.hparams == (cls.cpu_hparams or None)
        return
    assert method.recipe == replace(cut, lr=chosen['lr'], epochs=chosen['epochs'],
                                    source=method.recipe.source)
    assert method.hparams == (chosen['hparams'] or None)
    assert chosen['epochs'] <= cut.epochs <= theirs.epochs
    assert (cut.views is None) == cls.learns_image
    if cls.learns_image: assert cut == theirs
    kept = replace(theirs, views=cut.views, batch_size=cut.batch_size, epochs=cut.epochs)
    assert cut == kept and (cls.drawn or cut.epochs == theirs.epochs)
    assert method.recipe.source.startswith(theirs.source)


def test_a_budget_of_steps_stays_one_of_steps():
    "Epochs of a small task are not epochs of a large one"
    chosen = json.loads((assets()/'tuned.json').read_text())['clip-lora']
    recipe = find_method('clip-lora').recipe
    assert 0 < recipe.steps == chosen['steps'] <= find_class('clip-lora').affordable().steps
    assert recipe.lr == chosen['lr']


def test_a_stranger_has_the_affordable_recipe():
    "Also one that inherits from a method of the book: its name is not in the table"
    class Mine(CoOp): method = 'mine'
    assert Mine.budget() == Mine.affordable() and Mine.usual_hparams() == Mine.cpu_hparams
    found = find_method(Mine)
    assert found.recipe == Mine.affordable() and found.recipe.lr == CoOp.recipe().lr


@pytest.mark.parametrize('name', ['zero-shot', 'zero-shot-best', 'linear-probe'])
def test_without_steps_no_setting_of_steps_counts(name):
    plain, longer = (find_method(name, hparams=h) for h in ({}, dict(epochs=7, lr=.3)))
    assert plain == longer and plain.recipe.epochs == 0


@pytest.mark.parametrize('method,protocol_name,dataset,hparams',
                         [('maple', 'cross', 'imagenet', dict(depth=3)),
                          ('maple', 'base-to-new', 'dtd', None),
                          ('metaprompt', 'domain', 'pacs', dict(n_ctx=4, n_visual=4)),
                          ('metaprompt', 'base-to-new', 'dtd', None),
                          ('coop', 'few-shot', 'dtd', None),
                          ('coop', 'cross', 'imagenet', dict(ctx_init=AUTO)),
                          ('variational-coop', 'base-to-new', 'oxford_pets', dict(samples=40)),
                          ('variational-cocoop', 'few-shot', 'ucf101', dict(samples=5))])
def test_the_papers_arguments(method, protocol_name, dataset, hparams):
    "A recipe alone is not the published setting"
    m = find_method(method, 'paper', protocol_name, 16, dataset)
    assert m.hparams == hparams
    name = {'cross': 'cross-dataset', 'domain': 'domain-generalisation'}.get(protocol_name,
                                                                             protocol_name)
    assert m.recipe == m.cls.recipe(name, 16, dataset) == m.planned(protocol_name, 16, dataset)


# ---- names of runs -------------------------------------------------------------------------------

def test_validation_pictures_count_where_they_choose(data):
    last, chosen = Recipe(), Recipe(select='best_on_val')
    few = replace(data, val=data.test[:3])
    other = replace(data, val=data.test[3:6])
    assert mark_of(few, last) == mark_of(other, last) == few.fingerprint
    assert mark_of(few, last, 'known') == 'known'
    assert mark_of(few, chosen) != mark_of(other, chosen) != mark_of(other, last)
    assert mark_of(few, chosen).startswith(few.fingerprint)


def test_a_label_makes_another_run(clip):
    def name(method): return run_id(method, Recipe(), 'few-shot', 'x', 1, 1, clip)
    names = {name(Method(Mine)), name(Method(Mine, label='a')), name(Method(CoOp, label='a')),
             name(Method(Mine, dict(strength=2.)))}
    assert len(names) == 4


def test_arguments_that_a_class_inherits():
    class Longer(Mine):
        def __init__(self, *args, power=2, **kwargs): super().__init__(*args, **kwargs)
    assert list(arguments(Longer)) == ['power', 'strength', 'words', 'seed']
    class Own(PromptLearner): method = 'own'
    assert not arguments(Own)


# ---- files and looks -----------------------------------------------------------------------------

def test_load_builds_the_backbone_that_the_file_asks_for(tmp_path):
    picto = load_backbone(device='cpu')
    CoOp(picto, ['cat', 'dog'], n_ctx=2).save(tmp_path/'p')
    again = load(tmp_path/'p', device='cpu', precision='bf16')
    assert again.backbone.fingerprint == picto.fingerprint and again.backbone.precision == 'bf16'
    assert not again.training


def test_prompts_of_a_method_that_is_not_here(clip, tmp_path):
    Mine(clip, ['cat', 'dog']).save(tmp_path/'p')
    with pytest.raises(ValueError) as e: load(tmp_path/'p', clip)
    one_line(e, "'mine', which is no method here", 'install the package', 'class')
    assert type(load(tmp_path/'p', clip, Mine)) is Mine
    with pytest.raises(ValueError) as e: load(tmp_path/'p', cls=Mine)
    one_line(e, 'was trained on tiny-0', 'unknown backbone')


def test_each_method_has_a_look_of_its_own():
    looks = [look(cls) for cls in BOOK]
    assert len(set(colour for colour, _ in looks)) == len(BOOK)
    assert looks == [LOOK[cls.method] for cls in BOOK]
    assert look('nobody') not in looks
    assert look(Mine) == look(Method(Mine, label='other')) == Mine.look

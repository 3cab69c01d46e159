"A comparison with a stranger in it."
import numpy as np
import pandas as pd
import pytest

from clipprompt import sweep as sweep_module
from clipprompt.backbone import load_backbone
from clipprompt.cards import CARDS, cards, facts, overview
from clipprompt.methods import look, methods, rerun
from clipprompt.protocols import Method
from clipprompt.records import read_records
from clipprompt.report import compare, plot, table
from clipprompt.runs import grid
from clipprompt.sweep import sweep
from helpers import one_line, shapes, tiny_clip
from strangers import Mine


# ---- a comparison --------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def clip(): return tiny_clip()


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return str(shapes(tmp_path_factory.mktemp('data')/'photos'))


@pytest.fixture
def little(photos, clip): # what all comparisons here share
    return dict(shots=[2], protocol_name='few-shot', tasks=[photos], backbone=clip, progress=False)


@pytest.fixture
def did(monkeypatch):
    "The runs that are really done"
    done, do = [], sweep_module._do
    monkeypatch.setattr(sweep_module, '_do', lambda run, *rest: (done.append(run), do(run, *rest)))
    return done


def test_a_class_stands_where_a_name_may(little, did):
    rows = compare([Mine, 'zero-shot'], [1, 2], **little)
    assert rows.method.tolist() == ['mine', 'zero-shot']*2 and rows.seed.tolist() == [1, 1, 2, 2]
    assert len(did) == 4
    assert table(rows).method.tolist() == ['mine', 'zero-shot']
    swept = sweep(grid([Mine, 'zero-shot'], little['tasks'], ['few-shot'], [2], [1, 2]),
                  backbone=little['backbone'], progress=False)
    assert swept.rows.run.tolist() == rows.run.tolist()
    assert swept.rows.hits_accuracy.tolist() == rows.hits_accuracy.tolist()


def test_two_settings_of_a_class_need_a_label(little):
    strong = Method(Mine, dict(strength=50.), label='mine-50')
    rows = compare([Mine, strong], **little)
    assert rows.method.tolist() == ['mine', 'mine-50'] and rows.learner.tolist()[1] == 'mine'
    assert rows.run.nunique() == 2 and rows.hits_accuracy.nunique() == 2
    colours = {look for line in plot(rows, [Mine, strong]).axes[0].collections
               for look in map(tuple, line.get_facecolor()[:, :3].round(2))}
    assert colours == {(.8, .2, .07)}
    with pytest.raises(ValueError) as e: compare([Mine, Method(Mine, dict(strength=2.))], **little)
    one_line(e, "two methods are called 'mine'", 'label=')


def test_settings_go_where_they_belong(little):
    rows = compare([Mine], hparams=dict(strength='2', lr=.5), epochs=1, select='best_on_test',
                   **little)
    rec = rows.iloc[0]
    assert rec.hparams == dict(strength=2.)
    assert (rec.recipe['lr'], rec.recipe['epochs'], rec.recipe['select']) == (.5, 1, 'best_on_test')
    with pytest.raises(ValueError) as e: compare([Mine], hparams=dict(strenght=2), **little)
    one_line(e, "mine has no setting 'strenght'", 'did you mean strength')


def test_what_a_folder_knows_is_not_run_again(little, did, tmp_path):
    first = compare([Mine], [1], out=tmp_path, **little)
    sweep(grid(['linear-probe'], little['tasks'], ['few-shot'], [2], [1]), tmp_path,
          backbone=little['backbone'], progress=False)
    for record in (tmp_path/'records').glob('*.json'):  # as a folder of an older version is
        if first.run[0] in record.name: record.unlink()
    both = compare(['zero-shot', Mine], [1], out=tmp_path, **little)
    assert [run.name for run in did] == ['mine', 'linear-probe', 'zero-shot']
    assert both.run.tolist()[1] == first.run[0]
    kept = pd.read_csv(tmp_path/'results.csv').method.tolist()
    assert kept == ['mine', 'zero-shot', 'linear-probe']
    assert {r['method'] for r in read_records(tmp_path)} == set(kept)


def test_a_run_that_fails_stops_no_other_and_is_told_as_it_was(little, did, tmp_path):
    class Fails(Mine):
        method = 'fails'
        def prepare(self, data): raise AttributeError('no such thing')
    with pytest.raises(AttributeError, match='no such thing') as e:
        compare([Fails, Mine], out=tmp_path, **little)
    assert [run.name for run in did] == ['fails', 'mine']   # once: another try would not help
    assert 'in prepare' in str(e.value.__cause__)           # where it happened
    assert pd.read_csv(tmp_path/'results.csv').method.tolist() == ['mine']
    with pytest.raises(ValueError) as e: compare([Mine], [1], **(little | dict(shots=[99])))
    one_line(e, '99 shots asked for')


def test_what_was_finished_is_in_the_table_of_a_stopped_comparison(little, tmp_path):
    class Stops(Mine):
        method = 'stops'
        def prepare(self, data): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): compare([Mine, Stops], out=tmp_path, **little)
    assert pd.read_csv(tmp_path/'results.csv').method.tolist() == ['mine']


def test_a_row_runs_again_with_its_class(photos):
    picto = load_backbone(device='cpu')
    rows = compare([Method(Mine, dict(strength=3.), label='mine-3')], shots=[2], tasks=[photos],
                   protocol_name='few-shot', backbone=picto, progress=False)
    rec = rows.iloc[0].to_dict()
    again = rerun(rec, Mine, device='cpu')
    assert (again['run'], again['method'], again['learner']) == (rec['run'], 'mine-3', 'mine')
    assert again['hits_accuracy'] == rec['hits_accuracy']
    with pytest.raises(ValueError) as e: rerun(rec)
    one_line(e, rec['run'], "'mine', which is no method here", 'class')


# ---- drawn ---------------------------------------------------------------------------------------

def test_unknown_methods_are_grey_and_can_be_told_apart():
    rows = pd.DataFrame([dict(task='t', method=m, shots=k, seed=1, accuracy=k)
                         for m in ('x', 'y', 'mine', 'coop') for k in (1, 2)])
    lines = plot(rows, [Mine]).axes[0].get_legend().legend_handles
    colours = [line.get_color() for line in lines]
    assert colours == [look('x')[0]]*2 + [Mine.look[0], look('coop')[0]]
    assert len({line.get_marker() for line in lines[:2]}) == 2


def test_a_stranger_does_not_disturb_the_cards(monkeypatch):
    from clipprompt import methods as module
    monkeypatch.setattr(module, '_found', lambda: methods_and_mine)
    assert 'mine' in methods()
    assert overview().count('<title') == len(CARDS)
    page = cards(facts(tiny_clip()))
    assert page.count('.card-method') == len(CARDS) and 'mine' not in CARDS


methods_and_mine = methods() | dict(mine=Mine)


def test_several_shots_make_a_curve():
    "One line per method through its means over seeds; with one number of shots a dot per seed"
    rows = pd.DataFrame([
        dict(task='t', method=m, shots=k, seed=s, accuracy=10*k + s)
        for m in ('coop', 'vpt')
        for k in (1, 2, 4)
        for s in (1, 2)
    ])
    # a probe has no new classes
    panels = plot(rows.assign(new=rows.accuracy.where(rows.method == 'coop'))).axes
    assert [ax.get_title(loc='left').split(': ')[1] for ax in panels] == ['new', 'accuracy']
    fig = plot(rows)
    ax, drawn = fig.axes[0], [line for line in fig.axes[0].lines if len(line.get_xdata())]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['coop', 'vpt']
    assert ax.get_xscale() == 'log'
    assert [line.get_color() for line in drawn] == [look('coop')[0], look('vpt')[0]]
    for line in drawn:
        assert line.get_xdata().tolist() == [1, 2, 4]
        assert line.get_ydata().tolist() == [11.5, 21.5, 41.5]
    ax = plot(rows[rows.shots == 2]).axes[0]
    assert ax.get_title(loc='left') == 't, 2 shots: accuracy'
    assert [t.get_text() for t in ax.get_yticklabels()] == ['coop', 'vpt']
    dots, bars = ax.collections, [line.get_xdata() for line in ax.lines]
    assert [sorted(d.get_offsets()[:, 0].tolist()) for d in dots] == [[21, 22]]*2
    assert [b[np.isfinite(b)].tolist() for b in bars] == [[21.5]]*2

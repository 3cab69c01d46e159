"The plan of the comparison: who runs where is fixed, and the shell does it."
from collections import Counter

import pandas as pd
import pytest

from clipprompt import cli_runs
from clipprompt.backbone import load_backbone
from clipprompt.data import SUITE
from clipprompt.evidence import stored
from clipprompt.methods import BOOK, find_method
from clipprompt.plan import FEW, NEWER, controls, expected, plan, yardstick
from clipprompt.runs import Run, planned
from helpers import refused, works

BOOK_NAMES = [cls.method for cls in BOOK]


def test_the_main_part_has_everything_and_headlines_need_nothing_else():
    main = plan()['main']
    cells = Counter((r.name, r.task.removeprefix('pictograms/'), r.seed) for r in main)
    wanted = {(m, t, s) for m in BOOK_NAMES for t in SUITE for s in (1, 2, 3)}
    assert set(cells) == wanted and set(cells.values()) == {1}
    assert all(r.protocol == 'base-to-new' and r.shots == 16 and r.curve for r in main)
    assert [r.seed for r in main] == sorted(r.seed for r in main)  # a whole seed before the next


def test_other_parts_change_one_thing():
    parts = plan()
    assert {r.halves for r in parts['halves']} == {1, 2}
    assert {r.name for r in parts['halves']} == {r.name for r in parts['shots']} == set(FEW)
    assert {r.pretrained for r in parts['backbones']} == {'seed1'}
    assert {r.name for r in parts['rivals']} == set(NEWER) and not set(NEWER) & set(BOOK_NAMES)
    assert len(parts['rivals']) == len(NEWER)*len(SUITE)*3
    assert {r.shots for r in parts['shots']} == {1, 2, 4, 8, 16}
    assert [r.protocol for r in parts['cross']+parts['domain']] == \
        ['cross']*len(FEW)+['domain']*len(FEW)
    every = [r for part in parts.values() for r in part]
    assert len(every) == len(set(every))
    for run in parts['controls'][:len(controls())]: planned(run)


def test_a_control_is_a_tuned_method_but_for_its_arguments():
    for m in controls():
        tuned = find_method(m.cls)
        if m.name in ('ensemble', 'coop-published'): continue
        assert m.recipe == tuned.recipe, m.name
        changed = {k for k, v in m.hparams.items() if (tuned.hparams or {}).get(k) != v}
        assert changed and m.name.startswith(m.cls.method)
    published = next(m for m in controls() if m.name == 'coop-published')
    assert published.recipe.lr == .002 and published.recipe.epochs == 200


@pytest.mark.parametrize('part', list(plan()))
def test_what_was_planned_is_what_is_stored(part):
    "No run more, none less, none twice"
    def told(task): return task.removeprefix('pictograms/')
    planned = Counter((r.name, told(r.task), r.protocol, r.shots, r.seed, r.halves,
                       r.pretrained or '') for r in plan()[part])
    columns = ['method', 'task', 'protocol', 'shots', 'seed', 'halves', 'pretrained']
    rows = stored(part)[columns].fillna('')
    assert Counter(rows.itertuples(index=False, name=None)) == planned


def test_expected_seconds_by_hand():
    def row(method, task, seconds, protocol='base-to-new'):
        return dict(method=method, protocol=protocol, task=task, shots=16, seconds=seconds)
    rows = pd.DataFrame([row('coop', 'tools', 10.), row('coop', 'tools', 20.),
                         row('coop', 'arrows', 60.), row('vpt', 'tools', 4., 'cross')])
    tools, other = Run('coop', 'pictograms/tools'), Run('coop', 'tools', shots=4)
    assert expected([tools, tools], rows) == 30
    assert expected([other], rows) == 30               # the method's mean
    assert expected([Run('vpt', 'tools')], rows, speed=2) == 2
    assert expected([Run('provp', 'tools')], rows) == pytest.approx((30+4)/2)
    assert 0 < yardstick(load_backbone(device='cpu')) < 60


def test_the_shell_does_the_plan_and_goes_on(tmp_path, monkeypatch):
    few = [Run('zero-shot', 'pictograms/tools'), Run('linear-probe', 'pictograms/tools')]
    monkeypatch.setattr(cli_runs, 'plan', lambda: dict(main=few[:1], controls=few[1:]))
    first = works('compare', '--suite', '--out', tmp_path)
    assert '2 runs, 0 done' in first.err
    rows = pd.read_csv(tmp_path/'results.csv')
    assert rows.method.tolist() == ['zero-shot', 'linear-probe']
    again = works('compare', '--suite', '--out', tmp_path)
    assert '2 runs, 2 done' in again.err
    assert pd.read_csv(tmp_path/'results.csv').run.tolist() == rows.run.tolist()


@pytest.mark.parametrize('option', [('--task', 'tools'), ('--seeds', '1'), ('--quick',),
                                    ('--methods', 'coop')], ids=lambda o: o[0])
def test_what_the_plan_decides_is_no_option(option):
    refused('compare', '--suite', *option, says=[option[0], 'leave it out'])


def test_ray_is_for_the_plan(): refused('compare', '--ray', 'local', says=['--suite', 'sweep'])

"""The speed chapter's measurements: equal results, rows as documented, errors of one line. Seconds
themselves are not judged here."""
import json

import pandas as pd
import pytest
import torch

import clipprompt.bench as module
from clipprompt.backbone import assets
from clipprompt.bench import (CASES, bench, bench_clip, bench_names, bench_scale, peaks, plot_speed,
                              products, speed_table)
from helpers import refused, works

KEYS = {'case', 'plain_s', 'fast_s', 'ratio', 'plain_mb', 'fast_mb', 'device'}
NAMED = [
    'coop-m16-c100', 'coop-m4-c100', 'coop-m16-c1000', 'cocoop-c50', 'variational-s10-c50',
    'ivlp-c50', 'maple-c50', 'vpt-deep', 'eval-cached'
]


@pytest.mark.parametrize('case', CASES)
def test_both_ways_give_the_same(case):
    "Features, logits and gradients of each case, and none of them is zero"
    steps = CASES[case].steps(bench_clip(True, 'cpu'), **CASES[case].sizes)
    fast, plain = steps['fast'](), steps.get('reference', steps['plain'])()
    assert len(fast) == len(plain) > 0
    for a, b in zip(fast, plain):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5*b.abs().max().item())


def test_a_difference_is_seen(monkeypatch):
    "A fast way that computes something else shows in the row's error"
    case = CASES['coop-m4-c100']
    def wrong(clip, **sizes):
        steps = case.steps(clip, **sizes)
        return steps | dict(fast=lambda: [t*1.01 for t in steps['fast']()])
    monkeypatch.setitem(CASES, 'wrong', module.Case(wrong, case.sizes, ''))
    monkeypatch.setattr(module, 'memory', lambda *_: dict(plain=None, fast=None))
    rows = bench(['wrong', 'coop-m4-c100'], quick=True, repeats=1, device='cpu', progress=False)
    assert rows.error[0] == pytest.approx(.01, rel=.05) and rows.error[1] < 1e-5
    assert list(speed_table(rows).plain_memory) == ['-', '-']


@pytest.mark.stress
def test_the_command_writes_documented_rows(tmp_path):
    r = works('bench', '--quick', '--cases', 'coop-m16-c100,vpt-deep', '--repeats', '2',
              '--device', 'cpu', '--out', tmp_path/'new'/'speed.json')
    rows = json.loads((tmp_path/'new'/'speed.json').read_text())
    assert [row['case'] for row in rows] == ['coop-m16-c100', 'vpt-deep']
    assert all(row['case'] in r.out for row in rows)
    for row in rows:
        assert KEYS <= set(row)
        assert row['plain_s'] > 0
        assert row['ratio'] == pytest.approx(row['plain_s']/row['fast_s'])
        assert len(row['plain_times']) == len(row['fast_times']) == 2 and row['error'] < 1e-5
    # 7,700 rows against some 400
    assert rows[0]['plain_flop'] > 12*rows[0]['fast_flop'] and rows[0]['ratio'] > 2
    assert rows[0]['plain_mb'] is None or rows[0]['plain_mb'] > 3*rows[0]['fast_mb']


def test_all_cases_of_the_book_exist():
    assert set(NAMED) <= set(CASES)
    assert len(set(bench_names(1000))) == 1000 and len(set(bench_names(7))) == 7


def test_stored_results_are_whole():
    "data/results-speed.json has a row for every case; the figure shows them"
    rows = pd.read_json(assets()/'results-speed.json')
    assert list(rows.case) == list(CASES) and (rows.error < 1e-4).all() and KEYS <= set(rows)
    assert len(plot_speed(rows).axes) == 2


def test_the_floor_is_the_products_of_a_step():
    "As many operations as the step's linear layers and nothing else, also in the towers"
    linear = torch.nn.Linear(8, 4)
    def step(): linear(torch.ones(3, 8, requires_grad=True)).relu().sum().backward()
    for step, share in ((step, (1, 1)), (CASES['vpt-deep'].steps(bench_clip(True, 'cpu'))['fast'],
                                         (.8, 1))):
        floor = products(step, torch.device('cpu'))
        with module.FlopCounterMode(display=False) as whole: step()
        with module.FlopCounterMode(display=False) as alone: floor()
        assert share[0] <= alone.get_total_flops()/whole.get_total_flops() <= share[1]


def test_rows_without_a_floor_can_be_shown():
    "Those of earlier versions"
    rows = pd.read_json(assets()/'results-speed.json').drop(columns='above_floor', errors='ignore')
    assert set(speed_table(rows).above_floor) == {'-'}
    assert speed_table(rows.assign(above_floor=1.234)).above_floor[0] == '1.23x'


def test_the_road_of_many_classes(tmp_path, monkeypatch):
    """Every step does what it says; evaluation of pictures x classes beyond the limit keeps no
    logits"""
    kept = []
    def spied(*args, **kwargs):
        kept.append(evaluate(*args, **kwargs).all_logits)
        return evaluate(*args, **kwargs)
    evaluate = module.evaluate
    monkeypatch.setattr(module, 'evaluate', spied)
    monkeypatch.setattr('clipprompt.evaluation.LOGITS', 100)
    road = module._road(module._empty_files(tmp_path, 60), 12)
    done = {name: step() for name, step in road.items()}
    assert list(done) == ['load', 'draw', 'base and new', 'fingerprint', 'bind', 'evaluate']
    assert len(done['fingerprint']) == 16 and kept == [None]
    with pytest.raises(ValueError, match='4 pictures to a class'): bench_scale(10, 5)


def test_stored_road_is_short():
    "100,000 pictures of 21,000 classes: seconds, and far less memory than all logits (8,400 MB)"
    road = pd.read_json(assets()/'results-scale.json')
    assert set(road['items']) == {100_000} and set(road.classes) == {21_000}
    assert (road.mb < 2000).all()


def test_memory_of_a_killed_process_is_unknown(monkeypatch):
    monkeypatch.setattr(
        module.subprocess, 'run',
        lambda *_, **__: type('Done', (), dict(returncode=-9, stdout='', stderr='')))
    assert peaks('vpt-deep') == dict(fast=None, plain=None)


@pytest.mark.parametrize('args,says', [
    (['--cases', 'coop-m16'], ["unknown case 'coop-m16'", 'coop-m16-c100']),
    (['--cases', ','], ['--cases is empty', 'at least one']),
    (['--quick', '--device', 'gpu'], ["device 'gpu'", 'use cpu']),
    (['--precision', 'half'], ["precision 'half'", 'bf16']),
    (['--out', '/proc/no/speed.json', '--quick'], ['cannot write', 'choose a folder']),
])
def test_errors_of_one_line(args, says): refused('bench', *args, says=says)

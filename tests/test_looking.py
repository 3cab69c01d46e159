"Looking: what changed, by definitions written out."
import pytest
import torch

from clipprompt.backbone import load_backbone
from clipprompt.coop import CoOp
from clipprompt.deep import VPT
from clipprompt.evaluation import Evaluation, evaluate
from clipprompt.figures import has_pixels
from clipprompt.looking import changed_classes, changes, looks_at, show_attention, show_changes
from clipprompt.map_dafe import MAPDAFE
from clipprompt.metaprompt import MetaPrompt
from clipprompt.sets import load_dataset
from clipprompt.zeroshot import ZeroShot
from helpers import one_line


@pytest.fixture(scope='module')
def clip(): return load_backbone(device='cpu')


@pytest.fixture(scope='module')
def data(): return load_dataset(task='tools')


@pytest.fixture(scope='module')
def two(clip, data):
    "A sentence, and one that misleads"
    return [evaluate(ZeroShot(clip, data.classnames, t), data) for t in ('{}', 'a red {} upside')]


def test_changes_are_all_that_differ_and_sorted(two):
    before, after = two
    fixed, ruined = changes(before, after)
    assert set(fixed) == set((after.hits & ~before.hits).nonzero().flatten().tolist())
    assert set(ruined) == set((before.hits & ~after.hits).nonzero().flatten().tolist())
    assert len(fixed)+len(ruined) > 4
    for places in (fixed, ruined):
        p = [e.logits.softmax(-1)[places, e.labels[places]] for e in two]
        assert (p[1]-p[0]).abs().diff().max() <= 0 if len(places) > 1 else True
    assert changes(after, before) == (ruined, fixed)
    short = Evaluation.of(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError) as e: changes(before, short)
    one_line(e, 'different pictures', 'the same split')


def test_the_figure_says_what_both_said(data, two):
    fig = show_changes(data, *two, ('one', 'two'), n=3)
    fixed, ruined = changes(*two)
    for line, places in ((fig.axes[:3], fixed), (fig.axes[3:], ruined)):
        first = list({data.test[i].label: i for i in reversed(places)}.values())[::-1]
        assert len({data.test[i].label for i in first}) == len(first)
        for ax, place in zip(line, sorted(first, key=places.index)):
            item = data.test[place]
            assert ax.get_title() == data.classnames[item.label]
            told = [data.classnames[e.predicted[place]] for e in two]
            assert ax.get_xlabel() == f'one: {told[0]}\ntwo: {told[1]}'
    assert has_pixels(fig)


def test_classes_by_hand(data, two):
    before, after = two
    table = changed_classes(data, before, after, k=4)
    assert len(table) == 4 and table.change.abs().diff()[1:].max() <= 0
    for line in table.to_dict('records'):
        label = data.classnames.index(line['class'])
        here = before.labels == label
        assert line['pictures'] == here.sum()
        assert line['before'] == pytest.approx(100*before.hits[here].double().mean().item())
        assert line['change'] == pytest.approx(line['after']-line['before'])
        wrong = after.predicted[here & ~after.hits].tolist()
        if not wrong: assert line['afterwards mostly taken for'] == '-'
        else:
            most = data.classnames.index(line['afterwards mostly taken for'])
            assert wrong.count(most) == max(map(wrong.count, wrong))


@pytest.mark.parametrize('cls', [CoOp, VPT, MetaPrompt, MAPDAFE], ids=lambda c: c.method)
def test_shares_of_attention(cls, clip, data):
    "They are shares, the patches come out where they are, and prompts have theirs"
    torch.manual_seed(0)
    learner = cls(clip, data.classnames)
    images = torch.randn(3, 3, clip.image_size, clip.image_size)
    maps, prompts = looks_at(learner, images)
    assert maps.shape == (3, 4, 4) and maps.min() > 0
    total = maps.sum((1, 2))+prompts
    assert ((total < 1) & (total > .5)).all()
    if cls is CoOp: assert prompts.abs().max() < 1e-5
    else: assert prompts.min() > 1e-3
    layer = learner.vision.blocks[-1].ln_1
    assert not layer._forward_hooks


def test_a_patch_that_draws_attention_is_where_it_is(clip, data):
    "Keys of one patch are made to fit the query of CLS; its place on the map lights up"
    learner = VPT(clip, data.classnames)
    plain = ZeroShot(clip, data.classnames)
    image = torch.zeros(1, 3, clip.image_size, clip.image_size)
    image[..., 8:16, 24:32] = 3.                    # row 1, column 3 of the grid
    for who in (plain, learner):
        with_spot, without = (looks_at(who, x, block=0)[0][0] for x in (image, image*0))
        change = (with_spot-without).abs()
        assert change.argmax() == 7, change


def test_a_row_for_each_learner(clip, data):
    fig = show_attention(data, [0, 9], {'a': ZeroShot(clip, data.classnames),
                                        'b': VPT(clip, data.classnames)})
    assert len(fig.axes) == 6
    labels = [ax.get_ylabel() for ax in fig.axes]
    assert labels[2] == 'a' and labels[4].startswith('b\n') and labels[4].endswith('% to prompts')

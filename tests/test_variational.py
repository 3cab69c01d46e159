"""Variational prompts beyond their goldens: the KL, the estimators, noise and where it comes from,
any batch size, resuming, and other learners in front of which they stand."""
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import clipprompt.variational as module
from clipprompt.check import check_learner
from clipprompt.deep import IVLP
from clipprompt.evaluation import Evaluation, evaluate
from clipprompt.learner import Recipe
from clipprompt.mudpt import MuDPT
from clipprompt.training import fit
from clipprompt.variational import (Variational, VariationalCoCoOp, VariationalCoOp, ece, entropy,
                                    kl, log_mean, novelty, reliability)
from helpers import one_line, tiny_clip

NAMES = ['polar bear', 'key', 'cart']

class VariationalIVLP(Variational, IVLP): method = 'variational-ivlp'

class VariationalMuDPT(Variational, MuDPT):
    method = 'variational-mudpt'
    def text_tokens(self): return self.fused()[0]

class ConditionalIVLP(VariationalIVLP): method, conditional = 'conditional-ivlp', True


ALL = {
    c.method: c
    for c in (VariationalCoOp, VariationalCoCoOp, VariationalIVLP, VariationalMuDPT,
              ConditionalIVLP)
}


def features(clip, n=5):
    return F.normalize(torch.randn(n, clip.embed_dim, dtype=clip.dtype,
                                   generator=torch.Generator().manual_seed(0)),
                       dim=-1)

def learner(clip, cls=VariationalCoCoOp, **kw):
    "Moved from its start, so that mu and sigma differ between images"
    made, g = cls(clip, NAMES,
                  **dict(samples=3) | kw).to(clip.dtype), torch.Generator().manual_seed(1)
    for p in made.parameters(): p.data += .2*torch.randn(p.shape, generator=g).to(p)
    return made


@pytest.mark.parametrize('cls', [VariationalIVLP, VariationalMuDPT, ConditionalIVLP])
def test_contract(cls):
    "Of compositions; the package's own are in test_check"
    assert set(check_learner(cls, samples=2).result) == {'passed'}


# ---- the formulas --------------------------------------------------------------------------------

def test_kl_is_torch_distributions():
    mu, logvar = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0),
                             dtype=torch.float64)
    theirs = kl_divergence(Normal(mu, (logvar/2).exp()),
                           Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    torch.testing.assert_close(kl(mu, logvar), theirs, rtol=1e-12, atol=1e-12)
    assert kl(torch.zeros(3), torch.zeros(3)).abs().max() == 0


def test_kl_in_the_loss(clip):
    """The part is not weighted; mean and sum differ by the width; the weight counts in the loss
    alone"""
    z, y = features(clip), torch.arange(5) % 3
    for cls in (VariationalCoOp, VariationalCoCoOp):
        made = {r: learner(clip, cls, kl_reduction=r, kl_weight=.5) for r in ('mean', 'sum')}
        for l in made.values():
            l.eps = torch.randn(3, 1, clip.text_width, generator=torch.Generator().manual_seed(0))
        mean, total = (l.loss_terms(z, y) for l in made.values())
        assert total['kl'].item() == pytest.approx(clip.text_width*mean['kl'].item(), rel=1e-9)
        assert total['task'] == mean['task']
        by_hand = kl(*made['mean'].posterior(z)).mean().item()
        assert mean['kl'].item() == pytest.approx(by_hand, rel=1e-12)
        loss = (mean['task'] + .5*mean['kl']).item()
        assert made['mean'].loss(z, y).item() == pytest.approx(loss, rel=1e-12)


def test_estimators(clip):
    """One draw: the same. More: the log of the mean probability is never below the mean of the
    logs, and neither is equal to it here"""
    z, y = features(clip), torch.arange(5) % 3
    eps = 2*torch.randn(6, 1, clip.text_width, generator=torch.Generator().manual_seed(0))
    for L in (1, 6):
        a, b = (learner(clip, estimator=e) for e in ('log_mean_prob', 'mean_log_prob'))
        a.eps = b.eps = eps[:L]
        a, b = (l.loss_terms(z, y)['task'].item() for l in (a, b))
        assert a == pytest.approx(b, rel=1e-12) if L == 1 else a < b-1e-6
    logp = torch.randn(6, 4, 3).log_softmax(-1)
    torch.testing.assert_close(log_mean(logp).exp(), logp.exp().mean(0))


def test_start(clip):
    """mu is 0, the log-variance uniform in [0, 1), tokens are the words'; sizes are those of the
    released code at ViT-B/16 width"""
    l = VariationalCoOp(clip, NAMES, seed=3)
    v = l.posterior.logvar
    assert not l.posterior.mu.any()
    assert 0 <= v.min() < .2 < .8 < v.max() < 1
    assert len(l.ctx.tokens[0]) == 4
    assert not torch.equal(v, VariationalCoOp(clip, NAMES, seed=4).posterior.logvar)
    class Wide: embed_dim = text_width = 512
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(module.GlobalPosterior(Wide)) + 4*512 == 3072
    assert count(module.ImagePosterior(Wide)) + 4*512 == 659456


# ---- predictions ---------------------------------------------------------------------------------

@pytest.mark.parametrize('groups', [1, 6, 64])
def test_any_batch_is_its_images(clip, monkeypatch, groups):
    """Noise per image: five images give what each gives alone, logits, loss and gradients, however
    they are cut; the reference code stops, or with four images and four tokens mixes them"""
    monkeypatch.setattr(module, 'GROUPS', groups)
    for n in (5, 4):
        z, y = features(clip, n), torch.arange(n) % 3
        eps = torch.randn(3, n, clip.text_width, generator=torch.Generator().manual_seed(0))
        together, alone = learner(clip), learner(clip)
        together.eps = eps
        loss = together.loss(z, y)
        loss.backward()
        logits, losses = [], []
        for i in range(n):
            alone.eps = eps[:, i:i+1]
            logits.append(alone(z[i:i+1])), losses.append(alone.loss(z[i:i+1], y[i:i+1]))
        sum(losses).div(n).backward()
        torch.testing.assert_close(together(z), torch.cat(logits), rtol=1e-10, atol=1e-10)
        assert loss.item() == pytest.approx((sum(losses)/n).item(), rel=1e-10) and loss.ndim == 0
        for p, q in zip(together.parameters(), alone.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)


def test_by_hand(clip):
    """mu + eps sigma on each context token, cosines, softmax, mean: one sample and one sentence at
    a time"""
    for cls in (VariationalCoOp, VariationalCoCoOp):
        l, z = learner(clip, cls).eval(), features(clip, 2)
        l.eps = torch.randn(3, 1, clip.text_width, generator=torch.Generator().manual_seed(0),
                            dtype=clip.dtype)
        for i in range(2):
            mu, logvar = l.posterior(z[i:i+1])
            p = 0
            for eps in l.eps:
                tokens = l.ctx.tokens[0] + mu + eps*torch.sqrt(logvar.exp())
                t = F.normalize(l.text(l.sentences, module.Given(tokens[None])), dim=-1)
                p = p + (clip.logit_scale*z[i] @ t.T).softmax(-1)/3
            torch.testing.assert_close(l(z)[i].exp(), p, rtol=1e-9, atol=1e-12)


def test_predictions_are_log_probabilities(clip):
    for cls in ALL.values():
        l = learner(clip, cls).eval()
        x = torch.randn(2, 3, clip.image_size, clip.image_size, dtype=clip.dtype)
        p = l(x).exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(2, dtype=clip.dtype))


def test_mean_only(clip):
    "No noise at test, but in training; the same as samples of no variance"
    for cls in (VariationalCoOp, VariationalCoCoOp):
        l, z = learner(clip, cls, mean_only=True).eval(), features(clip)
        twin = learner(clip, cls).eval()
        twin.eps = torch.zeros(3, 1, clip.text_width)
        torch.testing.assert_close(l(z), twin(z), rtol=1e-10, atol=1e-10)
        assert len(l.noise(5)) == 1 and len(l.train().noise(5)) == 3 and l.noise(5).any()


# ---- noise ---------------------------------------------------------------------------------------

def test_noise(clip):
    "Injected, from a generator, from torch's in training, from the seed at test"
    for cls, b in ((VariationalCoOp, 1), (VariationalCoCoOp, 5)):
        l = learner(clip, cls, seed=3)
        a, other = l.noise(b), l.noise(b)
        assert a.shape == (3, b, clip.text_width)
        assert a.dtype == torch.float32
        assert not torch.equal(a, other)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            a = l.noise(b)
            torch.manual_seed(0)
            assert torch.equal(a, l.noise(b))
            torch.manual_seed(0)
            assert torch.equal(a, torch.randn(a.shape))
        l.generator = torch.Generator().manual_seed(5)
        a = l.noise(b)
        assert torch.equal(a, torch.randn(a.shape, generator=torch.Generator().manual_seed(5)))
        l.generator = None
        l.eval()
        a = l.noise(b)
        # shared by all images
        assert a.shape[1] == 1
        assert torch.equal(a, l.noise(b))
        assert not torch.equal(a, learner(clip, cls, seed=4).eval().noise(b))
        l.generator = torch.Generator().manual_seed(5)
        # an explicit generator moves on at test too
        assert not torch.equal(l.noise(b), l.noise(b))
        l.eps = torch.ones(2, 1, clip.text_width)
        assert l.noise(b) is l.eps


def test_noise_is_shared_by_the_batch_or_drawn_per_image(clip):
    z = features(clip, 1).repeat(2, 1)
    for cls, same in ((VariationalCoOp, True), (VariationalCoCoOp, False)):
        logits = learner(clip, cls).train()(z)
        assert torch.equal(logits[0], logits[1]) == same


def test_text_features_once_per_evaluation(clip, photos, monkeypatch):
    """The global posterior's class features do not depend on images: one call, whatever the batch
    size"""
    clip, calls = tiny_clip(), []
    l = VariationalCoOp(clip, photos.classnames, samples=3)
    make = l.text
    l.text = lambda *a: calls.append(1) or make(*a)
    a = evaluate(l, photos, batch_size=2)
    assert len(calls) == 1 and a.logits.shape == (len(photos.test), 4)
    assert torch.allclose(a.logits, evaluate(l, photos).logits, atol=1e-4)


@pytest.mark.parametrize('cls', [VariationalCoOp, VariationalCoCoOp])
def test_runs_repeat_and_resume(cls, photos, tmp_path):
    "Two runs alike, and one that was interrupted, end in the same parameters to the last bit"
    clip, ends, recipe = tiny_clip(), [], Recipe(lr=.05, epochs=4, batch_size=8, views=2)
    class Stop(Exception): pass
    for kind in ('whole', 'again', 'interrupted'):
        l = cls(clip, photos.classnames, samples=2, seed=1)
        if kind == 'interrupted':
            step, seen = l.training_step, []
            def stops(*a):
                if len(seen) == 2*(len(photos.train)//8)+1: raise Stop
                seen.append(1)
                return step(*a)
            l.training_step = stops
            with pytest.raises(Stop):
                fit(l, photos, recipe, seed=1, checkpoint=tmp_path/'run', progress=False)
            l = cls(clip, photos.classnames, samples=2, seed=1)
        fit(l, photos, recipe, seed=1, checkpoint=tmp_path/'run' if kind == 'interrupted' else None,
            progress=False)
        ends.append(torch.cat([p.flatten() for p in l.parameters()]).detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# ---- other learners ------------------------------------------------------------------------------

@pytest.mark.parametrize('cls,plain', [(VariationalIVLP, IVLP), (VariationalMuDPT, MuDPT)])
def test_over_others(clip, cls, plain):
    """With no noise and mu = 0 the learner behind is found again, deeper layers, image side and
    all; with noise it is not"""
    base = plain(clip, NAMES, seed=2).double()
    l = cls(clip, NAMES, seed=2, samples=3).double().eval()
    l.load_state_dict(base.state_dict(), strict=False)
    l.eps = torch.zeros(2, 1, clip.text_width)
    x = torch.randn(3, 3, clip.image_size, clip.image_size, dtype=clip.dtype)
    torch.testing.assert_close(l(x), base(x).log_softmax(-1), rtol=1e-9, atol=1e-9)
    l.eps = None
    assert (l(x)-base(x).log_softmax(-1)).abs().max() > 1e-3


def test_save_and_load(clip, tmp_path):
    for cls in (VariationalCoOp, VariationalCoCoOp):
        l = learner(clip, cls, estimator='mean_log_prob', kl_weight=.1).eval()
        l.save(tmp_path/'p.safetensors')
        again = cls.load(tmp_path/'p.safetensors', clip).eval()
        assert again.hparams == l.hparams and torch.equal(again(features(clip)), l(features(clip)))
    # the reference code keeps a random posterior, silently
    with pytest.raises(ValueError, match="not 'variational-coop'"):
        VariationalCoOp.load(tmp_path/'p.safetensors', clip)


def test_bad_options(clip):
    bad = ((dict(estimator='log_mean'), 'log_mean_prob'),
           (dict(kl_reduction='max'), 'kl_reduction'),
           (dict(samples=0), 'at least 1'), (dict(csc=True), 'csc=False'))
    for kw, says in bad:
        with pytest.raises(ValueError) as e: VariationalCoOp(clip, NAMES, **kw)
        one_line(e, says)


def test_recipes():
    for cls in (VariationalCoOp, VariationalCoCoOp):
        sets = '', 'EuroSAT', 'oxford_flowers', 'imagenet'
        assert [cls.recipe('base-to-new', 16, d).epochs for d in sets] == [40, 60, 40, 10]
        assert cls.recipe('cross-dataset', 16, 'eurosat').epochs == 10
        assert cls.recipe().batch_size == 1 and cls.recipe().lr == .002


# ---- calibration ---------------------------------------------------------------------------------

def test_calibration_by_hand():
    """Four predictions with confidence 0.9 of which two are right, four with 0.6 of which two are
    right: ECE (0.4 + 0.1)/2"""
    p, labels = torch.tensor([[.9, .1]]*4 + [[.6, .4]]*4), torch.tensor([0, 0, 1, 1]*2)
    # logits are known up to a constant
    for logits in (p.log(), p.log()+3):
        scores = Evaluation.of(logits, labels)
        table = reliability(scores, bins=7)
        assert ece(scores, bins=7) == pytest.approx(25, abs=1e-3) and list(table.images) == [4, 4]
        assert list(table.confidence) == pytest.approx([60, 90], abs=1e-3)
        assert list(table.accuracy) == pytest.approx([50, 50])
    gaps = lambda: (table.accuracy - table.confidence).abs()
    by_table = lambda s: (table.images/table.images.sum()*gaps()).sum()
    scores = Evaluation.of(2*torch.randn(200, 5, generator=torch.Generator().manual_seed(0)),
                        torch.arange(200) % 5)
    table = reliability(scores)
    # torchmetrics and the table agree
    assert ece(scores) == pytest.approx(by_table(scores), abs=1e-3)


def test_entropy_and_novelty():
    sure, unsure = torch.tensor([[20., 0, 0]]*5), torch.zeros(5, 3)
    y = torch.zeros(5, dtype=torch.long)
    assert entropy(sure).max() < 1e-6
    assert torch.allclose(entropy(unsure), torch.tensor(3.).log().expand(5))
    assert novelty(Evaluation.of(sure, y), Evaluation.of(unsure, y)) == 100
    assert novelty(Evaluation.of(unsure, y), Evaluation.of(sure, y)) == 0

"""The page that draws: its JavaScript computes what Python computes, in node and in a browser.

Parts that need node or Chromium are marked `stress`, and say so where there is none.
"""
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))

import live as tool  # noqa: E402

from clipprompt.backbone import load_backbone  # noqa: E402
from clipprompt import pictures  # noqa: E402
from clipprompt.inference import predict  # noqa: E402
from clipprompt.pictures import test_transform as upright  # noqa: E402
from clipprompt.sets import load_dataset  # noqa: E402
from clipprompt.towers import VisionTower  # noqa: E402

NODE = shutil.which('node')
CHROME = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
              None)
HERE = [t for t in tool.TASKS if (tool.PROMPTS/t).is_dir()]
NAMES = ['mug', 'teapot', 'watering can', 'arrow up', 'xylophone']
STRINGS = ["a photo of a dog's HOUSE", 'C-3PO & 42 cafés', 'arrow-up/down', '  naïve   “quotes” ',
           '日本 émoji 🙂', "they'll've", 'supercalifragilistic']
needs_prompts = pytest.mark.skipif(not HERE, reason='no prompts are shipped yet')
in_node = pytest.mark.skipif(NODE is None, reason='no node on this machine')
in_browser = pytest.mark.skipif(CHROME is None, reason='no Chromium on this machine')


@pytest.fixture(scope='module')
def clip(): return load_backbone()


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The folder of the page"
    out = tmp_path_factory.mktemp('page')
    tool.make(out)
    return out


class Exported:
    "What enters the slots, as the page computes it"
    def __init__(self, tokens, keep): self.tokens, self.keep = tokens, keep

    def enter(self, layer, carried):
        if not layer: return self.tokens[0]
        if layer >= len(self.tokens): return carried
        return self.keep[layer]*carried + (1-self.keep[layer])*self.tokens[layer]


def rebuilt(clip, x, tensors, m):
    "Logits from exported tokens and text features, without the learner"
    tower = VisionTower(clip, ln_pre=False)
    frozen = tower(x)
    parts = dict(frozen=frozen)
    if m['slots']: parts['prompted'] = tower(x, Exported(tensors[f'{m["name"]}.image'], m['keep']))
    unit = [F.normalize(parts[b], dim=-1) for b in m['branches']]
    f = F.normalize(torch.cat(unit, -1), dim=-1)
    logits = clip.logit_scale*f @ tensors[f'{m["name"]}.text'].mT    # [S, B, C]
    if len(logits) == 1: return logits[0]
    return logits.softmax(-1).mean(0).log()


def chosen(data, n):
    "Test pictures spread over the classes"
    return np.random.default_rng(1).permutation(len(data.test))[:n].tolist()


def read(data, places, clip, raw=False):
    transform = upright(clip, raw=raw)
    return torch.stack([transform(data.read(data.test[i])) for i in places])


# ---- without a browser ----

@needs_prompts
def test_shipped_prompts_are_fresh_and_small():
    noted = json.loads(tool.STAMP.read_text())
    assert {k: noted[k] for k in tool.stamp()} == tool.stamp(), \
        'picto-clip or the suite changed: python tools/live.py --learn ' + ' '.join(HERE)
    assert set(noted['tasks']) == set(HERE)
    assert all(set(t['accuracy']) == set(tool.TITLES) for t in noted['tasks'].values())
    size = sum(f.stat().st_size for f in tool.PAGE.rglob('*') if f.is_file())
    assert size < 3e6


@needs_prompts
def test_shipped_prompts_are_learned_to_the_end():
    tasks = json.loads(tool.STAMP.read_text())['tasks']
    short = [t for t, said in tasks.items() if said['epochs'] != 'tuned']
    assert not short, 'learn them again: python tools/live.py --learn ' + ' '.join(short)


@needs_prompts
def test_exported_tokens_rebuild_each_learner(clip):
    task = HERE[0]
    data, learners = load_dataset('pictograms', task), tool.learned(task, clip)
    assert list(learners) == list(tool.TITLES)
    x = read(data, chosen(data, 4), clip)
    with torch.no_grad():
        for name, learner in learners.items():
            tensors, says = tool.exported(name, learner)
            assert torch.allclose(rebuilt(clip, x, tensors, says), learner(x), atol=1e-4), name


def test_what_only_makes_tokens_is_left_out_without_a_change(clip):
    from clipprompt.deep import MaPLe
    from clipprompt.mudpt import MuDPT
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for learner in (MuDPT(clip, ['mug', 'key']), MaPLe(clip, ['mug', 'key'], depth=2)):
        small = tool.small(learner)
        assert sum(p.numel() for p in small.parameters()) < 1e4
        with torch.no_grad(): assert torch.allclose(small(x), learner.eval()(x), atol=1e-4)


def test_tokens_that_depend_on_the_image_are_refused(clip):
    from clipprompt.cocoop import CoCoOp
    with pytest.raises(ValueError, match='for each image'):
        with torch.no_grad(): tool.exported('cocoop', CoCoOp(clip, ['mug', 'key']).eval())


def test_chapters_lead_to_cards_that_exist():
    from nbfilter import CARDS
    assert set(CARDS.values()) == set(tool.TITLES) - {'vpt'}   # the deep chapter leads to MaPLe
    assert all((ROOT/'nbs'/chapter).exists() for chapter in CARDS)


def test_kernel_is_of_its_source():
    "A change of linear.ts without --compile would go unnoticed"
    wasm = (tool.PAGE/'linear.wasm').read_bytes()
    assert wasm[:4] == b'\0asm' and len(wasm) < 2000
    source, kernel = tool.PAGE/'linear.ts', tool.PAGE/'linear.wasm'
    noted = (tool.PAGE/'linear.sha256').read_text().split()
    assert noted == [tool.sha256(source), tool.sha256(kernel)], 'python tools/live.py --compile'


def test_lines_fit():
    kinds = '.mjs', '.ts', '.html', '.css'
    files = [f for f in tool.PAGE.iterdir() if f.suffix in kinds and f.name != 'widget.mjs']
    long = [f'{f.name}:{i}' for f in files
            for i, line in enumerate(f.read_text(encoding='utf-8').splitlines(), 1)
            if len(line) > 100]
    assert len(files) > 10 and not long


# ---- node ----

SETTINGS = dict(alpha=dict(alpha=.3), depth=dict(depth=3))


def changed(learner, key):
    "A learner as the page's sliders change it"
    if key == 'alpha': learner.visual_ctx.alpha = .3
    else:
        class First:
            def __init__(self, prompts): self.prompts = prompts

            def enter(self, layer, carried):
                return self.prompts.enter(layer, carried) if layer < 3 else carried
        tower = learner.vision
        learner.vision = lambda images, prompts=None: tower(images, prompts and First(prompts))
    return learner


@torch.no_grad()
def gold(task, clip, n):
    "What Python says about pictures of a task: tensors, and a description"
    data, learners = load_dataset('pictograms', task), tool.learned(task, clip)
    places = chosen(data, n)
    x = read(data, places, clip)
    raw = [np.asarray(data.source(data.test[i].path).convert('L')).ravel() for i in places]
    out = dict(raw=torch.tensor(np.stack(raw)).int())
    for look, name in tool.LOOKS.items():   # all that can be equal, not the task's alone
        if name == 'photo': continue
        shown = replace(data, domain=getattr(pictures, look))
        small = read(shown, places, clip, raw=True)[:, 0].flatten(1)
        out[f'small.{name}'] = small.int().contiguous()
    for name, learner in learners.items():
        out[f'logits.{name}'] = learner(x).contiguous()
        text = learner.for_classes(NAMES).text_features()
        out[f'names.{name}'] = text.reshape(-1, text.shape[-1]).contiguous()
    for key in SETTINGS:
        for name, learner in tool.learned(task, clip).items():
            if key == 'alpha' and name != 'provp-ref' or not learner.learns_image: continue
            out[f'{key}.{name}'] = changed(learner, key)(x[:1])[0].contiguous()
    strings = [(s, clip.tokenizer.encode(s)) for s in STRINGS]
    info = dict(look=tool.LOOKS[data.domain.__name__], names=NAMES, settings=SETTINGS,
                strings=strings)
    return out, info


@needs_prompts
@in_node
@pytest.mark.stress
def test_node_computes_what_python_computes(page, clip, tmp_path):
    each = -(-204//len(HERE))
    for task in HERE:
        tensors, info = gold(task, clip, each)
        save_file(tensors, tmp_path/f'{task}.safetensors', dict(info=json.dumps(info)))
    r = subprocess.run([NODE, ROOT/'tests'/'live.mjs', page, tmp_path, *HERE], capture_output=True,
                       text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    told = json.loads(r.stdout)
    print(told)
    assert told['kinds'] == ['WebAssembly', 'JavaScript']
    assert told['bytes'] >= 3*200*1024 and told['wrong'] == 0
    assert told['cases'] >= 200*len(tool.TITLES) and told['same'] == told['cases']
    assert told['plain']['same'] == told['plain']['cases'] >= 8*len(tool.TITLES)
    assert told['logits'] < 5e-3 and told['changed'] < 5e-3
    assert told['names'] < 1e-5 and told['ids'] == 0


# ---- a browser ----

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def address(page):
    "Where the page is served as a site would serve it"
    shown = functools.partial(Quiet, directory=page)
    with http.server.ThreadingHTTPServer(('localhost', 0), shown) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f'http://localhost:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        yield found
        found.close()


class Tab:
    "A page, with what it asked for and complained of"
    def __init__(self, browser, address, path='', narrow=False, **how):
        size = dict(width=390, height=844) if narrow else dict(width=1280, height=900)
        self.context = browser.new_context(viewport=size, **how)
        self.tab, self.asked, self.errors = self.context.new_page(), [], []
        self.tab.on('request', lambda r: self.asked.append(r.url))
        self.tab.on('pageerror', lambda e: self.errors.append(str(e)))
        self.tab.on('console', lambda m: m.type == 'error' and self.errors.append(m.text))
        self.address = address+path
        self.tab.set_default_timeout(60_000)

    def open(self):
        self.tab.goto(self.address)
        return self

    def ready(self):
        self.open().tab.wait_for_selector('body[data-ready]')
        return self.tops()

    def turn(self): return int(self.tab.evaluate('document.body.dataset.turn ?? 0'))

    def after(self, act):
        "Wait for the answer to an act"
        old = self.turn()
        act()
        end = monotonic()+60
        while self.turn() <= old or self.tab.evaluate("'busy' in document.body.dataset"):
            assert monotonic() < end, self.tab.inner_text('body')[:500]
            self.tab.wait_for_timeout(20)
        return self.tops()

    def tops(self):
        cards = self.tab.locator('.card').evaluate_all(
            "cs => cs.map(c => [c.id.slice(5), c.querySelector('b').textContent])")
        return dict(cards)

    def wrong(self):
        self.tab.wait_for_selector('#wrong:not([hidden])')
        return self.tab.inner_text('#wrong')

    def close(self): self.context.close()


@pytest.fixture
def tab(browser, address):
    found = Tab(browser, address)
    found.ready()
    yield found
    assert not found.errors
    assert all(url.startswith((address, 'data:', 'blob:')) for url in found.asked)
    found.close()


def stroke(tab, points):
    box = tab.tab.locator('#paper').bounding_box()
    at = [(box['x']+x*box['width'], box['y']+y*box['height']) for x, y in points]
    tab.tab.mouse.move(*at[0])
    tab.tab.mouse.down()
    for x, y in at[1:]: tab.tab.mouse.move(x, y, steps=4)
    tab.tab.mouse.up()


BROWSER = [needs_prompts, in_browser, pytest.mark.stress]


def browses(f): return functools.reduce(lambda g, mark: mark(g), BROWSER, f)


@browses
def test_pictures_are_answered_as_in_python(tab, page, clip):
    task = json.loads((page/'about.json').read_text())['tasks'][0]
    data = load_dataset('pictograms', task['task'])
    learners = {n: learner.eval() for n, learner in tool.learned(task['task'], clip).items()}
    places = [item['place'] for item in task['pictures']['items']]
    found = [tab.after(b.click) for b in tab.tab.locator('#picker button').all()]
    assert len(found) == len(places) > 8
    for name, learner in learners.items():
        shown = [data.read(data.test[i]) for i in places]
        ours = [p.top[0][0] for p in predict(learner, shown, top=1)]
        assert [tops[name] for tops in found] == ours, name


@browses
def test_strokes_keys_undo_and_switches(tab):
    empty = tab.tops()
    drawn = tab.after(lambda: stroke(tab, [(.5, .1), (.5, .9)]))
    cross = tab.after(lambda: stroke(tab, [(.1, .5), (.9, .5)]))
    assert drawn != empty and cross != drawn
    assert tab.after(lambda: tab.tab.click('#undo')) == drawn
    assert tab.after(lambda: tab.tab.keyboard.press('Control+z')) == empty
    tab.tab.focus('#paper')
    tab.after(lambda: tab.tab.keyboard.press('Space'))
    for _ in range(3): tab.after(lambda: tab.tab.keyboard.press('ArrowDown'))
    tab.after(lambda: tab.tab.select_option('#task', index=len(HERE)-1))
    tab.tab.evaluate("document.querySelector('#depth').value = 0")
    tab.after(lambda: tab.tab.dispatch_event('#depth', 'input'))
    assert tab.tab.inner_text('#card-provp-ref small') == 'no image tokens'
    tab.after(lambda: tab.tab.click('#reset'))
    assert tab.tab.inner_text('#card-provp-ref small').startswith('tokens ')


@browses
def test_own_names_and_the_call_in_python(tab):
    tab.tab.click('#own summary')
    tab.tab.fill('#names', 'hammer, teapot, qwxzj')
    tops = tab.after(lambda: tab.tab.click('#names-form button[type=submit]'))
    assert set(tops.values()) <= {'hammer', 'teapot', 'qwxzj'}
    assert tab.tab.locator('#pieces code.unread').count()
    tops = tab.after(lambda: tab.tab.locator('#picker button').nth(3).click())
    tab.tab.evaluate("document.querySelector('#alpha').value = .4")
    tops = tab.after(lambda: tab.tab.dispatch_event('#alpha', 'input'))
    tab.tab.evaluate("document.querySelector('#depth').value = 4")
    tops = tab.after(lambda: tab.tab.dispatch_event('#depth', 'input'))
    shown = tab.tab.inner_text('#card-provp-ref li:first-child i')
    tab.tab.click('#card-provp-ref button')
    said = io.StringIO()
    with redirect_stdout(said): exec(tab.tab.inner_text('#code'), {})
    first, share = re.search(r': (.+?) ([\d.]+) %', said.getvalue()).groups()
    assert first == tops['provp-ref'] and abs(float(share) - float(shown.split()[0])) < .6


@browses
@pytest.mark.parametrize('path', ['', 'explorer.html'])
def test_phone_has_no_sideways_scroll(browser, address, path):
    found = Tab(browser, address, path, narrow=True, has_touch=True)
    found.ready()
    assert found.tab.evaluate('document.documentElement.scrollWidth') <= 390
    assert not found.errors
    found.close()


@browses
@pytest.mark.parametrize('path', ['', 'explorer.html'])
@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_labels_contrast_and_keys(browser, address, path, theme):
    "What axe-core finds: contrast, names of controls, landmarks, order of headings"
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    found = Tab(browser, address, path, color_scheme=theme)
    found.ready()
    assert found.tab.evaluate('document.documentElement.dataset.theme') == theme
    wrong = axe.run(found.tab)
    assert not wrong.violations_count, wrong.generate_report()
    found.close()


@browses
def test_an_address_shows_the_card_of_a_chapter(browser, address):
    found = Tab(browser, address, '#card-vpt', narrow=True)
    found.ready()
    card = found.tab.locator('#card-vpt:target')
    assert card.is_visible() and 0 <= card.bounding_box()['y'] < 844
    assert not found.tab.locator('#card-maple').is_visible()   # hidden at first, as ever
    found.close()


@browses
def test_explorer_brushes_and_says_how_to_run_again(browser, address):
    found = Tab(browser, address, 'explorer.html')
    found.ready()
    everyone = found.tab.inner_text('#count')
    found.tab.locator('#method label').first.click()
    one = found.tab.inner_text('#count')
    assert one != everyone and found.tab.locator('#means tr').count() == 2
    point = found.tab.locator('#plot .point').first.bounding_box()
    found.tab.mouse.move(point['x']+point['width']/2, point['y']+point['height']/2)
    assert 'clipprompt rerun suite --run ' in found.tab.inner_text('#about')
    found.tab.click('#all')
    box = found.tab.locator('#plot').bounding_box()
    found.tab.mouse.move(box['x']+box['width']*.6, box['y']+20)
    found.tab.mouse.down()
    found.tab.mouse.move(box['x']+box['width']*.9, box['y']+box['height']*.4, steps=5)
    found.tab.mouse.up()
    assert found.tab.inner_text('#count') not in (everyone, one)
    assert found.tab.locator('#plot .off').count() and not found.errors
    found.close()


@browses
def test_what_is_broken_is_said(browser, address, page, tmp_path):
    tower = (page/'tower.safetensors').read_bytes()
    cases = {
        'tower.safetensors': (dict(status=404), 'is missing'),
        'methods-*': (dict(status=200, body=b'no tensors at all'), 'is broken'),
        '*tower.safetensors': (dict(status=200, body=tower[:100_000]), 'is broken'),
        'about.json': (dict(status=404), 'about.json is missing'),
    }
    for pattern, (reply, said) in cases.items():
        found = Tab(browser, address)
        found.context.route(f'**/{pattern}', lambda route: route.fulfill(**reply))
        assert said in found.open().wrong(), pattern
        found.close()
    (tmp_path/'no.png').write_text('not a picture')
    found = Tab(browser, address)
    found.ready()
    found.tab.set_input_files('#file', tmp_path/'no.png')
    assert 'no picture' in found.wrong()
    found.close()


@browses
def test_without_webassembly(browser, address, page):
    found = Tab(browser, address)
    worker = 'delete globalThis.WebAssembly;\n' + (page/'worker.mjs').read_text()
    kind = 'text/javascript'
    found.context.route('**/worker.mjs', lambda r: r.fulfill(body=worker, content_type=kind))
    found.ready()
    assert 'JavaScript' in found.tab.inner_text('#status')
    tops = found.after(lambda: found.tab.locator('#picker button').first.click())
    assert all(tops.values()) and not found.errors
    found.close()


@browses
def test_python_serves_the_same_page(browser, clip):
    from clipprompt.page import Told, open_page
    data = load_dataset('pictograms', HERE[0])
    learners = dict(list(tool.learned(HERE[0], clip).items())[:4])
    served = open_page(Told(learners, data), folder=tool.PAGE)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    found = Tab(browser, served.url)
    tops = found.ready()
    assert len(tops) == 4 and 'Python' in found.tab.inner_text('#status')
    drawn = found.after(lambda: stroke(found, [(.2, .2), (.8, .8)]))
    shown = found.after(lambda: found.tab.locator('#picker button').nth(2).click())
    assert drawn != shown and not found.errors
    found.close()
    served.shutdown()
    served.server_close()

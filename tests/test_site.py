"""The pages in a browser: they fit a screen, ask nobody else, and say what they mean.

`pytest tests/test_site.py` builds the pages with Pandoc. `SITE=_docs pytest tests/test_site.py`
looks at a book that Quarto has rendered.
"""
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROME = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
              None)
WIDE, NARROW = dict(width=1280, height=900), dict(width=390, height=844)

pytestmark = pytest.mark.skipif(CHROME is None, reason='no Chromium on this machine')

# What the browser is asked of each page
BLOCKS = '''() => [...document.querySelectorAll('main pre')].filter(p => p.offsetParent).map(p => {
    const inner = [...p.querySelectorAll('code')].map(c => c.scrollWidth - c.clientWidth);
    return Math.max(p.scrollWidth - p.clientWidth, ...inner);
})'''
WIDEST = '''() => [...document.querySelectorAll('main *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .filter(e => !e.closest('pre, table, math, [id^="eq-"], details, svg'))
    .slice(0, 3).map(e => e.outerHTML.slice(0, 120))'''
ROOTS = '''() => [...document.querySelectorAll('msqrt mfrac')].map(f => {
    const root = f.closest('msqrt').getBoundingClientRect(), box = f.getBoundingClientRect();
    return [box.top - root.top, root.bottom - box.bottom,
            box.left - root.left, root.right - box.right];
})'''
FONT = '''() => document.fonts.ready.then(() =>
    [...document.fonts].filter(f => f.status == 'loaded').map(f => f.family))'''
HEADINGS = '''() => [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')]
    .filter(h => h.closest('main') && h.offsetParent).map(h => +h.tagName[1])'''
NAMELESS = '''() => [...document.querySelectorAll('main img')]
    .filter(i => !i.alt.trim()).map(i => i.src)'''
CONTRAST = '''() => {
    const rgb = c => c.match(/[\\d.]+/g).map(Number);
    const linear = v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4;
    const light = ([r, g, b]) => .2126*linear(r) + .7152*linear(g) + .0722*linear(b);
    const under = e => {
        for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] > .5) return c.slice(0, 3);
        }
        return [255, 255, 255];
    };
    const read = 'figcaption, caption, pre code, pre code span, .flag, summary, .defines a';
    const low = [];
    for (const e of document.querySelectorAll(read)) {
        if (!e.textContent.trim() || !e.offsetParent) continue;
        const colour = getComputedStyle(e).color;
        const a = light(rgb(colour).slice(0, 3)), b = light(under(e));
        const ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05);
        if (ratio < 4.5) low.push([e.tagName, e.className, ratio.toFixed(1), colour]);
    }
    return low;
}'''


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Folder of the pages"
    if 'SITE' in os.environ: return Path(os.environ['SITE']).resolve()
    out = tmp_path_factory.mktemp('site')
    r = subprocess.run([sys.executable, ROOT/'tools'/'pages.py', out], capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stderr
    return out


@pytest.fixture(scope='session')
def address(site):
    "Where a server of this machine shows them"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}/'
    server.shutdown()


@pytest.fixture(scope='session')
def looked(site, address):
    "{page: what the browser saw of it}"
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        tab = browser.new_context(viewport=WIDE).new_page()
        out = {name: look(tab, address, name) for name in pages(site)}
        browser.close()
    assert len(out) > 20
    return out


def pages(site):
    "The book's pages, without parts of pages and the page for dead addresses"
    apart = {'site_libs', 'live'}   # the page that draws has tests of its own
    files = [f for f in site.rglob('*.html') if not apart & {*f.relative_to(site).parts}]
    parts = {'404.html', 'page.html', 'before.html', 'after.html'}
    return sorted(f.relative_to(site).as_posix() for f in files if f.name not in parts)


def look(tab, address, name):
    "One page, wide and narrow"
    asked, errors, failed = [], [], []
    listen = dict(request=lambda r: asked.append(r.url),
                  pageerror=lambda e: errors.append(str(e)),
                  console=lambda m: errors.append(m.text) if m.type == 'error' else None,
                  requestfailed=lambda r: failed.append(r.url),
                  response=lambda r: failed.append(f'{r.status} {r.url}')
                  if r.status >= 400 else None)
    for event, f in listen.items(): tab.on(event, f)
    tab.set_viewport_size(WIDE)
    tab.goto(address + name, wait_until='load')
    fonts = tab.evaluate(FONT)
    tab.evaluate('() => document.querySelectorAll("details").forEach(d => d.open = true)')
    seen = dict(
        blocks=tab.evaluate(BLOCKS),
        roots=tab.evaluate(ROOTS),
        fonts=fonts,
        headings=tab.evaluate(HEADINGS),
        nameless=tab.evaluate(NAMELESS),
        contrast=tab.evaluate(CONTRAST),
        wide=tab.evaluate('() => document.documentElement.scrollWidth'),
        ids=set(tab.evaluate('() => [...document.querySelectorAll("[id]")].map(e => e.id)')),
        links=tab.evaluate(
            '() => [...document.querySelectorAll("a[href]")].map(a => a.getAttribute("href"))'))
    tab.set_viewport_size(NARROW)
    seen |= dict(narrow=tab.evaluate('() => document.documentElement.scrollWidth'),
                 widest=tab.evaluate(WIDEST))
    for event, f in listen.items(): tab.remove_listener(event, f)
    return seen | dict(asked=asked, errors=errors, failed=failed)


def bad(looked, fault):
    "{page: its faults} where there are any"
    found = {name: fault(seen) for name, seen in looked.items()}
    return {name: f for name, f in found.items() if f}


def test_no_request_leaves_a_page(looked, address):
    assert not bad(looked,
                   lambda s: [u for u in s['asked'] if not u.startswith((address, 'data:'))])


def test_nothing_is_missing_and_no_script_fails(looked):
    assert not bad(looked, lambda s: s['failed'] + s['errors'])


def test_code_fits_a_laptop(looked):
    blocks = [over for s in looked.values() for over in s['blocks']]
    scrolling = sum(over > 1 for over in blocks)
    said = f'{scrolling} of {len(blocks)} blocks scroll sideways'
    assert len(blocks) > 500 and scrolling <= .05*len(blocks), said


def test_no_page_is_wider_than_the_screen(looked):
    assert not bad(looked, lambda s: s['wide'] > WIDE['width'] and s['wide'])
    assert not bad(looked, lambda s: s['narrow'] > NARROW['width'] and (s['narrow'], s['widest']))


def test_fractions_stand_under_their_roots(looked):
    roots = [r for s in looked.values() for r in s['roots']]
    assert roots and all(side > -1 for r in roots for side in r), roots


def test_formulas_carry_their_font(looked):
    assert 'STIX Two Math' in ' '.join(looked['nbs/11_coop.html']['fonts'])


def test_links_are_alive(looked, site):
    dead = []
    for name, seen in looked.items():
        for link in seen['links']:
            if re.match(r'[a-z]+:', link) or link.startswith('//'): continue
            to, anchor = urldefrag(urljoin(f'/{name}', link))
            to = unquote(to).lstrip('/') or 'index.html'
            if to.startswith('live/'): continue   # tests/test_live.py looks at that page
            if not (site/to).exists(): dead.append(f'{name}: {link}')
            elif anchor and to in looked and unquote(anchor) not in looked[to]['ids']:
                dead.append(f'{name}: {link}')
    assert not dead, '\n'.join(dead)


def test_one_title_and_headings_in_order(looked):
    assert not bad(looked, lambda s: s['headings'].count(1) != 1 and s['headings'])
    pairs = lambda s: zip(s['headings'], s['headings'][1:])
    assert not bad(looked, lambda s: [(a, b) for a, b in pairs(s) if b > a + 1])


def test_every_figure_has_words(looked):
    assert not bad(looked, lambda s: s['nameless'])


def test_captions_and_code_can_be_read(looked):
    assert not bad(looked, lambda s: s['contrast'][:5])


# ---- Without a browser ---------------------------------------------------------------------------

def loads(html):
    "Addresses of other hosts that a page would load"
    tags = re.findall(r'<(?:script|img|iframe|link|source)\b[^>]*>', html)
    loading = [
        t for t in tags if not t.startswith('<link')
        or re.search(r'rel="?(?:stylesheet|preload|preconnect|icon)', t)
    ]
    urls = [u for t in loading for u in re.findall(r'(?:src|href)="((?:https?:)?//[^"]+)"', t)]
    return urls + re.findall(r'(?:url\(|@import\s+)["\']?((?:https?:)?//[^"\')]+)', html)


def test_theme_and_pages_name_no_other_host(site):
    for file in [
            *(ROOT/'site').glob('*.*css'), *(ROOT/'site').glob('*.html'), *site.rglob('*.html')
    ]:
        assert not loads(file.read_text(encoding='utf-8')), file
    planted = ('<link rel="stylesheet" href="https://a.example/x.css">'
               '<script src="//b.example/y.js"></script>@import "http://c.example"')
    assert len(loads(planted)) == 3

#!/usr/bin/env python3
"""Make the book's pages without Quarto: `python tools/pages.py FOLDER`.

The filter and Pandoc are those of a render, and so is the style sheet; what only Quarto has
(themes, the sidebar, the search box, numbers of figures) is missing. tests/test_site.py looks at
these pages in a browser.
"""
import base64
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from docs_check import LABEL, ROOT, filtered, nb2md, pandoc, text


def chapters(root=ROOT):
    "Files of the book in reading order"
    return re.findall(r'^\s*-\s+([\w./-]+\.(?:qmd|ipynb))',
                      (root/'_quarto.yml').read_text(encoding='utf-8'), re.M)


def to_html(name):
    "A link to a source is a link to its page"
    return re.sub(r'\.(ipynb|qmd)$', '.html', name)


def linked(html):
    "Links between sources become links between pages"
    return re.sub(r'href="((?![a-z]+:)[^"#]*)\.(?:ipynb|qmd)(#[^"]*)?"', r'href="\1.html\2"', html)


def markdown(name, out):
    "Markdown of a source, its pictures beside the page"
    path = ROOT/name
    if path.suffix == '.qmd': return path.read_text(encoding='utf-8')

    def save(file, data):
        folder = out/'figures'/path.stem
        folder.mkdir(parents=True, exist_ok=True)
        data = text(data)
        data = data.encode() if file.endswith('.svg') else base64.b64decode(data)
        (folder/file).write_bytes(data)
        return f'../figures/{path.stem}/{file}'
    return nb2md(filtered(path), save)


def headed(md):
    "The title of a page without front matter is its first heading"
    head = re.match(r'# (.+?)(?: \{.*\})?\n', md)
    if not head: return md
    return f'---\n{yaml.safe_dump({"title": head[1]})}---\n{md[head.end():]}'


def labels(texts):
    "{label: the page it is on}; every chapter lies in one folder"
    return {
        label: Path(to_html(name)).name
        for name, md in texts.items()
        for label in re.findall(rf'\{{#({LABEL})', md)
    }


def build(name, md, out, at):
    "Write the page of one source; Pandoc's warnings"
    html, warns = pandoc(headed(md), ROOT/'references.bib',
                         '--template', str(ROOT/'site'/'page.html'),
                         '--metadata', f'root={"../"*name.count("/")}', at=at)
    page = out/to_html(name)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(linked(html), encoding='utf-8')
    return warns


def main(out):
    out = Path(out)
    for folder in ('site', 'nbs/images'):
        shutil.copytree(ROOT/folder, out/folder, dirs_exist_ok=True)
    texts = {name: markdown(name, out) for name in chapters()}
    at = labels(texts)
    with ThreadPoolExecutor(2) as ex:
        warns = sum(ex.map(lambda name: build(name, texts[name], out, at), texts), [])
    print(*warns, f'{len(chapters())} pages in {out}', sep='\n')


if __name__ == '__main__': main(*sys.argv[1:])

#!/usr/bin/env python3
"""Write README.md and index.qmd, the book's home page, from nbs/index.ipynb.

A cell's picture has no file that a README could show: save it under nbs/images/ and link to it
in Markdown. The same text twice: a code host wants a heading and no cards, a Quarto book has its
own title block.
"""
import posixpath
import re

import yaml

from docs_check import ROOT, filtered, nb2md

MADE = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook -->'


def from_root(m):
    "A link relative to nbs/, made relative to the root"
    return f']({posixpath.normpath("nbs/"+m[1])}{m[2] or ""})'


def for_host(md):
    """Without what only the site lays out: the cards, attributes of pictures, and anchors, which a
    bare notebook lacks"""
    md = re.sub(r'^## The methods\n.*?^::::$\n*', '', md, flags=re.M | re.S)
    md = re.sub(r'\{fig-alt="[^"]*"\}', '', md)
    return re.sub(r'(\.ipynb)#[^)\s]*\)', r'\1)', md)


def in_site(md):
    "Pages of the site that no notebook makes, as the site itself links to them"
    home = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['book']['site-url']
    return md.replace(f'({home}/', '(')


def main():
    md = nb2md(filtered(ROOT/'nbs'/'index.ipynb'))
    head = re.match(r'---\n(.*?)\n---\s*', md, re.S)
    meta = yaml.safe_load(head[1])
    body = re.sub(r'\]\((?![a-z]+:|[#/])([^)\s#]+)(#[^)\s]*)?\)', from_root, md[head.end():])
    intro = f'> {meta["description"]}\n\n{MADE}\n\n'
    (ROOT/'README.md').write_text(f'# {meta["title"]}\n\n{intro}{for_host(body)}\n',
                                  encoding='utf-8')
    # The site's front page has the book's title block on top; without a heading of its own it
    # would be chapter 1
    head = f'# {meta["title"]} {{.unnumbered .front}}\n\n{MADE}\n\n'
    (ROOT/'index.qmd').write_text(f'{head}{in_site(body)}\n', encoding='utf-8')


if __name__ == '__main__': main()

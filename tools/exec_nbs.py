#!/usr/bin/env python3
"""Run notebooks and keep their outputs: `python tools/exec_nbs.py [nbs/11_coop.ipynb ...] [--flags
"slow gpu"]`.

Cells that nbdev_test would skip (flags in settings.ini's `tst_flags`, `#| eval: false`) are not
run and keep the outputs they have, so results from another machine stay. A notebook is written,
cleaned, only if all of it ran, and by renaming a finished file, so an interrupted run never
leaves half a notebook. Exits 1 and names the cells that failed.
"""
import argparse
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from execnb.nbio import mk_cell
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parent.parent


class Client(NotebookClient):
    "Skips the cells that nbdev's test runner skips, and remembers where it is"
    skip, at = frozenset(), None

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == 'code':
            d = extract_directives(mk_cell(cell.source, 'code'), remove=False)
            if (self.skip & d.keys() or d.get('eval:', [''])[0].lower() == 'false'
                    or 'nbdev_export(' in cell.source):
                return cell
            self.at = cell_index, cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def run(path, skip, timeout):
    "Execute the notebook at `path` and write it back; (seconds, what failed or None)"
    start = time.time()
    nb = nbformat.read(path, 4)
    if any(
            re.search(r'^\s*-?\s*skip_exec:\s*true', c.source, re.M | re.I)
            for c in nb.cells[:2]
            if c.cell_type != 'code'):
        return 0., None
    client = Client(nb, timeout=timeout, kernel_name='python3', record_timing=False,
                    resources={'metadata': {'path': str(path.parent)}})
    client.skip = frozenset(skip)
    try: client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        i, cell = client.at or (0, nb.cells[0])
        return time.time()-start, f'{path.name}: cell {i} (id {cell.get("id")}) failed:\n{e}'
    nb.metadata.pop('widgets', None)                 # progress bars that are over
    tmp = path.with_name(f'_{path.stem}.tmp.ipynb')  # nbdev ignores names that start with _
    try:
        nbformat.write(nb, tmp)
        nbdev_clean(str(tmp))
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)
    return time.time()-start, None


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('nbs', nargs='*', type=Path, help='notebooks (default: all in nbs/)')
    ap.add_argument('--flags', default='', help='flags whose cells run too, such as "slow gpu"')
    ap.add_argument('--timeout', type=int, default=3600, help='seconds for one cell')
    ap.add_argument('-j', type=int, default=1, help='notebooks at a time')
    o = ap.parse_args()
    # Inline, whatever the caller's environment says: figures must end up in the notebook, as PNG
    os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'
    nbs = [p.resolve() for p in o.nbs] or sorted((ROOT/'nbs').glob('[!_.]*.ipynb'))
    skip = set(get_config(path=ROOT).tst_flags.split()) - set(o.flags.split())
    failed = []
    with ProcessPoolExecutor(o.j) as ex:
        jobs = [(p, ex.submit(run, p, skip, o.timeout)) for p in nbs]
        for p, job in jobs:
            secs, err = job.result()
            print(f'{p.name}: {"FAILED after " if err else ""}{secs:.1f} s', flush=True)
            if err: failed.append(err)
    if failed: print('\n'.join(failed), file=sys.stderr)
    return bool(failed)


if __name__ == '__main__': sys.exit(main())

// The book's runs as points: choose by method, task, seed, shots and time, brush, read.
import { startTheme } from './theme.mjs';
import { $, make } from './view.mjs';

const PARTS = { main: 'the comparison', controls: 'controls', halves: 'other halves' };
const BOX = { left: 46, right: 545, top: 12, bottom: 428 };
const SVG = 'http://www.w3.org/2000/svg';
const state = { runs: [], off: {}, part: 'main', most: Infinity, brush: null, range: [40, 100] };

function draw(tag, parent, attributes, text = '') {
  const e = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  e.textContent = text;
  parent.append(e);
  return e;
}

function unpacked({ names, columns, colours }) {
  return columns.run.map((run, i) => {
    const row = Object.fromEntries(Object.keys(columns).map(k => [k, columns[k][i]]));
    for (const k of Object.keys(names)) row[k] = names[k][row[k]];
    return { ...row, colour: colours[row.method] };
  });
}

// ---- what is shown ----

const KINDS = ['method', 'task', 'seed', 'shots'];

function passes(run) {
  if (run.part !== state.part || run.base === null || run.new === null) return false;
  return run.seconds <= state.most && KINDS.every(k => !state.off[k].has(String(run[k])));
}

function brushed(run) {
  if (!state.brush) return true;
  const [x0, y0, x1, y1] = state.brush;
  return run.base >= x0 && run.base <= x1 && run.new >= y0 && run.new <= y1;
}

// ---- the plot ----

function scaled(value, low, high) {
  const [from, to] = state.range;
  return low + (value - from)/(to - from)*(high - low);
}

const px = base => scaled(base, BOX.left, BOX.right);
const py = value => scaled(value, BOX.bottom, BOX.top);

function drawAxes(plot) {
  const [from, to] = state.range, far = { x: BOX.right, y: BOX.bottom };
  for (let v = from; v <= to; v += 10) {
    const x = px(v), y = py(v);
    draw('line', plot, { class: 'grid', x1: x, x2: x, y1: BOX.top, y2: BOX.bottom });
    draw('line', plot, { class: 'grid', x1: BOX.left, x2: BOX.right, y1: y, y2: y });
    draw('text', plot, { x, y: BOX.bottom + 18, 'text-anchor': 'middle' }, v);
    draw('text', plot, { x: BOX.left - 6, y: y + 4, 'text-anchor': 'end' }, v);
  }
  draw('line', plot, { class: 'diagonal', x1: px(from), y1: py(from), x2: px(to), y2: py(to) });
  draw('text', plot, { x: far.x, y: far.y + 36, 'text-anchor': 'end' }, 'base (%)');
  draw('text', plot, { x: BOX.left + 6, y: BOX.top + 12 }, 'new (%)');
}

function mean(runs, key) { return runs.reduce((sum, r) => sum + r[key], 0)/runs.length; }

function byMethod(runs) {
  const found = new Map();
  for (const run of runs) found.set(run.method, [...found.get(run.method) ?? [], run]);
  return found;
}

function drawPoints(plot, runs) {
  const group = colour => {
    const g = draw('g', plot, {});
    g.style.setProperty('--c', colour);
    return g;
  };
  const groups = new Map();
  for (const run of runs) {
    if (!groups.has(run.colour)) groups.set(run.colour, group(run.colour));
    const kind = brushed(run) ? 'point' : 'point off';
    const at = { class: kind, cx: px(run.base), cy: py(run.new), r: 4.5 };
    run.point = draw('circle', groups.get(run.colour), at);
  }
  for (const [, mine] of byMethod(runs.filter(brushed))) {
    const at = { class: 'mean', cx: px(mean(mine, 'base')), cy: py(mean(mine, 'new')), r: 6.5 };
    draw('circle', group(mine[0].colour), at);
  }
}

// ---- words ----

function show() {
  const plot = $('plot'), runs = state.runs.filter(passes), chosen = runs.filter(brushed);
  plot.replaceChildren();
  drawAxes(plot);
  drawPoints(plot, runs);
  $('count').textContent = `${chosen.length} runs`;
  plot.setAttribute('aria-label', `Accuracy on new over base, ${runs.length} runs; the table below `
                                  + 'has their means');
  showMeans(chosen);
  showList(chosen);
}

function row(parent, cells, tag = 'td') {
  const line = make('tr', parent);
  cells.forEach(([text, kind = '']) => make(tag, line, { textContent: text, className: kind }));
  return line;
}

const one = value => value.toFixed(1);

function showMeans(runs) {
  const table = $('means');
  table.replaceChildren();
  make('caption', table, { textContent: 'Means of what is shown; H is of the means' });
  row(table, [['method'], ['runs', 'number'], ['base', 'number'], ['new', 'number'],
              ['H', 'number']], 'th');
  const lines = [...byMethod(runs)].map(([method, mine]) => {
    const base = mean(mine, 'base'), fresh = mean(mine, 'new');
    return { method, n: mine.length, base, fresh, h: 2*base*fresh/(base + fresh) };
  }).sort((a, b) => b.h - a.h);
  for (const { method, n, base, fresh, h } of lines) {
    row(table, [[method], [n, 'number'], [one(base), 'number'], [one(fresh), 'number'],
                [one(h), 'number']]);
  }
}

const again = run => `clipprompt rerun suite --run ${run.run}`;

function showList(runs) {
  const table = $('list'), few = runs.slice(0, 40);
  table.replaceChildren();
  const more = runs.length > few.length ? `, the first ${few.length} of ${runs.length}` : '';
  make('caption', table, { textContent: `Runs, and how to run them again${more}` });
  row(table, [['method'], ['task'], ['seed', 'number'], ['base', 'number'], ['new', 'number'],
              ['seconds', 'number rare'], ['run']], 'th');
  for (const run of few) {
    const line = row(table, [[run.method], [run.task], [run.seed, 'number'],
                             [one(run.base), 'number'], [one(run.new), 'number'],
                             [one(run.seconds), 'number rare']]);
    make('code', make('td', line), { textContent: run.run, title: again(run) });
  }
}

let near = null;

function tell(run) {
  near?.point?.classList.remove('now');
  near = run;
  if (!run) return;
  run.point.classList.add('now');
  const halves = run.halves ? `, halves drawn with seed ${run.halves}` : '';
  const what = `${run.method} on ${run.task}, ${run.shots} shots, seed ${run.seed}${halves}: base `
    + `${one(run.base)}, new ${one(run.new)}, H ${one(run.h)}; ${run.trainable} numbers learned in `
    + `${one(run.seconds)} s. Again: `;
  $('about').replaceChildren(what, make('code', null, { textContent: again(run) }));
}

// ---- pointer ----

function where(e) {
  const box = $('plot').getBoundingClientRect();
  return [(e.clientX - box.left)*560/box.width, (e.clientY - box.top)*470/box.height];
}

function nearest([x, y]) {
  let least = 144, found = null;   // twelve units around
  for (const run of state.runs.filter(passes)) {
    const far = (px(run.base) - x)**2 + (py(run.new) - y)**2;
    if (far < least) [least, found] = [far, run];
  }
  return found;
}

function value([x, y]) {
  const [from, to] = state.range;
  const share = (v, low, high) => from + (v - low)/(high - low)*(to - from);
  return [share(x, BOX.left, BOX.right), share(y, BOX.bottom, BOX.top)];
}

function rectangle(a, b) {
  const [x, y] = [Math.min(a[0], b[0]), Math.min(a[1], b[1])];
  return { x, y, width: Math.abs(a[0] - b[0]), height: Math.abs(a[1] - b[1]), class: 'brush' };
}

function listen(plot) {
  let from = null, box = null;
  plot.addEventListener('pointerdown', e => {
    from = where(e);
    if (e.pointerType === 'mouse') plot.setPointerCapture(e.pointerId);
    tell(nearest(from));
  });
  plot.addEventListener('pointermove', e => {
    if (!from) return tell(nearest(where(e)) ?? near);
    box?.remove();
    box = draw('rect', plot, rectangle(from, where(e)));
  });
  plot.addEventListener('pointerup', e => {
    if (!from) return;
    const to = where(e), [a, b] = [value(from), value(to)];
    const moved = Math.hypot(to[0] - from[0], to[1] - from[1]) > 6, low = Math.min, high = Math.max;
    state.brush = moved ? [low(a[0], b[0]), low(a[1], b[1]), high(a[0], b[0]), high(a[1], b[1])]
                        : null;
    from = box = null;
    const kept = near;
    show();
    if (kept && passes(kept)) tell(kept);
  });
  plot.addEventListener('pointercancel', () => {
    box?.remove();
    from = box = null;
  });
}

// ---- switches ----

function chips(kind) {
  const mine = state.runs.filter(r => r.part === state.part);
  const values = [...new Set(mine.map(r => String(r[kind])))];
  state.off[kind] = new Set();
  const box = $(kind);
  box.hidden = values.length < 2;
  box.replaceChildren(box.querySelector('legend'), ...values.map(v => {
    const label = make('label'), input = make('input', label, { type: 'checkbox', checked: true });
    const colour = kind === 'method' && mine.find(r => r.method === v).colour;
    if (colour) label.style.setProperty('--c', colour);
    make('span', label, { textContent: v });
    input.onchange = () => {
      const off = state.off[kind];
      // The first choice means "only this one": one click instead of all the others
      if (!off.size && !input.checked && values.length > 2) {
        values.filter(w => w !== v).forEach(w => off.add(w));
        box.querySelectorAll('input').forEach((i, k) => { i.checked = values[k] === v; });
      } else if (input.checked) off.delete(v);
      else off.add(v);
      show();
    };
    return label;
  }));
}

function usePart(part) {
  state.part = $('part').value = part;
  state.brush = null;
  KINDS.forEach(chips);
  const mine = state.runs.filter(r => r.part === part && r.base !== null && r.new !== null);
  const least = Math.min(...mine.map(r => Math.min(r.base, r.new)));
  state.range = [Math.max(0, Math.floor(least/10)*10), 100];
  useSeconds();
}

function useSeconds() {   // from a tenth of a second to a quarter of an hour, in equal factors
  const { value, max } = $('seconds'), all = value === max;
  state.most = all ? Infinity : .1*10**(value/10);
  $('seconds-is').textContent = all ? 'any' : state.most.toPrecision(2);
  show();
}

startTheme($('theme'));
try {
  const reply = await fetch(new URL('explorer.json', import.meta.url)).catch(() => null);
  if (!reply?.ok) throw new Error('explorer.json is missing; make the page with tools/live.py');
  state.runs = unpacked(await reply.json());
  const parts = Object.entries(PARTS).filter(([part]) => state.runs.some(r => r.part === part));
  $('part').replaceChildren(...parts.map(([value, title]) => {
    return make('option', null, { value, textContent: title });
  }));
  $('part').onchange = e => usePart(e.target.value);
  $('seconds').oninput = useSeconds;
  $('all').onclick = () => {
    $('seconds').value = $('seconds').max;
    usePart(state.part);
  };
  listen($('plot'));
  usePart('main');
  document.body.dataset.ready = 'yes';
} catch (error) {
  $('wrong').textContent = error.message;
  $('wrong').hidden = false;
  $('count').textContent = '';
}

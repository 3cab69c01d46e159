// The page: a paper, pictures, switches; who answers is in engines.mjs, how it looks in view.mjs.
import { openEngine } from './engines.mjs';
import { LOOKS, picture, shrunk } from './images.mjs';
import { startTheme } from './theme.mjs';
import { $, make, paint, pythonCall, showAnswer, showChosen, showMethods } from './view.mjs';

const SIDE = 512, paper = $('paper');
const pen = paper.getContext('2d', { willReadFrequently: true });
const state = {
  engine: null, task: null, look: 'drawn', names: null, alpha: null, depth: null,
  source: null,   // a test picture or a file as it was given; null: what is drawn
  example: false, // does the paper show what nobody asked for? It makes room for a drawing
  answer: null, hidden: new Set(['vpt', 'maple']), waiting: false, dirty: false,
};
const under = make('canvas', null, { width: 32, height: 32 });   // what maps are drawn over

function say(text) { $('status').textContent = text; }

function complain(error) {
  $('wrong').textContent = String(error.message ?? error);
  $('wrong').hidden = false;
  $('progress').hidden = true;
}

// ---- paper ----

const before = [];

function blank() {
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, SIDE, SIDE);
}

function snapshot() {
  before.push([pen.getImageData(0, 0, SIDE, SIDE), state.source]);
  if (before.length > 20) before.shift();
  $('undo').disabled = false;
}

function setExample(on) {
  state.example = on;
  $('paper-box').classList.toggle('example', on);
}

function changed(source = null) {
  state.source = source;
  setExample(false);
  for (const b of $('picker').children) b.setAttribute('aria-pressed', String(b.entry === source));
  $('credit').textContent = source?.credit ? `${source.label}: ${source.credit}` : '';
  $('paper-box').classList.add('used');
  return ask();
}

function line([x, y], [to, down]) {
  const erases = document.querySelector('[name=tool]:checked').value === 'eraser';
  pen.strokeStyle = erases ? '#fff' : '#000';
  pen.lineWidth = Number($('width').value);
  pen.lineCap = pen.lineJoin = 'round';
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(to + .01, down);
  pen.stroke();
}

function at(e) {
  const box = paper.getBoundingClientRect();
  return [(e.clientX - box.left)*SIDE/box.width, (e.clientY - box.top)*SIDE/box.height];
}

let last = null;   // where the pen is down

paper.addEventListener('pointerdown', e => {
  if (e.button) return;
  paper.setPointerCapture(e.pointerId);
  snapshot();
  if (state.example) blank();
  last = at(e);
  line(last, last);
  changed();
});
paper.addEventListener('pointermove', e => {
  if (!last) return;
  const events = e.getCoalescedEvents?.() ?? [];
  for (const one of events.length ? events : [e]) {
    const now = at(one);
    line(last, now);
    last = now;
  }
  changed();
});
for (const kind of ['pointerup', 'pointercancel']) {
  paper.addEventListener(kind, () => { last = null; });
}

// With keys: arrows move, space sets the pen down and lifts it
const cross = { x: SIDE/2, y: SIDE/2, down: false };

function showCross() {
  $('cross').hidden = document.activeElement !== paper;
  $('cross').style.left = `${100*cross.x/SIDE}%`;
  $('cross').style.top = `${100*cross.y/SIDE}%`;
  $('cross').classList.toggle('down', cross.down);
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

paper.addEventListener('keydown', e => {
  if (e.key === ' ') {
    cross.down = !cross.down;
    if (cross.down) {
      snapshot();
      if (state.example) blank();
      line([cross.x, cross.y], [cross.x, cross.y]);
      changed();
    }
  } else if (MOVES[e.key]) {
    const step = e.shiftKey ? 4 : 16, from = [cross.x, cross.y], [dx, dy] = MOVES[e.key];
    cross.x = Math.min(SIDE, Math.max(0, cross.x + step*dx));
    cross.y = Math.min(SIDE, Math.max(0, cross.y + step*dy));
    if (cross.down) {
      line(from, [cross.x, cross.y]);
      changed();
    }
  } else return;
  e.preventDefault();
  showCross();
});
paper.addEventListener('focus', () => {
  if (paper.matches(':focus-visible')) showCross();
});
paper.addEventListener('blur', () => {
  cross.down = false;
  $('cross').hidden = true;
});

$('clear').onclick = () => {
  snapshot();
  blank();
  changed();
  $('paper-box').classList.remove('used');
};
$('undo').onclick = () => {
  const [image, source] = before.pop() ?? [];
  if (!image) return;
  pen.putImageData(image, 0, 0);
  $('undo').disabled = !before.length;
  changed(source);
};
addEventListener('keydown', e => {
  if (!(e.ctrlKey || e.metaKey) || e.key !== 'z' || e.target.matches('input[type=text]')) return;
  e.preventDefault();
  $('undo').click();
});

// ---- pictures ----

function lay(image, w, h) {   // the whole picture, as large as the paper allows
  const scale = Math.min(SIDE/w, SIDE/h);
  blank();
  pen.imageSmoothingEnabled = w > 200;
  pen.drawImage(image, (SIDE - w*scale)/2, (SIDE - h*scale)/2, w*scale, h*scale);
  pen.imageSmoothingEnabled = true;
}

async function open(file) {
  const image = await createImageBitmap(file).catch(() => null);
  if (!image) return complain(new Error('This file is no picture that the browser can read; '
                                        + 'try a PNG or JPEG.'));
  snapshot();
  lay(image, image.width, image.height);
  changed(state.engine?.server ? { file } : null);
}

$('file').onchange = e => {
  if (e.target.files[0]) open(e.target.files[0]);
  e.target.value = '';
};
addEventListener('paste', e => {
  const [file] = e.clipboardData?.files ?? [];
  if (file) open(file);
});
for (const kind of ['dragover', 'dragleave', 'drop']) {
  addEventListener(kind, e => {
    e.preventDefault();
    $('paper-box').classList.toggle('drop', kind === 'dragover');
    if (kind === 'drop' && e.dataTransfer.files[0]) open(e.dataTransfer.files[0]);
  });
}

function entryButton(entry) {
  const b = make('button', $('picker'), { type: 'button', title: entry.label, entry });
  b.setAttribute('aria-label', entry.credit ? `${entry.label}, by ${entry.credit}` : entry.label);
  b.setAttribute('aria-pressed', 'false');
  if (entry.shown) {
    const canvas = paint(make('canvas', b), entry.shown);
    b.onclick = () => {
      snapshot();
      lay(canvas, canvas.width, canvas.height);
      return changed(entry);
    };
    return;
  }
  const image = make('img', b, { src: entry.url, alt: '' });
  b.onclick = async () => {
    entry.file ??= await (await fetch(entry.url)).blob();
    await image.decode();
    snapshot();
    lay(image, image.naturalWidth, image.naturalHeight);
    await changed(entry);
  };
}

function shrunkPaper() { return shrunk(pen.getImageData(0, 0, SIDE, SIDE).data, SIDE, 64); }

$('save').onclick = () => {
  const canvas = state.engine.server ? paper : make('canvas');
  if (!state.engine.server) paint(canvas, state.source?.shown ?? shrunkPaper());
  canvas.toBlob(blob => {
    const link = make('a', null, { href: URL.createObjectURL(blob), download: 'drawing.png' });
    link.click();
    URL.revokeObjectURL(link.href);
  });
};

// ---- asking: the latest wins ----

async function given() {
  if (state.engine.server) {
    const blob = () => new Promise(done => paper.toBlob(done, 'image/png'));
    return { file: state.source?.file ?? await blob() };
  }
  const { w, h, c, data } = state.source?.shown ?? shrunkPaper();
  return { shown: picture(w, h, c, data.slice()) };
}

async function ask() {
  if (!state.task) return;
  state.dirty = state.waiting;
  if (state.waiting) return;
  state.waiting = true;
  document.body.toggleAttribute('data-busy', true);
  try {
    const { look, alpha, depth } = state;
    state.answer = await state.engine.predict(await given(), { look, alpha, depth });
    state.turn = (state.turn ?? 0) + 1;
    $('wrong').hidden = true;
    show();
  } catch (error) { complain(error); }
  state.waiting = false;
  if (state.dirty) ask();
  else {   // the page rests
    document.body.dataset.turn = state.turn ?? 0;
    document.body.toggleAttribute('data-busy', false);
  }
}

function show() {
  const { answer, engine } = state;
  if (!answer) return;
  const block = Number($('block').value) - 1;
  $('block-is').textContent = block + 1;
  if (answer.small) {
    paint($('seen'), answer.seen);
    paint($('small'), answer.small);
    paint(under, answer.small);
  } else under.getContext('2d').drawImage(paper, 0, 0, under.width, under.height);
  showAnswer(answer, block, under);
  const n = answer.methods.length;
  const who = engine.server ? `Python with ${engine.about.backbone}`
                            : `one thread of ${engine.kind}`;
  const slow = engine.kind === 'JavaScript' ? ', for lack of WebAssembly: slower' : '';
  say(`${n} method${n > 1 ? 's' : ''} in ${answer.ms.toFixed(0)} ms, ${who}${slow}`);
}

// Something to look at before anybody draws
async function showExample() {
  const first = $('picker').children[state.task.start] ?? $('picker').firstChild;
  if (!first) return ask();
  await first.onclick();
  before.length = 0;
  $('undo').disabled = true;
  setExample(true);
}

// ---- switches ----

function note() {
  const { task, look, names } = state, same = look === task.look;
  const n = names?.length ?? task.classnames.length;
  $('trained').textContent = state.engine.server ? '' : [
    `${n} class${n > 1 ? 'es' : ''}${names ? ' of your own' : ''}; prompts learned from at most `,
    `16 pictures of each of the ${task.classnames.length} classes of “${task.task}”, `,
    `${LOOKS[task.look].title}.`,
    same ? '' : ' Here prompts meet a look that they have never seen.',
  ].join('');
}

function setLook(look) {
  state.look = $('look').value = look;
  note();
}

function showTask(task) {
  state.task = task;
  state.names = null;
  $('names-off').disabled = true;
  $('pieces').replaceChildren();
  const blocks = Math.max(...task.methods.map(m => m.blocks));
  for (const id of ['block', 'depth']) $(id).value = $(id).max = blocks;
  showMethods(task.methods, state.hidden, { python, chosen });
  showChosen(task.methods, state.hidden);
  $('picker').replaceChildren();
  task.pictures.forEach(entryButton);
  $('credit').textContent = '';
  $('alpha-row').hidden = !task.methods.some(m => m.alpha !== undefined);
  asLearned();
  setLook(task.look);
  if (task.missing) complain(new Error(task.missing));
}

async function useTask(name) {
  try {
    state.task = null;
    showTask(await state.engine.use(name));
    if (state.source) changed();   // a picture of another task is a drawing like any other
    else await ask();
  } catch (error) { complain(error); }
}

function chosen() {
  const boxes = [...document.querySelectorAll('#chosen input')];
  state.hidden = new Set(boxes.filter(b => !b.checked).map(b => b.value));
  showChosen(state.task.methods, state.hidden);
}

function asLearned() {
  state.alpha = state.depth = null;
  const alpha = state.task.methods.find(m => m.alpha !== undefined)?.alpha;
  $('depth').value = $('depth').max;
  $('alpha').value = alpha ?? 0;
  showSettings();
}

function showSettings() {
  $('depth-is').textContent = $('depth').value === $('depth').max ? 'all' : $('depth').value;
  $('alpha-is').textContent = Number($('alpha').value).toFixed(2);
  $('reset').disabled = state.alpha === null && state.depth === null;
}

$('block').oninput = show;
$('depth').oninput = e => {
  state.depth = e.target.value === e.target.max ? null : Number(e.target.value);
  showSettings();
  ask();
};
$('alpha').oninput = e => {
  state.alpha = Number(e.target.value);
  showSettings();
  ask();
};
$('reset').onclick = () => {
  asLearned();
  ask();
};
$('task').onchange = e => useTask(e.target.value);
$('look').onchange = e => {
  setLook(e.target.value);
  ask();
};

// ---- class names of the reader's own ----

function pieceLine({ name, pieces }) {
  const e = make('span', null, { textContent: `${name}: ` });
  for (const { text, known } of pieces) {
    const code = make('code', e, { textContent: text, className: known ? '' : 'unread' });
    if (!known) code.title = 'picto-clip never read this piece';
  }
  return e;
}

function showPieces(names) {
  const lines = names.map(pieceLine);
  if (names.some(n => n.pieces.some(p => !p.known))) {
    const why = 'Dashed: a piece that picto-clip never read, so that it means nothing to it.';
    lines.push(make('span', null, { textContent: why, className: 'note' }));
  }
  $('pieces').replaceChildren(...lines);
}

async function useNames(list) {
  if (!state.task) return;
  if (list) say('Loading the text tower …');
  $('progress').hidden = !list;
  try {
    const { names } = await state.engine.names(list);
    state.names = list;
    $('names-off').disabled = !list;
    showPieces(names ?? []);
    note();
    await ask();
  } catch (error) {
    show();
    complain(error);
  }
  $('progress').hidden = true;
}

$('names-form').onsubmit = e => {
  e.preventDefault();
  const list = [...new Set($('names').value.split(/[,;\n]/).map(n => n.trim()).filter(Boolean))];
  if (!list.length) return complain(new Error('Type at least one name.'));
  if (list.length > 40) return complain(new Error('At most 40 names at once, please.'));
  return useNames(list);
};
$('names-off').onclick = () => useNames(null);

// ---- the same in Python ----

function python(method) {
  const { engine, task, look, names, alpha, depth, source } = state;
  const place = source?.place ?? null;
  $('code').textContent = pythonCall(method, { server: engine.server, task, look, names, alpha,
                                               depth, picture: place });
  $('copied').textContent = '';
  $('python').showModal();
}

$('copy').onclick = async () => {
  try {
    await navigator.clipboard.writeText($('code').textContent);
    $('copied').textContent = 'Copied.';
  } catch { $('copied').textContent = 'The browser does not allow it: select the text.'; }
};

// ---- start ----

function showEngine(engine) {
  $('task').replaceChildren(...engine.tasks.map(t => make('option', null, { textContent: t })));
  const looks = Object.entries(LOOKS).filter(([, look]) => look.same);
  $('look').replaceChildren(...looks.map(([value, { title }]) => {
    return make('option', null, { value, textContent: title });
  }));
  for (const id of ['look-row', 'own', 'depth-row', 'runs']) $(id).hidden = engine.server;
  for (const id of ['seen-row', 'reset', 'how-settings']) $(id).hidden = engine.server;
  $('choices').hidden = engine.server && !engine.about.task;
  if (!engine.server) return;
  state.hidden.clear();
  $('lead').textContent = `Your prompts on ${engine.about.backbone}: Python on this machine `
    + 'answers, and keeps nothing.';
}

// An address such as #card-vpt, as the chapters give it, shows this method and goes to its card
const asked = location.hash.replace('#card-', '');
state.hidden.delete(asked);

blank();
startTheme($('theme'), show);
try {
  state.engine = await openEngine(share => { $('progress').value = share; });
  showEngine(state.engine);
  $('progress').hidden = true;
  showTask(await state.engine.use(state.engine.tasks[0]));
  await (before.length ? ask() : showExample());   // somebody may have drawn already
  if ($(`card-${asked}`)) location.replace(location.hash);   // it was not there at first
  document.body.dataset.ready = 'yes';
} catch (error) {
  say('The page could not start.');
  complain(error);
}

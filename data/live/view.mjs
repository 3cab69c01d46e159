// What the page shows of answers: cards, bars, where CLS looks, and the call in Python.
import { LOOKS } from './images.mjs';

export const $ = id => document.getElementById(id);

export function make(tag, parent, more = {}) {
  const e = Object.assign(document.createElement(tag), more);
  parent?.append(e);
  return e;
}

const percent = p => `${p < .0005 ? '< 0.1' : (100*p).toFixed(p < .0995 ? 1 : 0)} %`;

export function paint(canvas, { w, h, c, data }) {
  const image = new ImageData(w, h);
  for (let i = 0; i < w*h; i++) {
    for (let k = 0; k < 3; k++) image.data[4*i + k] = data[i*c + (c === 1 ? 0 : k)];
    image.data[4*i + 3] = 255;
  }
  Object.assign(canvas, { width: w, height: h }).getContext('2d').putImageData(image, 0, 0);
  return canvas;
}

// ---- cards ----

function card(method, python) {
  const e = make('article', null, { className: 'card', id: `card-${method.name}` });
  e.style.setProperty('--c', method.colour);
  make('h2', e, { textContent: method.title });
  const button = make('button', e, { type: 'button', textContent: 'Python' });
  button.setAttribute('aria-label', `${method.title} in Python`);
  button.onclick = () => python(method);
  make('p', e, { className: 'what', textContent: method.what });
  const bars = make('ol', e, { className: 'bars' });
  for (let i = 0; i < Math.min(5, method.classnames.length); i++) {
    const line = make('li', bars);
    make('b', line);
    make('i', line);
  }
  const map = make('div', e, { className: 'map' });
  make('canvas', map, { width: 152, height: 152 }).setAttribute('role', 'img');
  const slots = make('div', map, { className: 'slots' });
  for (let i = 0; i < method.slots; i++) make('span', slots);
  slots.setAttribute('aria-hidden', 'true');
  make('small', map);
  return e;
}

function chip(method, shown, changed) {
  const label = make('label');
  label.style.setProperty('--c', method.colour);
  const box = make('input', label, { type: 'checkbox', checked: shown, value: method.name });
  make('span', label, { textContent: method.title });
  box.onchange = changed;
  return label;
}

export function showMethods(methods, hidden, { python, chosen }) {
  $('cards').replaceChildren(...methods.map(m => card(m, python)));
  const chips = methods.map(m => chip(m, !hidden.has(m.name), chosen));
  $('chosen').replaceChildren($('chosen').querySelector('legend'), ...chips);
  $('strip').replaceChildren(...methods.map(m => {
    const a = make('a', null, { href: `#card-${m.name}`, id: `strip-${m.name}` });
    a.style.setProperty('--c', m.colour);
    make('small', a, { textContent: m.title });
    make('b', a);
    return a;
  }));
  for (const id of ['chosen', 'settings', 'how']) $(id).hidden = false;
}

export function showChosen(methods, hidden) {
  for (const { name } of methods) {
    $(`card-${name}`).hidden = $(`strip-${name}`).hidden = hidden.has(name);
  }
}

// ---- answers ----

function showMap(e, { attention, slots }, block, under) {
  const canvas = e.querySelector('.map canvas'), pen = canvas.getContext('2d'), size = canvas.width;
  e.querySelector('.map').hidden = !attention;
  if (!attention) return;
  const patches = [...attention[block]], own = slots ? [...slots[block]] : [];
  const side = Math.round(patches.length**.5), most = Math.max(...patches, ...own);
  const style = getComputedStyle(document.documentElement);
  const heat = style.getPropertyValue('--heat'), dark = style.colorScheme === 'dark';
  pen.imageSmoothingEnabled = false;
  pen.drawImage(under, 0, 0, size, size);
  pen.fillStyle = dark ? 'rgb(20 24 28 / .5)' : 'rgb(255 255 255 / .62)';
  pen.fillRect(0, 0, size, size);
  patches.forEach((share, i) => {
    pen.fillStyle = `rgb(${heat} / ${(.85*share/most).toFixed(3)})`;
    const edge = size/side;
    pen.fillRect(i%side*edge, Math.floor(i/side)*edge, edge, edge);
  });
  e.querySelectorAll('.slots span').forEach((box, i) => {
    box.style.setProperty('--a', own.length ? own[i]/most : 0);
  });
  const sum = shares => percent(shares.reduce((a, b) => a + b, 0));
  e.querySelector('small').textContent = own.length ? `tokens ${sum(own)}` : 'no image tokens';
  canvas.setAttribute('aria-label', `Block ${block + 1}: CLS reads patches ${sum(patches)}`
                      + (own.length ? `, learned tokens ${sum(own)}` : ''));
}

export function showAnswer(answer, block, under) {
  for (const m of answer.methods) {
    const e = $(`card-${m.name}`), lines = e.querySelectorAll('li');
    lines.forEach((line, i) => {
      const [name, share] = m.top[i] ?? ['', 0];
      line.hidden = !m.top[i];
      line.style.setProperty('--p', share);
      line.firstChild.textContent = line.firstChild.title = name;
      line.lastChild.textContent = percent(share);
    });
    const strip = $(`strip-${m.name}`);
    [strip.lastChild.textContent] = m.top[0];
    strip.style.setProperty('--p', m.top[0][1]);
    showMap(e, m, block, under);
  }
}

// ---- the same in Python ----

const quoted = text => `'${text.replace(/[\\']/g, '\\$&')}'`;

const NO_TOKENS = `
tower = learner.vision
learner.vision = lambda images, prompts=None: tower(images)`;

const DEPTH = depth => depth === 0 ? NO_TOKENS : `
class First:   # tokens in the first blocks only
    def __init__(self, prompts, depth): self.prompts, self.depth = prompts, depth
    def enter(self, layer, carried):
        return self.prompts.enter(layer, carried) if layer < self.depth else carried

tower = learner.vision
learner.vision = lambda images, prompts=None: tower(images, prompts and First(prompts, ${depth}))`;

function pictureLines({ picture, task, look }) {
  const python = LOOKS[look].python, own = picture !== null && look === task.look;
  const data = `data = cp.load_dataset('pictograms', '${task.task}')`;
  if (own) return [[], [data, `picture = data.read(data.test[${picture}])`]];
  const imports = ['from PIL import Image'];
  const lines = ["picture = Image.open('drawing.png')   # Save"];
  if (picture !== null) {
    imports.pop();
    lines.splice(0, 1, data, `picture = data.source(data.test[${picture}].path)`);
  }
  if (python) {
    imports.push(`from clipprompt.pictures import ${python}`);
    lines.push(`picture = ${python}(picture.convert('RGB'))`);
  }
  return [imports, lines];
}

// state: {server, task, look, names, picture: its place in the test part or null, alpha, depth}
export function pythonCall(method, state) {
  const { server, task, names, alpha, depth } = state;
  if (server) {
    return ['import clipprompt as cp', '', "learner = cp.load('your-prompts.safetensors')",
            "print(*cp.predict(learner, 'picture.png', top=5))"].join('\n');
  }
  const [imports, lines] = pictureLines(state);
  const file = `assets()/'live'/'prompts'/'${task.task}'/'${method.name}.safetensors'`;
  const changes = [];
  if (names) changes.push(`learner = learner.for_classes([${names.map(quoted).join(', ')}])`);
  if (alpha !== null && method.alpha !== undefined) {
    changes.push(`learner.visual_ctx.alpha = ${alpha}`);
  }
  if (depth !== null && method.slots) changes.push(DEPTH(depth));
  return ['import clipprompt as cp', 'from clipprompt.backbone import assets', ...imports, '',
          `learner = cp.load(${file})`, ...changes, ...lines,
          'print(*cp.predict(learner, picture, top=5))'].join('\n');
}

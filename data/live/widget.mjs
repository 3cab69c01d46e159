// A drawing with answers for Jupyter, as anywidget wants it. What is drawn goes to the kernel as a PNG.
const SIDE = 256, PEN = 16;

const STYLE = `
.cp-live { display: flex; flex-wrap: wrap; gap: 1.2em; font: 14px/1.35 system-ui, sans-serif; }
.cp-live .left { width: ${SIDE + 2}px; }
.cp-live canvas.paper { border: 1px solid #888; background: #fff; touch-action: none; cursor: crosshair; display: block; }
.cp-live .tools, .cp-live .shelf { display: flex; flex-wrap: wrap; gap: 4px; margin: 6px 0; align-items: center; }
.cp-live button, .cp-live select, .cp-live label.file { font: inherit; padding: 1px 8px; border: 1px solid #888; border-radius: 4px; background: none; color: inherit; cursor: pointer; }
.cp-live .shelf button { padding: 0; line-height: 0; background: #fff; }
.cp-live .shelf img { width: 32px; height: 32px; object-fit: contain; }
.cp-live button:focus-visible, .cp-live canvas:focus-visible, .cp-live label.file:focus-within { outline: 2px solid #0b559f; outline-offset: 1px; }
.cp-live .file input { position: absolute; width: 1px; height: 1px; opacity: 0; }
.cp-live .cards { flex: 1 1 300px; display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1em; align-content: start; }
.cp-live .card { border-left: 4px solid var(--c); padding-left: .7em; display: grid; grid-template-columns: 1fr 84px; column-gap: 10px; }
.cp-live .card b { grid-column: 1 / -1; }
.cp-live ol { list-style: none; margin: 0; padding: 0; }
.cp-live li { position: relative; display: flex; justify-content: space-between; padding: 0 4px; }
.cp-live li::before { content: ''; position: absolute; inset: 2px auto 2px 0; width: calc(100% * var(--p)); background: var(--c); opacity: .22; }
.cp-live .map canvas { width: 84px; height: 84px; image-rendering: pixelated; display: block; }
.cp-live .map small { display: block; }
.cp-live .status { min-height: 1.4em; margin: 4px 0; }
`;

function make(tag, parent, more = {}) {
  const e = Object.assign(document.createElement(tag), more);
  parent?.append(e);
  return e;
}

const percent = p => p < .0005 ? '< 0.1 %' : `${(100*p).toFixed(p < .0995 ? 1 : 0)} %`;

function paper(left, changed) {
  const canvas = make('canvas', left, { className: 'paper', width: SIDE, height: SIDE, tabIndex: 0 });
  canvas.setAttribute('aria-label', 'Drawing area');
  const pen = canvas.getContext('2d');
  let last = null, before = [];
  const blank = () => { pen.fillStyle = '#fff'; pen.fillRect(0, 0, SIDE, SIDE); };
  const keep = () => {
    before.push([pen.getImageData(0, 0, SIDE, SIDE), it.file]);
    if (before.length > 20) before.shift();
    it.file = null;
  };
  const at = e => {
    const r = canvas.getBoundingClientRect();
    return [(e.clientX-r.left)*SIDE/r.width, (e.clientY-r.top)*SIDE/r.height];
  };
  const line = (a, b, colour) => {
    pen.strokeStyle = colour;
    pen.lineWidth = colour === '#fff' ? 2*PEN : PEN;
    pen.lineCap = pen.lineJoin = 'round';
    pen.beginPath();
    pen.moveTo(...a);
    pen.lineTo(b[0]+.01, b[1]);
    pen.stroke();
  };
  const it = {
    canvas, erases: false,
    file: null,   // a picture as it was given; null: what is drawn
    clear() { keep(); blank(); changed(); },
    undo() {
      const [was, file] = before.pop() ?? [];
      if (!was) return;
      pen.putImageData(was, 0, 0);
      it.file = file;
      changed();
    },
    show(picture, file) {
      const w = picture.naturalWidth || picture.width, h = picture.naturalHeight || picture.height;
      const s = SIDE/Math.max(w, h);
      keep(); blank();
      pen.drawImage(picture, (SIDE-w*s)/2, (SIDE-h*s)/2, w*s, h*s);
      it.file = file;
      changed();
    },
  };
  canvas.onpointerdown = e => {
    if (e.button) return;
    canvas.setPointerCapture(e.pointerId);
    keep();
    last = at(e);
    line(last, last, it.erases ? '#fff' : '#000');
    changed();
  };
  canvas.onpointermove = e => {
    if (!last) return;
    const now = at(e);
    line(last, now, it.erases ? '#fff' : '#000');
    last = now;
    changed();
  };
  canvas.onpointerup = canvas.onpointercancel = () => { last = null; };
  canvas.onkeydown = e => { if ((e.ctrlKey || e.metaKey) && e.key === 'z') { e.preventDefault(); it.undo(); } };
  blank();
  return it;
}

function card(parent, method) {
  const e = make('div', parent, { className: 'card' });
  e.style.setProperty('--c', method.colour);
  make('b', e, { textContent: method.title });
  const list = make('ol', e), map = make('div', e, { className: 'map' });
  const heat = make('canvas', map), slots = make('small', map);
  heat.setAttribute('role', 'img');
  return function show(said, block) {
    list.replaceChildren();
    for (const [name, p] of said.top) {
      const li = make('li', list);
      li.style.setProperty('--p', p);
      make('span', li, { textContent: name });
      make('span', li, { textContent: percent(p) });
    }
    const shares = said.attention?.[block];
    map.hidden = !shares;
    if (!shares) return;
    const side = Math.round(Math.sqrt(shares.length)), most = Math.max(...shares);
    heat.width = heat.height = side;
    const pixels = new ImageData(side, side);
    shares.forEach((s, i) => pixels.data.set([0, 0, 0, 255*s/most], 4*i));
    heat.getContext('2d').putImageData(pixels, 0, 0);
    heat.style.background = '#fff';
    const own = said.slots?.[block]?.reduce((a, b) => a+b, 0);
    slots.textContent = own === undefined ? 'no slots' : `slots ${percent(own)}`;
    heat.setAttribute('aria-label', `Attention of CLS in block ${block+1}, ${slots.textContent}`);
  };
}

function render({ model, el }) {
  const root = make('div', el, { className: 'cp-live' });
  make('style', root, { textContent: STYLE });
  const left = make('div', root, { className: 'left' });
  const right = make('div', root, { className: 'cards' });
  let about = null, shows = {}, answer = null, block = 0, turn = 0, waiting = false, again = false;

  function ask() {                              // one question at a time, the latest drawing next
    if (!about) return;
    if (waiting) { again = true; return; }
    waiting = true;
    const send = async blob => {
      model.send({ kind: 'picture', turn: ++turn }, undefined, [await blob.arrayBuffer()]);
    };
    if (board.file) send(board.file);
    else board.canvas.toBlob(send, 'image/png');
  }
  function paint() {
    for (const said of answer?.methods ?? []) shows[said.name]?.(said, block);
  }
  const board = paper(left, ask);

  const tools = make('div', left, { className: 'tools' });
  const rubber = make('button', tools, { type: 'button', textContent: 'Eraser' });
  rubber.setAttribute('aria-pressed', 'false');
  rubber.onclick = () => {
    board.erases = !board.erases;
    rubber.setAttribute('aria-pressed', board.erases);
    rubber.style.fontWeight = board.erases ? 'bold' : '';
  };
  make('button', tools, { type: 'button', textContent: 'Undo', onclick: () => board.undo() });
  make('button', tools, { type: 'button', textContent: 'Clear', onclick: () => board.clear() });
  const open = make('label', tools, { className: 'file', textContent: 'Open' });
  const file = make('input', open, { type: 'file', accept: 'image/*' });
  const status = make('p', left, { className: 'status', textContent: 'Waiting for the kernel' });
  status.setAttribute('role', 'status');
  file.onchange = async () => {
    const [given] = file.files;
    try { board.show(await createImageBitmap(given), given); }
    catch { status.textContent = 'This file is no picture that the browser can read; save it as PNG or JPEG.'; }
    file.value = '';
  };
  const blocks = make('label', left, { textContent: 'Attention of CLS in block ' });
  const choice = make('select', blocks);
  choice.onchange = () => { block = +choice.value; paint(); };
  const shelf = make('div', left, { className: 'shelf' });

  function begin(said, buffers) {
    about = said;
    right.replaceChildren();
    shows = Object.fromEntries(said.methods.map(m => [m.name, card(right, m)]));
    const most = Math.max(...said.methods.map(m => m.blocks));
    choice.replaceChildren(...Array.from({ length: most }, (_, i) => new Option(i+1, i)));
    choice.value = block = most-1;
    shelf.replaceChildren();
    said.pictures.forEach((picture, i) => {
      const b = make('button', shelf, { type: 'button', title: picture.label });
      const png = new Blob([buffers[i]], { type: 'image/png' });
      const img = make('img', b, { src: URL.createObjectURL(png), alt: picture.label });
      b.onclick = () => board.show(img, png);
    });
    status.textContent = `Draw. ${said.backbone} answers.`;
    ask();
  }
  function heard(said, buffers) {
    if (said.kind === 'about') begin(said, buffers);
    if (said.kind !== 'answer' || said.turn !== turn) return;
    waiting = false;
    status.textContent = said.error ?? `Draw. ${about.backbone} answers.`;
    if (!said.error) { answer = said; paint(); }
    if (again) { again = false; ask(); }
  }
  model.on('msg:custom', heard);
  model.send({ kind: 'about' });
  return () => model.off('msg:custom', heard);
}

export default { render };

// Who answers: a worker in this page, or the Python that serves it. Both are asked alike.

async function json(name) {
  const reply = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (!reply?.ok) throw new Error(`${name} is missing; make the page again with tools/live.py`);
  try { return await reply.json(); }
  catch { throw new Error(`${name} is broken; make the page again with tools/live.py`); }
}

// The grey pictures of a strip, cut apart: {w, h, c, data}
async function cut({ file, size, items }) {
  const reply = await fetch(new URL(file, import.meta.url)).catch(() => null);
  if (!reply?.ok) throw new Error(`${file} is missing, so there are no pictures to choose from`);
  const strip = await createImageBitmap(await reply.blob(), { colorSpaceConversion: 'none' });
  const pen = new OffscreenCanvas(strip.width, size).getContext('2d', { willReadFrequently: true });
  pen.drawImage(strip, 0, 0);
  return items.map((item, i) => {
    const { data } = pen.getImageData(i*size, 0, size, size);
    const grey = Uint8ClampedArray.from({ length: size*size }, (_, j) => data[4*j]);
    return { ...item, shown: { w: size, h: size, c: 1, data: grey } };
  });
}

class Here {   // everything in this page
  constructor(about, progress) {
    Object.assign(this, { about, server: false, size: 64, turns: new Map(), turn: 0 });
    this.tasks = about.tasks.map(t => t.task);
    this.worker = new Worker(new URL('./worker.mjs', import.meta.url), { type: 'module' });
    this.worker.onmessage = ({ data }) => {
      if ('progress' in data) return progress(data.progress);
      const { found, failed } = this.turns.get(data.id);
      this.turns.delete(data.id);
      if (data.error) failed(new Error(data.error));
      else found(data.found);
    };
    const dead = 'worker.mjs does not run here; make the page again, or try another browser';
    this.worker.onerror = e => {
      for (const { failed } of this.turns.values()) failed(new Error(e.message || dead));
    };
  }

  ask(call, given = {}) {
    return new Promise((found, failed) => {
      this.turns.set(++this.turn, { found, failed });
      this.worker.postMessage({ id: this.turn, call, given });
    });
  }

  async open() {
    const { kind } = await this.ask('load', { size: this.about.bytes?.['tower.safetensors'] });
    this.kind = kind;
    return this;
  }

  async use(name) {   // -> {task, look, classnames, methods, pictures, missing}
    const line = this.about.tasks.find(t => t.task === name);
    const found = await this.ask('task', { name }), pictures = { list: [], missing: '' };
    try { pictures.list = await cut(line.pictures); }
    catch (error) { pictures.missing = error.message; }
    return { task: name, look: line.look, start: line.start, ...found, pictures: pictures.list,
             missing: pictures.missing };
  }

  names(names) {
    return this.ask('names', { names, size: this.about.bytes?.['text.safetensors'] });
  }

  predict({ shown }, { look, alpha, depth }) {
    return this.ask('predict', { shown, look, settings: { alpha, depth } });
  }
}

class Python {   // `clipprompt live`: other backbones, the reader's own prompts and pictures
  constructor(about) {
    Object.assign(this, { about, server: true, kind: 'Python', size: about.image_size });
    this.tasks = [about.task || 'your prompts'];
  }

  async open() { return this; }

  async use(name) {
    const pictures = this.about.pictures.map(({ id, label, url }) => ({ place: id, label, url }));
    const { methods } = this.about;
    return { task: name, look: 'drawn', start: 0, classnames: methods[0].classnames, methods,
             pictures, missing: '' };
  }

  async predict({ file }) {
    const start = performance.now();
    const sent = { method: 'POST', body: file, headers: {
      'Content-Type': file.type.startsWith('image/') ? file.type : 'image/png',
      'X-Clipprompt': '1' } };
    const reply = await fetch(new URL('predict', import.meta.url), sent).catch(() => null);
    if (!reply) throw new Error('Python does not answer; is `clipprompt live` still running?');
    const said = await reply.json().catch(() => ({ error: `status ${reply.status}` }));
    if (said.error) throw new Error(said.error);
    return { methods: said.methods, ms: performance.now() - start };
  }
}

export async function openEngine(progress = () => {}) {
  const about = await json('about.json');
  return (about.server ? new Python(about) : new Here(about, progress)).open();
}

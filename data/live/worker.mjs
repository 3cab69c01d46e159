// The towers beside the page: whoever draws is never kept waiting by them.
import { Tokenizer } from './bpe.mjs';
import { LOOKS, picture, toPixels } from './images.mjs';
import { Methods } from './methods.mjs';
import { readTensors } from './tensors.mjs';
import { ImageTower, TextTower } from './towers.mjs';

const kept = {};   // kernel, tower, text, tokenizer, and the methods of each task

async function fetched(name, size = 0) {
  const reply = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (!reply) throw new Error(`${name} cannot be fetched; is the server still there?`);
  if (!reply.ok) {
    throw new Error(`${name} is missing (status ${reply.status}); make the page again`);
  }
  if (!size || !reply.body) return reply.arrayBuffer();
  const parts = [], reader = reply.body.getReader();
  for (let got = 0; ;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts).arrayBuffer();
    parts.push(value);
    got += value.length;
    postMessage({ progress: Math.min(1, got/size) });
  }
}

// The kernel, if this browser runs it: the bytes, or null
async function kernelBytes() {
  try {
    const bytes = await fetched('linear.wasm');
    return WebAssembly.validate(bytes) ? bytes : null;
  } catch { return null; }
}

async function made(Tower, file) {   // plain JavaScript where WebAssembly is switched off
  try { return await Tower.make(file, kept.wasm); }
  catch (error) {
    if (!kept.wasm) throw error;
    kept.wasm = null;
    return Tower.make(file, null);
  }
}

async function load({ size }) {
  const name = 'tower.safetensors';
  const [wasm, bytes] = await Promise.all([kernelBytes(), fetched(name, size)]);
  kept.wasm = wasm;
  kept.tower = await made(ImageTower, readTensors(bytes, name));
  return { kind: kept.tower.kernel.kind };
}

async function task({ name }) {
  const file = `methods-${name}.safetensors`;
  kept[file] ??= new Methods(readTensors(await fetched(file), file), kept.tower.info.scale);
  kept.methods = kept[file];
  kept.methods.unbind();
  const blocks = kept.tower.blocks.length;
  const methods = kept.methods.methods.map(m => {
    const { name, title, what, colour, slots, alpha } = m;
    return { name, title, what, colour, slots, alpha, blocks, classnames: kept.methods.classnames };
  });
  return { classnames: kept.methods.classnames, methods };
}

async function openText(size) {
  if (kept.text) return;
  const name = 'text.safetensors';
  const [merges, bytes] = await Promise.all([fetched('merges.txt'), fetched(name, size)]);
  kept.tokenizer = new Tokenizer(new TextDecoder().decode(merges).trimEnd().split('\n'));
  kept.text = await made(TextTower, readTensors(bytes, name));
}

async function names({ names, size }) {   // null: those of the task
  if (!names) {
    kept.methods.unbind();
    return { names: null };
  }
  await openText(size);
  kept.methods.bind(names, kept.text, kept.tokenizer);
  const known = piece => ({ text: piece.text, known: kept.text.knows(piece.id) });
  return { names: names.map(name => ({ name, pieces: kept.tokenizer.split(name).map(known) })) };
}

function predict({ shown: { w, h, c, data }, look, settings }) {
  const seen = LOOKS[look].make(picture(w, h, c, data)), start = performance.now();
  const { pixels, small } = toPixels(seen, kept.tower.info);
  const methods = kept.methods.answer(kept.tower, pixels, settings);
  return { methods, seen, small, ms: performance.now() - start };
}

const CALLS = { load, task, names, predict };
let last = Promise.resolve();   // in the order in which they came

onmessage = ({ data: { id, call, given } }) => {
  last = last.then(async () => {
    try { postMessage({ id, found: await CALLS[call](given) }); }
    catch (error) { postMessage({ id, error: String(error.message ?? error) }); }
  });
};

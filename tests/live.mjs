// The page's arithmetic in node: `node tests/live.mjs PAGE GOLD TASK...` prints what differs from
// the numbers that tests/test_live.py got from Python.
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const [page, gold, ...tasks] = process.argv.slice(2);
const from = name => import(pathToFileURL(`${page}/${name}`).href);
const { LOOKS, picture, toPixels } = await from('images.mjs');
const { Methods, best } = await from('methods.mjs');
const { readTensors } = await from('tensors.mjs');
const { ImageTower, TextTower } = await from('towers.mjs');
const { Tokenizer } = await from('bpe.mjs');

function bytes(file) {
  const b = readFileSync(file);
  return b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength);
}

const read = (folder, name) => readTensors(bytes(`${folder}/${name}`), name);
const rowOf = ({ shape, data }, i) => {
  const size = data.length/shape[0];
  return data.subarray(i*size, (i + 1)*size);
};

function differ(a, b) { return a.reduce((most, v, i) => Math.max(most, Math.abs(v - b[i])), 0); }

const told = { bytes: 0, wrong: 0, cases: 0, same: 0, logits: 0, plain: { cases: 0, same: 0 },
               changed: 0, names: 0, ids: 0, times: [] };

function compare(found, want, i, into) {
  for (const { name, logits } of found) {
    const ours = rowOf(want[`logits.${name}`], i);
    told.logits = Math.max(told.logits, differ(logits, ours));
    into.cases++;
    into.same += best(logits, 1)[0] === best(ours, 1)[0];
  }
}

const wasm = bytes(`${page}/linear.wasm`);
const towerFile = () => read(page, 'tower.safetensors');
const [tower, plain] = await Promise.all([ImageTower.make(towerFile(), wasm),
                                          ImageTower.make(towerFile(), null)]);
const text = await TextTower.make(read(page, 'text.safetensors'), wasm);
const merges = readFileSync(`${page}/merges.txt`, 'utf8').trimEnd().split('\n');
const tokenizer = new Tokenizer(merges);
told.kinds = [tower.kernel.kind, plain.kernel.kind];

for (const task of tasks) {
  const { tensors: want, info } = read(gold, `${task}.safetensors`);
  const methods = new Methods(read(page, `methods-${task}.safetensors`), tower.info.scale);
  const N = want.raw.shape[0];
  const pixelsOf = (i, look) => {
    const raw = picture(64, 64, 1, Uint8ClampedArray.from(rowOf(want.raw, i)));
    const { pixels, small } = toPixels(LOOKS[look].make(raw), tower.info);
    const ours = rowOf(want[`small.${look}`], i);
    told.bytes += small.data.length;
    small.data.forEach((v, j) => { told.wrong += v !== ours[j]; });
    return pixels;
  };
  const pixels = Array.from({ length: N }, (_, i) => {
    for (const look of ['drawn', 'pixels', 'edges']) if (look !== info.look) pixelsOf(i, look);
    return pixelsOf(i, info.look);
  });
  pixels.forEach((x, i) => {
    const start = performance.now();
    const found = methods.predict(tower, x);
    told.times.push(performance.now() - start);
    compare(found, want, i, told);
    if (i < 8) compare(methods.predict(plain, x), want, i, told.plain);
  });
  for (const [key, settings] of Object.entries(info.settings)) {
    const found = methods.predict(tower, pixels[0], settings);
    for (const { name, logits } of found) {
      const ours = want[`${key}.${name}`];
      if (ours) told.changed = Math.max(told.changed, differ(logits, ours.data));
    }
  }
  methods.bind(info.names, text, tokenizer);
  for (const [name, { data }] of methods.own.texts) {
    told.names = Math.max(told.names, differ(data, want[`names.${name}`].data));
  }
  for (const [line, ids] of info.strings) {
    told.ids += JSON.stringify(tokenizer.encode(line)) !== JSON.stringify(ids);
  }
}
told.times.sort((a, b) => a - b);
told.ms = told.times[told.times.length >> 1];
delete told.times;
console.log(JSON.stringify(told));

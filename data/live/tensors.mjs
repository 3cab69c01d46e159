// Safetensors: a length, a JSON that says where each tensor lies, then their bytes.

export class BrokenFile extends Error {}

let halves;   // the 65,536 numbers of fp16, made once

function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, rest = bits & 1023;
  if (exponent === 0) return sign*rest*2**-24;
  if (exponent === 31) return rest ? NaN : sign*Infinity;
  return sign*(1 + rest/1024)*2**(exponent - 15);
}

function widened(bits) {
  halves ??= Float32Array.from({ length: 65536 }, (_, i) => fromHalf(i));
  const out = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) out[i] = halves[bits[i]];
  return out;
}

const READ = {
  F32: raw => new Float32Array(raw),
  F16: raw => widened(new Uint16Array(raw)),
  I32: raw => new Int32Array(raw),
};

function headed(buffer, name) {
  const broken = why => new BrokenFile(`${name} is broken: ${why}`);
  if (buffer.byteLength < 8) throw broken('it is too short');
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  if (size > buffer.byteLength - 8) throw broken('it ends too early, or it is no safetensors file');
  const text = new TextDecoder().decode(new Uint8Array(buffer, 8, size));
  try { return [JSON.parse(text), 8 + size]; }
  catch { throw broken('it does not say what it holds'); }
}

// -> {tensors: {name: {shape, data}}, info: what the page's maker noted}
export function readTensors(buffer, name = 'the file') {
  const [head, start] = headed(buffer, name), tensors = {};
  for (const [key, t] of Object.entries(head)) {
    if (key === '__metadata__') continue;
    const [from, to] = t.data_offsets;
    if (!READ[t.dtype]) throw new BrokenFile(`${name} holds ${t.dtype}, which is not read here`);
    if (start + to > buffer.byteLength) {
      throw new BrokenFile(`${name} is broken: it ends too early`);
    }
    tensors[key] = { shape: t.shape, data: READ[t.dtype](buffer.slice(start + from, start + to)) };
  }
  return { tensors, info: JSON.parse(head.__metadata__?.info ?? '{}') };
}

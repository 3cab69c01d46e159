// CLIP's two transformers with prompt slots. All sequences of a call go through a block together,
// so that each weight is read once, whatever the number of methods.
import { Kernel, gelu, layerNorm, unit } from './kernel.mjs';

const ROWS = 640;   // of all sequences together

function floatsOf(tensors) {
  return Object.values(tensors).reduce((sum, t) => sum + t.data.length, 0);
}

// How many rows a row may read: all, those up to itself, or, beside a sentence, the sentence
const REACH = {
  all: s => () => s.rows,
  causal: () => row => row + 1,
  beside: s => row => Math.min(row + 1, s.at),
};

class Transformer {
  async open({ tensors, info }, wasm) {
    this.tensors = tensors;
    this.info = info;
    const hidden = tensors['transformer.resblocks.0.mlp.c_fc.weight'].shape[0], D = hidden/4;
    Object.assign(this, { D, hidden, heads: info.heads, d: D/info.heads });
    const work = ROWS*(7*D + hidden) + 4096;
    this.kernel = await Kernel.make(floatsOf(tensors) + work, wasm);
    this.blocks = [];
    while (tensors[`transformer.resblocks.${this.blocks.length}.ln_1.weight`]) this.addBlock();
    for (const [name, width] of [['x', D], ['y', D], ['qkv', 3*D], ['mix', D], ['h', hidden]]) {
      this[name] = this.kernel.take(ROWS*width);
    }
    return this;
  }

  norm(name) {
    const keep = part => this.kernel.keep(this.tensors[`${name}.${part}`].data);
    return { gain: keep('weight'), shift: keep('bias') };
  }

  layer(weight, bias) {
    const [N, K] = this.tensors[weight].shape;
    const w = this.kernel.turned(this.tensors[weight]);
    return { w, b: this.kernel.keep(this.tensors[bias].data), K, N };
  }

  addBlock() {
    const p = `transformer.resblocks.${this.blocks.length}.`;
    const layer = name => this.layer(`${p}${name}.weight`, `${p}${name}.bias`);
    this.blocks.push({
      before: this.norm(`${p}ln_1`), between: this.norm(`${p}ln_2`),
      qkv: this.layer(`${p}attn.in_proj_weight`, `${p}attn.in_proj_bias`),
      out: layer('attn.out_proj'), up: layer('mlp.c_fc'), down: layer('mlp.c_proj'),
    });
  }

  apply({ w, b, K, N }, x, out, rows, add = false) {
    this.kernel.linear(x, w, b, out, rows, K, N, add);
  }

  // What enters the slots of block l: keep*carried + (1-keep)*fresh
  fill(s, l) {
    if (!l || !s.n) return;   // those of block 0 stand there already
    const { D, x } = this, keep = s.keep[l], fresh = l*s.n*D;
    if (keep === 1) return;
    for (let j = 0, to = (s.start + s.at)*D; j < s.n*D; j++, to++) {
      x[to] = keep*x[to] + (1 - keep)*s.tokens[fresh + j];
    }
  }

  // One row of one head reads others: their values, weighted, are added to `mix`
  read(s, row, head, reach, weights) {
    const { D, d, qkv, mix } = this, wide = 3*D, own = head*d;
    const q = (s.start + row)*wide + own, to = (s.start + row)*D + own;
    let most = -Infinity, sum = 0;
    for (let c = 0; c < reach; c++) {
      const k = (s.start + c)*wide + D + own;
      let score = 0;
      for (let j = 0; j < d; j++) score += qkv[q + j]*qkv[k + j];
      weights[c] = score*d**-.5;
      if (weights[c] > most) most = weights[c];
    }
    for (let c = 0; c < reach; c++) sum += weights[c] = Math.exp(weights[c] - most);
    for (let c = 0; c < reach; c++) {
      const share = weights[c] /= sum, v = (s.start + c)*wide + 2*D + own;
      for (let j = 0; j < d; j++) mix[to + j] += share*qkv[v + j];
    }
  }

  attend(s) {   // -> how row 0 divided its attention, the mean of the heads
    const reach = REACH[s.reads](s), weights = new Float64Array(s.rows);
    const map = new Float32Array(s.rows);
    for (let head = 0; head < this.heads; head++) {
      for (let row = 0; row < s.rows; row++) {
        const n = reach(row);
        this.read(s, row, head, n, weights);
        if (!row) for (let c = 0; c < n; c++) map[c] += weights[c]/this.heads;
      }
    }
    return map;
  }

  // Sequences {x [rows, D], rows, reads, n, at, tokens [J, n, D], keep [J]} go through all blocks
  through(sequences) {
    let R = 0;
    for (const s of sequences) {
      Object.assign(s, { start: R, maps: [] });
      R += s.rows;
    }
    if (R > ROWS) throw new Error(`${R} rows at once, there is room for ${ROWS}`);
    const { x, y, qkv, mix, h, D } = this;
    for (const s of sequences) x.set(s.x, s.start*D);
    this.blocks.forEach((block, l) => {
      for (const s of sequences) this.fill(s, l);
      layerNorm(x, block.before, y, R, D);
      this.apply(block.qkv, y, qkv, R);
      mix.fill(0, 0, R*D);
      for (const s of sequences) s.maps.push(this.attend(s));
      this.apply(block.out, mix, x, R, true);
      layerNorm(x, block.between, y, R, D);
      this.apply(block.up, y, h, R);
      gelu(h, R*this.hidden);
      this.apply(block.down, h, x, R, true);
    });
  }

  // A row behind the last block becomes a feature of length 1
  feature(row, norm, { shape: [D, E], data }) {
    const z = new Float32Array(D), out = new Float32Array(E);
    layerNorm(this.x.subarray(row*D, (row + 1)*D), norm, z, 1, D);
    for (let k = 0; k < D; k++) for (let j = 0; j < E; j++) out[j] += z[k]*data[k*E + j];
    return unit(out);
  }
}

export class ImageTower extends Transformer {
  static async make(file, wasm) {
    const t = await new ImageTower().open(file, wasm), conv = t.tensors['conv1.weight'];
    const [D, channels, P] = conv.shape;
    t.patch = P;
    t.side = t.info.size/P;
    t.conv = { w: t.kernel.turned({ shape: [D, channels*P*P], data: conv.data }), b: null,
               K: channels*P*P, N: D };
    [t.pre, t.post] = [t.norm('ln_pre'), t.norm('ln_post')];
    return t;
  }

  embed(pixels) {   // [3, S, S] normalised -> [1+N, D] behind ln_pre
    const { D, side, patch: P, y, mix, tensors } = this, N = side*side, S = side*P;
    for (let p = 0, to = 0; p < N; p++) {
      const top = Math.floor(p/side)*P, left = p%side*P;
      for (let c = 0; c < 3; c++) for (let i = 0; i < P; i++) for (let j = 0; j < P; j++) {
        y[to++] = pixels[(c*S + top + i)*S + left + j];
      }
    }
    this.apply(this.conv, y, mix, N);
    const rows = new Float32Array((1 + N)*D);
    rows.set(tensors.class_embedding.data);
    rows.set(mix.subarray(0, N*D), D);
    tensors.positional_embedding.data.forEach((v, i) => { rows[i] += v; });
    layerNorm(rows, this.pre, rows, 1 + N, D);
    return rows;
  }

  // prompts: [{n, tokens [J, n, D], keep [J]} or null] -> [{feature, attention, slots}] of each
  run(pixels, prompts) {
    const { D, side } = this, rows = this.embed(pixels), N = side*side;
    const sequences = prompts.map(p => {
      const n = p?.n ?? 0, x = new Float32Array((1 + N + n)*D);
      x.set(rows);
      if (n) x.set(p.tokens.subarray(0, n*D), rows.length);
      return { x, rows: 1 + N + n, reads: 'all', n, at: 1 + N, tokens: p?.tokens, keep: p?.keep };
    });
    this.through(sequences);
    return sequences.map(s => ({
      feature: this.feature(s.start, this.post, this.tensors.proj),
      attention: s.maps.map(map => map.slice(1, 1 + N)),
      slots: s.n ? s.maps.map(map => map.slice(1 + N)) : null,
    }));
  }
}

export class TextTower extends Transformer {
  static async make(file, wasm) {
    const { ids, rows, ...tensors } = file.tensors;
    const t = await new TextTower().open({ tensors, info: file.info }, wasm);
    t.place = new Map(Array.from(ids.data, (id, i) => [id, i]));
    t.words = rows.data;
    t.final = t.norm('ln_final');
    return t;
  }

  knows(id) { return this.place.has(id); }

  embed(ids) {   // words with their positions; a piece that was never read is a row of zeros
    const { D } = this, x = Float32Array.from(this.tensors.positional_embedding.data
      .subarray(0, ids.length*D));
    ids.forEach((id, r) => {
      const from = this.place.get(id);
      if (from === undefined) return;
      for (let j = 0; j < D; j++) x[r*D + j] += this.words[from*D + j];
    });
    return x;
  }

  // Learned words in the first places behind the start
  slots(ids, { n, tokens, keep }) {
    const { D } = this, x = this.embed(ids), where = this.tensors.positional_embedding.data;
    for (let j = 0; j < n*D; j++) x[D + j] = tokens[j] + where[D + j];
    return { x, rows: ids.length, reads: 'causal', n, at: 1, tokens, keep };
  }

  // Rows behind a finished sentence that read it, all at the place of its end
  beside(ids, { n, tokens, keep }) {
    const { D } = this, L = ids.length, x = new Float32Array((L + n)*D);
    const where = this.tensors.positional_embedding.data;
    x.set(this.embed(ids));
    for (let i = 0; i < n; i++) for (let j = 0; j < D; j++) {
      x[(L + i)*D + j] = tokens[i*D + j] + where[(L - 1)*D + j];
    }
    return { x, rows: L + n, reads: 'beside', n, at: L, tokens, keep };
  }

  run(ids, part) {   // -> a feature of length 1
    if (ids.length > this.info.length) throw new Error('the name is too long for CLIP; shorten it');
    const plain = () => ({ x: this.embed(ids), rows: ids.length, reads: 'causal', n: 0 });
    const s = part.kind === 'sentence' ? plain() : this[part.kind](ids, part);
    this.through([s]);
    const { tensors: { text_projection }, final } = this;
    const read = row => this.feature(row, final, text_projection);
    if (part.kind !== 'beside') return read(ids.length - 1);
    const each = Array.from({ length: s.n }, (_, i) => read(s.at + i));
    return unit(each[0].map((_, j) => each.reduce((sum, f) => sum + f[j], 0)/s.n));
  }
}

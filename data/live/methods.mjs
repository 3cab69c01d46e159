// What each method puts into the towers, and what it makes of the features.
import { unit } from './kernel.mjs';

export function softmax(logits) {
  const most = Math.max(...logits), e = Array.from(logits, z => Math.exp(z - most));
  const sum = e.reduce((a, b) => a + b);
  return e.map(x => x/sum);
}

export function best(shares, k = 5) {
  return [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, k);
}

// The share that each block keeps of what came out of the block before.
// alpha: another share where the method has one; depth: blocks that get tokens at all.
export function kept(method, { alpha = null, depth = null } = {}) {
  const changed = alpha !== null && method.alpha !== undefined;
  return method.keep.map((keep, l) => {
    if (depth !== null && l >= depth) return 1;
    return l && changed ? alpha : keep;
  });
}

export class Methods {
  constructor({ tensors, info }, scale) {
    Object.assign(this, { task: info.task, classnames: info.classnames, scale });
    this.methods = info.methods.map(m => this.checked(m, tensors));
    this.own = null;   // class names that somebody typed, and their features
  }

  checked(m, tensors) {
    if (!m.branches || !m.parts) {
      throw new Error(`${m.name} makes its prompts from the image; this page cannot run it`);
    }
    const tokens = tensors[`${m.name}.image`]?.data;
    const parts = m.parts.map((part, i) => this.part(part, tensors[`${m.name}.words.${i}`]));
    const { shape: [samples], data } = tensors[`${m.name}.text`];
    return { ...m, tokens, parts, text: { samples, data } };
  }

  part(part, words) {   // words: [S, J, n, D]
    if (!words) return { ...part, sets: [null] };
    const [S, J, n, D] = words.shape, size = J*n*D;
    const sets = Array.from({ length: S }, (_, s) => words.data.subarray(s*size, (s + 1)*size));
    return { ...part, n, sets };
  }

  get names() { return this.own?.names ?? this.classnames; }

  // Class features for other names: [samples, C, parts*E], as the learner would make them
  bind(names, tower, tokenizer) {
    const sentence = (part, name) => {
      return [...part.prefix, ...tokenizer.encode(name), ...part.tail, tokenizer.end];
    };
    const feature = (part, set, name) => tower.run(sentence(part, name), { ...part, tokens: set });
    const texts = new Map(), seen = new Map();
    const once = (part, set, name) => {   // several methods share the frozen sentence
      if (set) return feature(part, set, name);
      const key = `${part.prefix} ${name} ${part.tail}`;
      if (!seen.has(key)) seen.set(key, feature(part, set, name));
      return seen.get(key);
    };
    for (const m of this.methods) {
      const samples = Math.max(...m.parts.map(part => part.sets.length)), rows = [];
      for (let s = 0; s < samples; s++) for (const name of names) {
        const parts = m.parts.map(part => once(part, part.sets[s] ?? part.sets[0], name));
        rows.push(unit(Float32Array.from(parts.flatMap(f => [...f]))));
      }
      texts.set(m.name, { samples, data: Float32Array.from(rows.flatMap(f => [...f])) });
    }
    this.own = { names, texts };
  }

  unbind() { this.own = null; }

  logits(m, f) {   // the log of the mean probability where there are several samples
    const { samples, data } = this.own?.texts.get(m.name) ?? m.text, C = this.names.length;
    const one = at => {
      let sum = 0;
      for (let j = 0; j < f.length; j++) sum += f[j]*data[at*f.length + j];
      return this.scale*sum;
    };
    const each = Array.from({ length: samples }, (_, s) => {
      return Float64Array.from({ length: C }, (_, c) => one(s*C + c));
    });
    if (samples === 1) return each[0];
    const shares = each.map(softmax);
    return each[0].map((_, c) => Math.log(shares.reduce((sum, p) => sum + p[c], 0)/samples));
  }

  // pixels [3, S, S] normalised -> for each method its logits, and how CLS divided its attention
  predict(tower, pixels, settings = {}) {
    const prompts = [null], place = new Map();   // run 0: frozen
    for (const m of this.methods) {
      if (!m.slots || settings.depth === 0) continue;
      place.set(m.name, prompts.length);
      prompts.push({ n: m.slots, tokens: m.tokens, keep: kept(m, settings) });
    }
    const runs = tower.run(pixels, prompts);
    return this.methods.map(m => {
      const own = runs[place.get(m.name) ?? 0];
      const parts = m.branches.map(b => (b === 'frozen' ? runs[0] : own).feature);
      const f = unit(Float32Array.from(parts.flatMap(p => [...p])));
      const { attention, slots } = own;
      return { name: m.name, logits: this.logits(m, f), attention, slots };
    });
  }

  answer(tower, pixels, settings) {   // as the Python server answers
    return this.predict(tower, pixels, settings).map(({ name, logits, attention, slots }) => {
      const shares = softmax(logits), top = best(shares).map(c => [this.names[c], shares[c]]);
      return { name, top, attention, slots };
    });
  }
}

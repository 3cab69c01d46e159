// Pictures {w, h, c, data} in eight bits: PIL's resizing byte for byte, and the looks of the tasks.

export function picture(w, h, c, data = new Uint8ClampedArray(w*h*c)) { return { w, h, c, data }; }

const FILTERS = {
  bicubic: { support: 2, at(x) {
    const a = -.5, z = Math.abs(x);
    if (z < 1) return ((a + 2)*z - (a + 3))*z*z + 1;
    return z < 2 ? (((z - 5)*z + 8)*z - 4)*a : 0;
  } },
  box: { support: .5, at: x => +(x > -.5 && x <= .5) },
};

const BITS = 22, ONE = 2**BITS;   // PIL counts in fixed point

// For each place of the result: the first pixel it reads, and the weights of those from there on
function weights(from, to, { support, at }) {
  const scale = from/to, stretch = Math.max(scale, 1), reach = support*stretch;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + .5)*scale;
    const low = Math.max(0, Math.trunc(centre - reach + .5));
    const high = Math.min(from, Math.trunc(centre + reach + .5));
    const w = [];
    for (let j = low; j < high; j++) w.push(at((j - centre + .5)/stretch));
    const sum = w.reduce((a, b) => a + b, 0);
    return [low, w.map(v => Math.trunc(v/sum*ONE + (v < 0 ? -.5 : .5)))];
  });
}

const eight = v => Math.min(255, Math.max(0, Math.floor(v/ONE)));

// One direction: `lines` lines, `step` between neighbours in a line, `next` between lines
function along(p, out, table, lines, step, next, outNext) {
  for (let line = 0; line < lines; line++) for (let i = 0; i < table.length; i++) {
    const [low, w] = table[i];
    for (let c = 0; c < p.c; c++) {
      let sum = ONE/2;
      for (let j = 0; j < w.length; j++) sum += w[j]*p.data[line*next + (low + j)*step + c];
      out.data[line*outNext + i*step + c] = eight(sum);
    }
  }
  return out;
}

export function resize(p, w, h, filter = 'bicubic') {
  const f = FILTERS[filter];
  if (w !== p.w) {
    p = along(p, picture(w, p.h, p.c), weights(p.w, w, f), p.h, p.c, p.w*p.c, w*p.c);
  }
  if (h === p.h) return p;
  return along(p, picture(p.w, h, p.c), weights(p.h, h, f), p.w, p.w*p.c, p.c, p.c);
}

function nearest(p, w, h) {
  const out = picture(w, h, p.c);
  for (let y = 0, to = 0; y < h; y++) for (let x = 0; x < w; x++) {
    const row = Math.floor((y + .5)*p.h/h), column = Math.floor((x + .5)*p.w/w);
    for (let c = 0; c < p.c; c++) out.data[to++] = p.data[(row*p.w + column)*p.c + c];
  }
  return out;
}

export function grey(p) {
  if (p.c === 1) return p;
  const out = picture(p.w, p.h, 1);
  for (let i = 0; i < p.w*p.h; i++) {
    const [r, g, b] = p.data.subarray(i*p.c, i*p.c + 3);
    out.data[i] = (19595*r + 38470*g + 7471*b + 32768) >> 16;
  }
  return out;
}

function edges(p) {   // brightest minus darkest of each 3x3, dark on white
  const g = grey(p), out = picture(p.w, p.h, 1);
  const inside = (v, n) => Math.min(n - 1, Math.max(0, v));
  for (let y = 0; y < p.h; y++) for (let x = 0; x < p.w; x++) {
    let low = 255, high = 0;
    for (let i = -1; i < 2; i++) for (let j = -1; j < 2; j++) {
      const v = g.data[inside(y + i, p.h)*p.w + inside(x + j, p.w)];
      low = Math.min(low, v);
      high = Math.max(high, v);
    }
    out.data[y*p.w + x] = 255 - (high - low);
  }
  return out;
}

function photo() {
  // Its noise comes from NumPy's generator, its blur and its turn from floating point in C
  throw new Error('a photographed picture cannot be made here byte for byte; use Python for it');
}

// As clipprompt/pictures.py shows a task; `same`: equal byte for byte
export const LOOKS = {
  drawn: { title: 'as drawn', same: true, python: null, make: p => p },
  pixels: { title: 'pixels', same: true, python: 'pixelate',
            make: p => nearest(resize(p, 11, 11, 'box'), p.w, p.h) },
  edges: { title: 'outlines', same: true, python: 'edge_map', make: edges },
  photo: { title: 'photographed', same: false, python: 'photographed', make: photo },
};

// test_transform: shorter side to `size`, centre crop, normalise -> what the tower reads
export function toPixels(p, { mean, std, size }) {
  const short = Math.min(p.w, p.h);
  const scaled = side => side === short ? size : Math.trunc(size*side/short);
  const small = resize(p, scaled(p.w), scaled(p.h));
  const left = Math.round((small.w - size)/2), top = Math.round((small.h - size)/2);
  const cut = picture(size, size, small.c), pixels = new Float32Array(3*size*size);
  for (let y = 0; y < size; y++) {
    const from = ((y + top)*small.w + left)*small.c;
    cut.data.set(small.data.subarray(from, from + size*small.c), y*size*small.c);
  }
  for (let c = 0, to = 0; c < 3; c++) for (let i = 0; i < size*size; i++) {
    pixels[to++] = (cut.data[i*cut.c + (cut.c === 1 ? 0 : c)]/255 - mean[c])/std[c];
  }
  return { pixels, small: cut };
}

// A drawing of any size as one of the data set's: the mean of each square of pixels
export function shrunk(rgba, from, to) {
  const out = picture(to, to, 3), f = from/to;
  for (let y = 0; y < to; y++) for (let x = 0; x < to; x++) for (let c = 0; c < 3; c++) {
    let sum = 0;
    for (let i = 0; i < f; i++) for (let j = 0; j < f; j++) {
      sum += rgba[((y*f + i)*from + x*f + j)*4 + c];
    }
    out.data[(y*to + x)*3 + c] = sum/f**2;
  }
  return out;
}

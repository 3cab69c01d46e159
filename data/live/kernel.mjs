// Where the numbers lie and who multiplies them: 1 KB of WebAssembly, or plain JavaScript.

const PAGE = 65536;

// One row of x at a time would read all of w for each: four rows share it.
function plainFour(x, w, out, r, K, N) {
  const o0 = r*N, o1 = o0 + N, o2 = o1 + N, o3 = o2 + N;
  for (let k = 0; k < K; k++) {
    const a0 = x[r*K + k], a1 = x[(r + 1)*K + k], a2 = x[(r + 2)*K + k], a3 = x[(r + 3)*K + k];
    for (let j = 0, p = k*N; j < N; j++, p++) {
      const v = w[p];
      out[o0 + j] += a0*v;
      out[o1 + j] += a1*v;
      out[o2 + j] += a2*v;
      out[o3 + j] += a3*v;
    }
  }
}

function plainOne(x, w, out, r, K, N) {
  for (let k = 0; k < K; k++) {
    const a = x[r*K + k];
    for (let j = 0, o = r*N, p = k*N; j < N; j++, o++, p++) out[o] += a*w[p];
  }
}

function plainLinear(x, w, bias, out, R, K, N, add) {
  for (let r = 0; r < R; r++) {
    const o = r*N;
    if (!add) out.fill(0, o, o + N);
    if (bias) for (let j = 0; j < N; j++) out[o + j] += bias[j];
  }
  let r = 0;
  for (; r + 4 <= R; r += 4) plainFour(x, w, out, r, K, N);
  for (; r < R; r++) plainOne(x, w, out, r, K, N);
}

export class Kernel {
  // `floats` in all; `wasm`: bytes of linear.wasm, or null
  static async make(floats, wasm) {
    const kernel = new Kernel(), bytes = 4*floats + 2*PAGE;
    kernel.used = 1024;
    if (!wasm) return Object.assign(kernel, { buffer: new ArrayBuffer(bytes) });
    const memory = new WebAssembly.Memory({ initial: Math.ceil(bytes/PAGE) });
    const { instance } = await WebAssembly.instantiate(wasm, { env: { memory } });
    return Object.assign(kernel, { buffer: memory.buffer, fast: instance.exports.linear });
  }

  get kind() { return this.fast ? 'WebAssembly' : 'JavaScript'; }

  take(n) {   // room for n numbers, on a multiple of 16 bytes
    const found = new Float32Array(this.buffer, this.used, n);
    this.used += 16*Math.ceil(n/4);
    return found;
  }

  keep(data) {
    const found = this.take(data.length);
    found.set(data);
    return found;
  }

  turned({ shape: [R, C], data }) {   // [R, C] -> [C, R]: what `linear` reads row by row
    const found = this.take(R*C);
    for (let i = 0; i < R; i++) for (let j = 0; j < C; j++) found[j*R + i] = data[i*C + j];
    return found;
  }

  // out [R, N] = x [R, K] w [K, N] + bias, added to what is there if `add`
  linear(x, w, bias, out, R, K, N, add = false) {
    if (!this.fast) return plainLinear(x, w, bias, out, R, K, N, add);
    this.fast(x.byteOffset, w.byteOffset, bias?.byteOffset ?? 0, out.byteOffset, R, K, N, +add);
  }
}

export function layerNorm(x, { gain, shift }, out, R, D) {
  for (let r = 0, o = 0; r < R; r++, o += D) {
    let mean = 0, square = 0;
    for (let j = 0; j < D; j++) mean += x[o + j];
    mean /= D;
    for (let j = 0; j < D; j++) square += (x[o + j] - mean)**2;
    const scale = 1/Math.sqrt(square/D + 1e-5);
    for (let j = 0; j < D; j++) out[o + j] = (x[o + j] - mean)*scale*gain[j] + shift[j];
  }
}

// The error function to 1.2e-7 (Press et al., Numerical Recipes, `erfcc`)
const ERFC = [.17087277, -.82215223, 1.48851587, -1.13520398, .27886807, -.18628806, .09678418,
              .37409196, 1.00002368, -1.26551223];

function erf(x) {
  const z = Math.abs(x), t = 1/(1 + .5*z);
  let sum = 0;
  for (let i = 0; i < 10; i++) sum = sum*t + ERFC[i];
  const rest = t*Math.exp(sum - z*z);
  return x < 0 ? rest - 1 : 1 - rest;
}

export function gelu(h, n) {
  for (let i = 0; i < n; i++) h[i] = .5*h[i]*(1 + erf(h[i]*Math.SQRT1_2));
}

export function unit(v) {
  const length = Math.sqrt(v.reduce((sum, x) => sum + x*x, 0));
  return v.map(x => x/length);
}

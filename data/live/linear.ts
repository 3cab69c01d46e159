// One layer: out = x w (+ bias) (+ out). AssemblyScript; `python tools/live.py --compile` compiles
// it. Addresses in bytes; w is [K, N] with N a multiple of 8.

// Four rows of x share each load of w: `first` is the first, `last` the last that exists.
function four(x: usize, w: usize, bias: usize, out: usize, first: usize, last: usize,
              K: usize, N: usize, add: bool): void {
  const wide = N << 2;
  const long = K << 2;
  // Beyond the end the last row is computed again, so that the inner loop has no conditions.
  const r1 = min(first + 1, last);
  const r2 = min(first + 2, last);
  const r3 = min(first + 3, last);
  const zero = f32x4.splat(0);
  for (let j: usize = 0; j < wide; j += 32) {
    const left = bias ? v128.load(bias + j) : zero;
    const right = bias ? v128.load(bias + j, 16) : zero;
    let a0 = left, a1 = left, a2 = left, a3 = left;
    let b0 = right, b1 = right, b2 = right, b3 = right;
    let p = w + j;
    let x0 = x + first * long;
    let x1 = x + r1 * long;
    let x2 = x + r2 * long;
    let x3 = x + r3 * long;
    for (const end = x0 + long; x0 < end; x0 += 4) {
      const u = v128.load(p);
      const v = v128.load(p, 16);
      const s0 = v128.load32_splat(x0);
      const s1 = v128.load32_splat(x1);
      const s2 = v128.load32_splat(x2);
      const s3 = v128.load32_splat(x3);
      a0 = f32x4.add(a0, f32x4.mul(s0, u));
      b0 = f32x4.add(b0, f32x4.mul(s0, v));
      a1 = f32x4.add(a1, f32x4.mul(s1, u));
      b1 = f32x4.add(b1, f32x4.mul(s1, v));
      a2 = f32x4.add(a2, f32x4.mul(s2, u));
      b2 = f32x4.add(b2, f32x4.mul(s2, v));
      a3 = f32x4.add(a3, f32x4.mul(s3, u));
      b3 = f32x4.add(b3, f32x4.mul(s3, v));
      x1 += 4;
      x2 += 4;
      x3 += 4;
      p += wide;
    }
    const o = out + j;
    write(o + first * wide, a0, b0, add);
    // A row that was computed twice must not be added twice.
    if (first + 1 <= last) write(o + r1 * wide, a1, b1, add);
    if (first + 2 <= last) write(o + r2 * wide, a2, b2, add);
    if (first + 3 <= last) write(o + r3 * wide, a3, b3, add);
  }
}

// @ts-ignore: a decorator of AssemblyScript
@inline
function write(to: usize, left: v128, right: v128, add: bool): void {
  if (add) {
    left = f32x4.add(left, v128.load(to));
    right = f32x4.add(right, v128.load(to, 16));
  }
  v128.store(to, left);
  v128.store(to, right, 16);
}

export function linear(x: usize, w: usize, bias: usize, out: usize, R: i32, K: i32, N: i32,
                       add: i32): void {
  const last = <usize>(R - 1);
  for (let r: usize = 0; r <= last; r += 4) {
    four(x, w, bias, out, r, last, <usize>K, <usize>N, add != 0);
  }
}

//! The innermost kernel: a tile of dot products between rows of activations and rows of weights.
//!
//! Element (i, j) of a tile is the sum over k of x[i][k] * w[j][k], held in 16 lanes (lane l takes k = l mod 16),
//! each lane one chain of fused multiply-adds, the lanes added as the tree of [`super::math::tree_sum`]. The tile's
//! shape decides only what is kept in registers, so it never changes a bit of the result.

use super::{Isa, isa};

/// Rows of activations in the largest tile.
pub(crate) const TILE_M: usize = 4;
/// Rows of weights in a full tile.
pub(crate) const TILE_N: usize = 4;

/// `y[i * y_stride + j] = x[i] · w[j]` for `m` rows of `x` (stride `k`) and `n` rows of `w` (stride `k`), where
/// `y` may be written by other threads at other elements.
///
/// # Safety
/// `x` holds `m * k` elements, `w` holds `n * k`, and `y` may be written at every `i * y_stride + j`.
#[expect(unsafe_code, reason = "SIMD over raw rows; the bounds are the caller's promise")]
pub(crate) unsafe fn dots(
    m: usize,
    n: usize,
    k: usize,
    x: *const f32,
    w: *const f32,
    y: *mut f32,
    y_stride: usize,
) {
    // SAFETY: the caller's promise, and `isa` names only what this processor has.
    unsafe {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::dots_avx512(m, n, k, x, w, y, y_stride),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::dots_avx2(m, n, k, x, w, y, y_stride),
            _ => portable(m, n, k, x, w, y, y_stride),
        }
    }
}

#[expect(unsafe_code, reason = "as `dots`")]
unsafe fn portable(m: usize, n: usize, k: usize, x: *const f32, w: *const f32, y: *mut f32, y_stride: usize) {
    // SAFETY: the caller's promise.
    let (xs, ws) = unsafe { (std::slice::from_raw_parts(x, m * k), std::slice::from_raw_parts(w, n * k)) };
    for (j, w_row) in ws.chunks_exact(k).enumerate() {
        for (i, x_row) in xs.chunks_exact(k).enumerate() {
            let sum = super::math::lane_sum(k, |p, acc| x_row[p].mul_add(w_row[p], acc));
            // SAFETY: the caller's promise.
            unsafe { *y.add(i * y_stride + j) = sum };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "SIMD intrinsics over raw rows; the bounds are the promise of `dots`")]
#[expect(clippy::needless_range_loop, reason = "the indices name registers of a tile")]
mod x86 {
    //! The same tile in AVX-512 and in AVX2 (two registers make the 16 lanes).

    use std::arch::x86_64::*;

    use super::{TILE_M, TILE_N};

    macro_rules! walk {
        ($tile:ident, $m:expr, $n:expr, $k:expr, $x:expr, $w:expr, $y:expr, $stride:expr) => {
            let full = $n / TILE_N * TILE_N;
            let mut i = 0;
            while i < $m {
                let rows = ($m - i).min(TILE_M);
                let (x, y) = ($x.add(i * $k), $y.add(i * $stride));
                for j in (0..full).step_by(TILE_N) {
                    let (w, y) = ($w.add(j * $k), y.add(j));
                    match rows {
                        1 => $tile::<1, 4>($k, x, w, y, $stride),
                        2 => $tile::<2, 4>($k, x, w, y, $stride),
                        3 => $tile::<3, 4>($k, x, w, y, $stride),
                        _ => $tile::<4, 4>($k, x, w, y, $stride),
                    }
                }
                for j in full..$n {
                    for r in 0..rows {
                        $tile::<1, 1>($k, x.add(r * $k), $w.add(j * $k), y.add(r * $stride + j), $stride);
                    }
                }
                i += rows;
            }
        };
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) unsafe fn dots_avx512(
        m: usize,
        n: usize,
        k: usize,
        x: *const f32,
        w: *const f32,
        y: *mut f32,
        stride: usize,
    ) {
        // SAFETY: the promise of `dots`.
        unsafe {
            walk!(tile_avx512, m, n, k, x, w, y, stride);
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn dots_avx2(
        m: usize,
        n: usize,
        k: usize,
        x: *const f32,
        w: *const f32,
        y: *mut f32,
        stride: usize,
    ) {
        // SAFETY: the promise of `dots`.
        unsafe {
            walk!(tile_avx2, m, n, k, x, w, y, stride);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn tile_avx512<const M: usize, const N: usize>(
        k: usize,
        x: *const f32,
        w: *const f32,
        y: *mut f32,
        stride: usize,
    ) {
        let mut acc = [[_mm512_setzero_ps(); N]; M];
        let whole = k / 16 * 16;
        // SAFETY: rows of k elements each, by the promise of `dots`; the tail is masked.
        unsafe {
            let mut p = 0;
            while p < whole {
                let ws: [__m512; N] = std::array::from_fn(|j| _mm512_loadu_ps(w.add(j * k + p)));
                for i in 0..M {
                    let xi = _mm512_loadu_ps(x.add(i * k + p));
                    for j in 0..N {
                        acc[i][j] = _mm512_fmadd_ps(xi, ws[j], acc[i][j]);
                    }
                }
                p += 16;
            }
            if whole < k {
                let mask = (1u16 << (k - whole)) - 1;
                let ws: [__m512; N] =
                    std::array::from_fn(|j| _mm512_maskz_loadu_ps(mask, w.add(j * k + whole)));
                for i in 0..M {
                    let xi = _mm512_maskz_loadu_ps(mask, x.add(i * k + whole));
                    for j in 0..N {
                        acc[i][j] = _mm512_mask3_fmadd_ps(xi, ws[j], acc[i][j], mask);
                    }
                }
            }
            for i in 0..M {
                let row = y.add(i * stride);
                if N == 4 {
                    _mm_storeu_ps(row, sum4_avx512(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
                } else {
                    for j in 0..N {
                        let zero = _mm512_setzero_ps();
                        *row.add(j) = _mm_cvtss_f32(sum4_avx512(acc[i][j], zero, zero, zero));
                    }
                }
            }
        }
    }

    /// The tree sums of four registers at once.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn sum4_avx512(a: __m512, b: __m512, c: __m512, d: __m512) -> __m128 {
        // Quarters: 0x44 takes 0, 1 of each; 0xEE takes 2, 3; 0x88 takes 0, 2; 0xDD takes 1, 3.
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xEE>(c, d));
        let quads = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xDD>(ab, cd));
        let pairs = _mm512_add_ps(quads, _mm512_permute_ps::<0b01_00_11_10>(quads));
        let ones = _mm512_add_ps(pairs, _mm512_permute_ps::<0b10_11_00_01>(pairs));
        let pick = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm512_castps512_ps128(_mm512_permutexvar_ps(pick, ones))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile_avx2<const M: usize, const N: usize>(
        k: usize,
        x: *const f32,
        w: *const f32,
        y: *mut f32,
        stride: usize,
    ) {
        // Sixteen registers: one row of four dot products at a time, low and high lanes.
        // SAFETY: rows of k elements each, by the promise of `dots`; the tail is copied out first.
        unsafe {
            for i in 0..M {
                let xi = x.add(i * k);
                let mut low = [_mm256_setzero_ps(); N];
                let mut high = [_mm256_setzero_ps(); N];
                let whole = k / 16 * 16;
                let mut p = 0;
                while p < whole {
                    let (x0, x1) = (_mm256_loadu_ps(xi.add(p)), _mm256_loadu_ps(xi.add(p + 8)));
                    for j in 0..N {
                        low[j] = _mm256_fmadd_ps(x0, _mm256_loadu_ps(w.add(j * k + p)), low[j]);
                        high[j] = _mm256_fmadd_ps(x1, _mm256_loadu_ps(w.add(j * k + p + 8)), high[j]);
                    }
                    p += 16;
                }
                if whole < k {
                    let mut pad = [0f32; 16];
                    std::ptr::copy_nonoverlapping(xi.add(whole), pad.as_mut_ptr(), k - whole);
                    let (x0, x1) = (_mm256_loadu_ps(pad.as_ptr()), _mm256_loadu_ps(pad.as_ptr().add(8)));
                    for j in 0..N {
                        let mut pad = [0f32; 16];
                        std::ptr::copy_nonoverlapping(w.add(j * k + whole), pad.as_mut_ptr(), k - whole);
                        low[j] = _mm256_fmadd_ps(x0, _mm256_loadu_ps(pad.as_ptr()), low[j]);
                        high[j] = _mm256_fmadd_ps(x1, _mm256_loadu_ps(pad.as_ptr().add(8)), high[j]);
                    }
                }
                for j in 0..N {
                    let eight = _mm256_add_ps(low[j], high[j]);
                    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                    let one = _mm_add_ss(two, _mm_movehdup_ps(two));
                    *y.add(i * stride + j) = _mm_cvtss_f32(one);
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) use {dots_avx2 as test_avx2, dots_avx512 as test_avx512};
}

#[cfg(test)]
#[expect(unsafe_code, reason = "calls the kernels directly")]
mod tests {
    use super::*;

    type Kernel = unsafe fn(usize, usize, usize, *const f32, *const f32, *mut f32, usize);

    fn kernels() -> Vec<(&'static str, Kernel)> {
        let mut all: Vec<(&str, Kernel)> = vec![("portable", portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(("avx2", x86::test_avx2));
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                all.push(("avx512", x86::test_avx512));
            }
        }
        all
    }

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn run(kernel: Kernel, m: usize, n: usize, k: usize, x: &[f32], w: &[f32]) -> Vec<f32> {
        let mut y = vec![f32::NAN; m * n];
        // SAFETY: the slices have the sizes that `dots` asks for.
        unsafe { kernel(m, n, k, x.as_ptr(), w.as_ptr(), y.as_mut_ptr(), n) };
        y
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits_and_they_are_right() {
        for (m, n, k) in
            [(1, 1, 1), (1, 4, 16), (3, 5, 24), (4, 8, 48), (7, 13, 100), (9, 6, 577), (2, 3, 15)]
        {
            let (x, w) = (noise(m * k, 1), noise(n * k, 2));
            let reference = run(portable, m, n, k, &x, &w);
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k).map(|p| x[i * k + p] as f64 * w[j * k + p] as f64).sum();
                    assert!((reference[i * n + j] as f64 - exact).abs() < 1e-5, "{m}x{n}x{k}");
                }
            }
            for (name, kernel) in kernels() {
                assert_eq!(run(kernel, m, n, k, &x, &w), reference, "{name} {m}x{n}x{k}");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (m, n, k) = (11, 10, 120);
        let (x, w) = (noise(m * k, 3), noise(n * k, 4));
        for (name, kernel) in kernels() {
            let together = run(kernel, m, n, k, &x, &w);
            for i in 0..m {
                let alone = run(kernel, 1, n, k, &x[i * k..(i + 1) * k], &w);
                assert_eq!(alone, together[i * n..(i + 1) * n], "{name}, row {i}");
            }
        }
    }
}

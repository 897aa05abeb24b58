//! The register tile of matrix products: at most 12 x 32 elements, one chain of fused multiply-adds each, the same
//! bits in AVX-512, AVX2 and portable code.

use super::super::{Isa, isa};

/// Rows of the tile.
pub(super) const TILE_M: usize = 12;
/// Columns of the tile.
pub(super) const TILE_N: usize = 32;

/// A left operand whose element (i, p) lies at `i * row + p * step`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) at: *const f32,
    pub(super) row: usize,
    pub(super) step: usize,
}

impl Left {
    fn is_packed(self) -> bool {
        (self.row, self.step) == (1, TILE_M)
    }

    /// Row and step, as constants where the operand is packed: addresses then take no registers.
    #[inline(always)]
    fn strides<const PACKED: bool>(self) -> (usize, usize) {
        if PACKED { (1, TILE_M) } else { (self.row, self.step) }
    }
}

/// One tile: at most [`TILE_M`] x [`TILE_N`] elements of c.
///
/// # Safety
/// All elements that `size` names must be there, and no other thread may touch those of c.
#[expect(unsafe_code, reason = "SIMD over raw rows; the bounds are the caller's promise")]
pub(super) unsafe fn tile(
    size: (usize, usize, usize),
    a: Left,
    b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    // SAFETY: the caller's promise, and `isa` names only what this processor has.
    unsafe {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::avx512(size, a, b, b_row, c, c_row, add),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::avx2(size, a, b, b_row, c, c_row, add),
            _ => portable(size, a, b, b_row, c, c_row, add),
        }
    }
}

#[expect(unsafe_code, reason = "as `tile`")]
pub(super) unsafe fn portable(
    (m, n, k): (usize, usize, usize),
    a: Left,
    b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    for i in 0..m {
        let mut sum = [0f32; TILE_N];
        for p in 0..k {
            // SAFETY: the caller's promise.
            let (x, row) = unsafe {
                (*a.at.add(i * a.row + p * a.step), std::slice::from_raw_parts(b.add(p * b_row), n))
            };
            for (s, &b) in sum.iter_mut().zip(row) {
                *s = x.mul_add(b, *s);
            }
        }
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts_mut(c.add(i * c_row), n) };
        for (c, s) in row.iter_mut().zip(sum) {
            *c = if add { *c + s } else { s };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "SIMD intrinsics over raw rows; the bounds are the promise of `tile`")]
#[expect(clippy::needless_range_loop, reason = "the indices name registers of a tile")]
pub(super) mod x86 {
    //! The same tile in AVX-512 (12 x 32 in 24 registers) and in AVX2 (6 x 16 in 12).

    use std::arch::x86_64::*;

    use super::Left;

    /// Calls a tile that is compiled for each number of rows.
    macro_rules! by_rows {
        ($m:expr, [$($rows:literal)*], $M:ident => $call:expr) => {
            match $m {
                $($rows => {
                    const $M: usize = $rows;
                    $call
                })*
                _ => unreachable!("a tile has that many rows"),
            }
        };
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(in super::super) unsafe fn avx512(
        (m, n, k): (usize, usize, usize),
        a: Left,
        b: *const f32,
        b_row: usize,
        c: *mut f32,
        c_row: usize,
        add: bool,
    ) {
        // SAFETY: the promise of `tile`.
        unsafe {
            if a.is_packed() {
                by_rows!(m, [1 2 3 4 5 6 7 8 9 10 11 12], M => tile_avx512::<M, true>(n, k, a, b, b_row, c, c_row, add));
            } else {
                by_rows!(m, [1 2 3 4 5 6 7 8 9 10 11 12], M => tile_avx512::<M, false>(n, k, a, b, b_row, c, c_row, add));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[expect(clippy::too_many_arguments, reason = "as `tile`, taken apart")]
    unsafe fn tile_avx512<const M: usize, const PACKED: bool>(
        n: usize,
        k: usize,
        a: Left,
        b: *const f32,
        b_row: usize,
        c: *mut f32,
        c_row: usize,
        add: bool,
    ) {
        let lanes = (1u64 << n) - 1;
        let (low, high) = (lanes as u16, (lanes >> 16) as u16);
        let (a_row, a_step) = a.strides::<PACKED>();
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        for i in 0..M {
            let row = c.wrapping_add(i * c_row);
            _mm_prefetch::<_MM_HINT_T0>(row.cast());
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(16).cast());
        }
        // SAFETY: the promise of `tile`; lanes beyond n are masked, and masked lanes are not touched.
        unsafe {
            for p in 0..k {
                let row = b.add(p * b_row);
                let b0 = _mm512_maskz_loadu_ps(low, row);
                let b1 = _mm512_maskz_loadu_ps(high, row.wrapping_add(16));
                let x = a.at.add(p * a_step);
                for i in 0..M {
                    let x = _mm512_set1_ps(*x.add(i * a_row));
                    acc[i][0] = _mm512_fmadd_ps(x, b0, acc[i][0]);
                    acc[i][1] = _mm512_fmadd_ps(x, b1, acc[i][1]);
                }
            }
            for i in 0..M {
                let row = c.add(i * c_row);
                for (half, mask) in [low, high].into_iter().enumerate() {
                    let at = row.wrapping_add(16 * half);
                    let sum = if add {
                        _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), acc[i][half])
                    } else {
                        acc[i][half]
                    };
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(in super::super) unsafe fn avx2(
        (m, n, k): (usize, usize, usize),
        a: Left,
        b: *const f32,
        b_row: usize,
        c: *mut f32,
        c_row: usize,
        add: bool,
    ) {
        for i in (0..m).step_by(6) {
            for j in (0..n).step_by(16) {
                // SAFETY: the promise of `tile`.
                unsafe {
                    let a = Left { at: a.at.add(i * a.row), ..a };
                    let (b, c) = (b.add(j), c.add(i * c_row + j));
                    let rows = (m - i).min(6);
                    match (n - j).min(16) {
                        16 if a.is_packed() => {
                            by_rows!(rows, [1 2 3 4 5 6], M => tile_avx2::<M, true, true>(16, k, a, b, b_row, c, c_row, add));
                        }
                        n if a.is_packed() => {
                            by_rows!(rows, [1 2 3 4 5 6], M => tile_avx2::<M, true, false>(n, k, a, b, b_row, c, c_row, add));
                        }
                        n => {
                            by_rows!(rows, [1 2 3 4 5 6], M => tile_avx2::<M, false, false>(n, k, a, b, b_row, c, c_row, add));
                        }
                    }
                }
            }
        }
    }

    /// With `WHOLE`, all 16 columns are there: the masks of columns that are not would take registers that the
    /// twelve sums, the two halves of a row and the broadcast element leave none of.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    #[expect(clippy::too_many_arguments, reason = "as `tile`, taken apart")]
    unsafe fn tile_avx2<const M: usize, const PACKED: bool, const WHOLE: bool>(
        n: usize,
        k: usize,
        a: Left,
        b: *const f32,
        b_row: usize,
        c: *mut f32,
        c_row: usize,
        add: bool,
    ) {
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lane);
        let high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32 - 8), lane);
        let (a_row, a_step) = a.strides::<PACKED>();
        let mut acc = [[_mm256_setzero_ps(); 2]; M];
        // SAFETY: the promise of `tile`; lanes beyond n are masked, and masked lanes are not touched.
        unsafe {
            for p in 0..k {
                let row = b.add(p * b_row);
                let (b0, b1) = if WHOLE {
                    (_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(8)))
                } else {
                    (_mm256_maskload_ps(row, low), _mm256_maskload_ps(row.wrapping_add(8), high))
                };
                let x = a.at.add(p * a_step);
                for i in 0..M {
                    let x = _mm256_broadcast_ss(&*x.add(i * a_row));
                    acc[i][0] = _mm256_fmadd_ps(x, b0, acc[i][0]);
                    acc[i][1] = _mm256_fmadd_ps(x, b1, acc[i][1]);
                }
            }
            for i in 0..M {
                let row = c.add(i * c_row);
                for (half, mask) in [low, high].into_iter().enumerate() {
                    let at = row.wrapping_add(8 * half);
                    let sum = if add {
                        _mm256_add_ps(_mm256_maskload_ps(at, mask), acc[i][half])
                    } else {
                        acc[i][half]
                    };
                    _mm256_maskstore_ps(at, mask, sum);
                }
            }
        }
    }
}

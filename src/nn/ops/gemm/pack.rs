//! Transposes of narrow strips into packed panels, 16 x 16 elements in registers with AVX-512, 8 x 8 with AVX2.
//! Moves values only: every instruction set gives the same.

use super::super::{Isa, isa};

/// Rows of a strip at most.
pub(super) const STRIP: usize = 16;

/// to[p, i] = x[i, p] for `rows` ≤ [`STRIP`] rows of `width` elements. Rows of `x` begin every `x_row` elements,
/// those of `to` every `to_row`; what lies between them in `to` is left alone.
#[expect(unsafe_code, reason = "SIMD over raw rows; bounds are checked first")]
pub(super) fn transpose(
    (rows, width): (usize, usize),
    (x, x_row): (&[f32], usize),
    (to, to_row): (&mut [f32], usize),
) {
    if rows == 0 || width == 0 {
        return;
    }
    assert!(rows <= STRIP && rows <= to_row, "a strip of {rows} rows");
    assert!((rows - 1) * x_row + width <= x.len(), "x has {rows} rows of {width}");
    assert!((width - 1) * to_row + rows <= to.len(), "there is room for {width} rows of {rows}");
    // SAFETY: all elements lie inside the slices by the assertions, and `isa` names only what this processor has.
    unsafe {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::avx512((rows, width), x.as_ptr(), x_row, to.as_mut_ptr(), to_row),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::avx2((rows, width), x.as_ptr(), x_row, to.as_mut_ptr(), to_row),
            _ => {
                for (i, row) in x.chunks(x_row).take(rows).enumerate() {
                    row[..width].iter().enumerate().for_each(|(p, &value)| to[p * to_row + i] = value);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "SIMD intrinsics over raw rows; the bounds are checked by `transpose`")]
#[expect(clippy::needless_range_loop, reason = "the indices name registers")]
mod x86 {
    //! Both go by powers of two: pairs of rows, then pairs of pairs, then quarters of registers.

    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) unsafe fn avx512(
        (rows, width): (usize, usize),
        x: *const f32,
        x_row: usize,
        to: *mut f32,
        to_row: usize,
    ) {
        let kept = ((1u32 << rows) - 1) as u16;
        for from in (0..width).step_by(16) {
            let count = 16.min(width - from);
            let read = ((1u32 << count) - 1) as u16;
            let mut r = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                if i < rows {
                    // SAFETY: the promise of `transpose`; lanes beyond the width are masked.
                    r[i] = unsafe { _mm512_maskz_loadu_ps(read, x.add(i * x_row + from)) };
                }
            }
            let mut pairs = [_mm512_setzero_pd(); 16];
            for i in 0..8 {
                pairs[2 * i] = _mm512_castps_pd(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]));
                pairs[2 * i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
            }
            // fours[4 g + c]: in each quarter q, column 4 q + c of rows 4 g to 4 g + 3.
            let mut fours = [_mm512_setzero_ps(); 16];
            for g in 0..4 {
                for half in 0..2 {
                    let (a, b) = (pairs[4 * g + half], pairs[4 * g + 2 + half]);
                    fours[4 * g + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    fours[4 * g + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            for c in 0..4 {
                let (a, b, d, e) = (fours[c], fours[4 + c], fours[8 + c], fours[12 + c]);
                let even = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(d, e));
                let odd = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(d, e));
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(even.0, even.1),
                    _mm512_shuffle_f32x4::<0x88>(odd.0, odd.1),
                    _mm512_shuffle_f32x4::<0xdd>(even.0, even.1),
                    _mm512_shuffle_f32x4::<0xdd>(odd.0, odd.1),
                ];
                for (q, column) in columns.into_iter().enumerate() {
                    let p = 4 * q + c;
                    if p < count {
                        // SAFETY: as above; lanes beyond the rows are masked.
                        unsafe { _mm512_mask_storeu_ps(to.add((from + p) * to_row), kept, column) };
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(
        (rows, width): (usize, usize),
        x: *const f32,
        x_row: usize,
        to: *mut f32,
        to_row: usize,
    ) {
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let first = |n: usize| _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lane);
        for above in (0..rows).step_by(8) {
            let rows = 8.min(rows - above);
            let kept = first(rows);
            for from in (0..width).step_by(8) {
                let count = 8.min(width - from);
                let read = first(count);
                let mut r = [_mm256_setzero_ps(); 8];
                for i in 0..8 {
                    if i < rows {
                        // SAFETY: the promise of `transpose`; lanes beyond the width are masked.
                        r[i] = unsafe { _mm256_maskload_ps(x.add((above + i) * x_row + from), read) };
                    }
                }
                let mut pairs = [_mm256_setzero_pd(); 8];
                for i in 0..4 {
                    pairs[2 * i] = _mm256_castps_pd(_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]));
                    pairs[2 * i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
                }
                let mut fours = [_mm256_setzero_ps(); 8];
                for g in 0..2 {
                    for half in 0..2 {
                        let (a, b) = (pairs[4 * g + half], pairs[4 * g + 2 + half]);
                        fours[4 * g + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                        fours[4 * g + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
                    }
                }
                for c in 0..4 {
                    let columns = [
                        _mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]),
                        _mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]),
                    ];
                    for (q, column) in columns.into_iter().enumerate() {
                        let p = 4 * q + c;
                        if p < count {
                            // SAFETY: as above; lanes beyond the rows are masked.
                            unsafe {
                                _mm256_maskstore_ps(to.add((from + p) * to_row + above), kept, column);
                            }
                        }
                    }
                }
            }
        }
    }
}

//! The tile of [`super::dot`] with weights that are unpacked in registers, for few rows of activations: a band that
//! is used once or twice is not worth writing out first. The values, and the order in which they are added, are
//! those of unpacking and then multiplying, so both ways give the same bits.

use super::unpack::Rows;
use super::{Isa, isa};

/// Rows of activations up to which unpacking in registers wins.
pub(crate) const FEW: usize = 8;

/// `y[i * y_stride + j] = x[i] · row[first + j]` for `count` rows of weights, or false where this format, row
/// length or processor has no such kernel.
///
/// # Safety
/// As [`super::dot::dots`]: `x` holds `m * k` elements, `y` may be written at every `i * y_stride + j`.
#[expect(unsafe_code, reason = "SIMD over raw rows; the bounds are the caller's promise")]
pub(crate) unsafe fn packed_dots(
    weight: Rows<'_>,
    rows: std::ops::Range<usize>,
    (m, k): (usize, usize),
    x: *const f32,
    y: *mut f32,
    y_stride: usize,
) -> bool {
    if m > FEW || !k.is_multiple_of(32) {
        return false;
    }
    // SAFETY: `isa` names only what this processor has; the caller's promise covers the rest.
    unsafe {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::packed_avx512(weight, rows, (m, k), x, y, y_stride),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::packed_avx2(weight, rows, (m, k), x, y, y_stride),
            _ => false,
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "SIMD intrinsics over raw rows; the bounds are the promise of `packed_dots`")]
#[expect(clippy::needless_range_loop, reason = "the indices name registers of a tile")]
mod x86 {
    //! One way to load 32 weights for each format, and the tile over it.

    use std::arch::x86_64::*;
    use std::ops::Range;

    use candle_core::quantized::GgmlDType;

    use super::super::unpack::{Rows, f16_at, scale_min};

    /// A packed row format: `load(row, p)` gives elements p..p + 32 as two or four registers.
    trait Packed {
        /// Bytes of a row of `k` elements.
        fn row_bytes(k: usize) -> usize;
        unsafe fn load_512(row: *const u8, p: usize) -> [__m512; 2];
        unsafe fn load_256(row: *const u8, p: usize) -> [__m256; 4];
    }

    struct Bf16;
    struct F16;
    struct Q8;
    struct Q4;
    struct Q4K;

    macro_rules! block {
        ($row:expr, $offset:expr, $bytes:literal) => {
            std::slice::from_raw_parts($row.add($offset), $bytes)
        };
    }

    /// The f16 scale at the head of a block, in every lane.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn scale_512(block: &[u8]) -> __m512 {
        _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes([block[0], block[1]])))
    }

    /// As [`scale_512`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn scale_256(block: &[u8]) -> __m256 {
        _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes([block[0], block[1]])))
    }

    /// Nibbles to i8: the low ones of 16 bytes, then the high ones.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn nibbles(bytes: __m128i) -> [__m128i; 2] {
        let mask = _mm_set1_epi8(15);
        [_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask)]
    }

    impl Packed for Bf16 {
        fn row_bytes(k: usize) -> usize {
            2 * k
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn load_512(row: *const u8, p: usize) -> [__m512; 2] {
            // SAFETY: 64 bytes of the row.
            [0, 16].map(|at| unsafe {
                let half = _mm256_loadu_si256(row.add(2 * (p + at)).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            })
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load_256(row: *const u8, p: usize) -> [__m256; 4] {
            // SAFETY: 64 bytes of the row.
            [0, 8, 16, 24].map(|at| unsafe {
                let half = _mm_loadu_si128(row.add(2 * (p + at)).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
            })
        }
    }

    impl Packed for F16 {
        fn row_bytes(k: usize) -> usize {
            2 * k
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn load_512(row: *const u8, p: usize) -> [__m512; 2] {
            // SAFETY: 64 bytes of the row.
            [0, 16].map(|at| unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(row.add(2 * (p + at)).cast())) })
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load_256(row: *const u8, p: usize) -> [__m256; 4] {
            // SAFETY: 64 bytes of the row.
            [0, 8, 16, 24].map(|at| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(row.add(2 * (p + at)).cast())) })
        }
    }

    impl Packed for Q8 {
        fn row_bytes(k: usize) -> usize {
            k / 32 * 34
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn load_512(row: *const u8, p: usize) -> [__m512; 2] {
            // SAFETY: one block of the row.
            unsafe {
                let block = block!(row, p / 32 * 34, 34);
                let d = scale_512(block);
                [2, 18].map(|at| {
                    let q = _mm_loadu_si128(block.as_ptr().add(at).cast());
                    _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)))
                })
            }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load_256(row: *const u8, p: usize) -> [__m256; 4] {
            // SAFETY: one block of the row.
            unsafe {
                let block = block!(row, p / 32 * 34, 34);
                let d = scale_256(block);
                [2, 10, 18, 26].map(|at| {
                    let q = _mm_loadl_epi64(block.as_ptr().add(at).cast());
                    _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)))
                })
            }
        }
    }

    impl Packed for Q4 {
        fn row_bytes(k: usize) -> usize {
            k / 32 * 18
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn load_512(row: *const u8, p: usize) -> [__m512; 2] {
            // SAFETY: one block of the row.
            unsafe {
                let block = block!(row, p / 32 * 18, 18);
                let d = scale_512(block);
                nibbles(_mm_loadu_si128(block.as_ptr().add(2).cast())).map(|q| {
                    let q = _mm512_sub_epi32(_mm512_cvtepu8_epi32(q), _mm512_set1_epi32(8));
                    _mm512_mul_ps(d, _mm512_cvtepi32_ps(q))
                })
            }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load_256(row: *const u8, p: usize) -> [__m256; 4] {
            // SAFETY: one block of the row.
            unsafe {
                let block = block!(row, p / 32 * 18, 18);
                let d = scale_256(block);
                let [low, high] = nibbles(_mm_loadu_si128(block.as_ptr().add(2).cast()));
                [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)].map(|q| {
                    let q = _mm256_sub_epi32(_mm256_cvtepu8_epi32(q), _mm256_set1_epi32(8));
                    _mm256_mul_ps(d, _mm256_cvtepi32_ps(q))
                })
            }
        }
    }

    /// Scale, minimum and the 32 bytes that hold sub-block `p / 32` of a q4_k row, and whether it has the high
    /// nibbles.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn q4_k_part(row: *const u8, p: usize) -> (f32, f32, *const u8, bool) {
        // SAFETY: one block of the row.
        let block = unsafe { block!(row, p / 256 * 144, 144) };
        let part = p % 256 / 32;
        let (scale, min) = scale_min(part, &block[4..16]);
        let bytes = &block[16 + part / 2 * 32..];
        (f16_at(block, 0) * scale, f16_at(block, 2) * min, bytes.as_ptr(), part % 2 == 1)
    }

    impl Packed for Q4K {
        fn row_bytes(k: usize) -> usize {
            k / 256 * 144
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn load_512(row: *const u8, p: usize) -> [__m512; 2] {
            // SAFETY: 32 bytes of one block.
            unsafe {
                let (d, min, bytes, high) = q4_k_part(row, p);
                [0, 16].map(|at| {
                    let q = nibbles(_mm_loadu_si128(bytes.add(at).cast()))[usize::from(high)];
                    let scaled =
                        _mm512_mul_ps(_mm512_set1_ps(d), _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q)));
                    _mm512_sub_ps(scaled, _mm512_set1_ps(min))
                })
            }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load_256(row: *const u8, p: usize) -> [__m256; 4] {
            // SAFETY: 32 bytes of one block.
            unsafe {
                let (d, min, bytes, high) = q4_k_part(row, p);
                let first = nibbles(_mm_loadu_si128(bytes.cast()))[usize::from(high)];
                let second = nibbles(_mm_loadu_si128(bytes.add(16).cast()))[usize::from(high)];
                [first, _mm_srli_si128::<8>(first), second, _mm_srli_si128::<8>(second)].map(|q| {
                    let scaled =
                        _mm256_mul_ps(_mm256_set1_ps(d), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q)));
                    _mm256_sub_ps(scaled, _mm256_set1_ps(min))
                })
            }
        }
    }

    macro_rules! by_format {
        ($walk:ident, $weight:expr, $rows:expr, $shape:expr, $x:expr, $y:expr, $stride:expr) => {
            match $weight {
                Rows::Bf16(all) => $walk::<Bf16>(all.as_ptr().cast(), $rows, $shape, $x, $y, $stride),
                Rows::F16(all) => $walk::<F16>(all.as_ptr().cast(), $rows, $shape, $x, $y, $stride),
                Rows::Blocks { bytes, format: GgmlDType::Q8_0 } => {
                    $walk::<Q8>(bytes.as_ptr(), $rows, $shape, $x, $y, $stride)
                }
                Rows::Blocks { bytes, format: GgmlDType::Q4_0 } => {
                    $walk::<Q4>(bytes.as_ptr(), $rows, $shape, $x, $y, $stride)
                }
                Rows::Blocks { bytes, format: GgmlDType::Q4K } => {
                    $walk::<Q4K>(bytes.as_ptr(), $rows, $shape, $x, $y, $stride)
                }
                Rows::F32(_) | Rows::Blocks { .. } => return false,
            }
        };
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) unsafe fn packed_avx512(
        weight: Rows<'_>,
        rows: Range<usize>,
        shape: (usize, usize),
        x: *const f32,
        y: *mut f32,
        stride: usize,
    ) -> bool {
        // SAFETY: the promise of `packed_dots`.
        unsafe { by_format!(walk_512, weight, rows, shape, x, y, stride) }
        true
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn packed_avx2(
        weight: Rows<'_>,
        rows: Range<usize>,
        shape: (usize, usize),
        x: *const f32,
        y: *mut f32,
        stride: usize,
    ) -> bool {
        // SAFETY: the promise of `packed_dots`.
        unsafe { by_format!(walk_256, weight, rows, shape, x, y, stride) }
        true
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn walk_512<P: Packed>(
        weight: *const u8,
        rows: Range<usize>,
        (m, k): (usize, usize),
        x: *const f32,
        y: *mut f32,
        stride: usize,
    ) {
        let first = rows.start;
        // SAFETY: the promise of `packed_dots`.
        unsafe {
            let mut j = first;
            while j + 4 <= rows.end {
                let w = weight.add(j * P::row_bytes(k));
                let y = y.add(j - first);
                let mut i = 0;
                while i < m {
                    let (x, y) = (x.add(i * k), y.add(i * stride));
                    match m - i {
                        1 => tile_512::<P, 1, 4>(k, x, w, y, stride),
                        2 => tile_512::<P, 2, 4>(k, x, w, y, stride),
                        3 => tile_512::<P, 3, 4>(k, x, w, y, stride),
                        _ => tile_512::<P, 4, 4>(k, x, w, y, stride),
                    }
                    i += 4;
                }
                j += 4;
            }
            for j in j..rows.end {
                let w = weight.add(j * P::row_bytes(k));
                for i in 0..m {
                    tile_512::<P, 1, 1>(k, x.add(i * k), w, y.add(i * stride + j - first), stride);
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn tile_512<P: Packed, const M: usize, const N: usize>(
        k: usize,
        x: *const f32,
        w: *const u8,
        y: *mut f32,
        stride: usize,
    ) {
        let row = P::row_bytes(k);
        let mut acc = [[_mm512_setzero_ps(); N]; M];
        // SAFETY: rows of k elements, a multiple of 32.
        unsafe {
            for p in (0..k).step_by(32) {
                for j in 0..N {
                    let [w0, w1] = P::load_512(w.add(j * row), p);
                    for i in 0..M {
                        let x = x.add(i * k + p);
                        acc[i][j] = _mm512_fmadd_ps(_mm512_loadu_ps(x), w0, acc[i][j]);
                        acc[i][j] = _mm512_fmadd_ps(_mm512_loadu_ps(x.add(16)), w1, acc[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..N {
                    *y.add(i * stride + j) = tree_512(acc[i][j]);
                }
            }
        }
    }

    /// The tree sum of one register.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn tree_512(a: __m512) -> f32 {
        tree_256(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))
    }

    /// The tree sum of 16 lanes in two registers.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn tree_256(low: __m256, high: __m256) -> f32 {
        let eight = _mm256_add_ps(low, high);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn walk_256<P: Packed>(
        weight: *const u8,
        rows: Range<usize>,
        (m, k): (usize, usize),
        x: *const f32,
        y: *mut f32,
        stride: usize,
    ) {
        let first = rows.start;
        for j in rows {
            // SAFETY: the promise of `packed_dots`.
            unsafe {
                let w = weight.add(j * P::row_bytes(k));
                let y = y.add(j - first);
                let mut i = 0;
                while i < m {
                    let (x, y) = (x.add(i * k), y.add(i * stride));
                    match m - i {
                        1 => tile_256::<P, 1>(k, x, w, y, stride),
                        2 => tile_256::<P, 2>(k, x, w, y, stride),
                        3 => tile_256::<P, 3>(k, x, w, y, stride),
                        _ => tile_256::<P, 4>(k, x, w, y, stride),
                    }
                    i += 4;
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile_256<P: Packed, const M: usize>(
        k: usize,
        x: *const f32,
        w: *const u8,
        y: *mut f32,
        stride: usize,
    ) {
        let mut low = [_mm256_setzero_ps(); M];
        let mut high = [_mm256_setzero_ps(); M];
        // SAFETY: rows of k elements, a multiple of 32.
        unsafe {
            for p in (0..k).step_by(32) {
                let [w0, w1, w2, w3] = P::load_256(w, p);
                for i in 0..M {
                    let x = x.add(i * k + p);
                    low[i] = _mm256_fmadd_ps(_mm256_loadu_ps(x), w0, low[i]);
                    high[i] = _mm256_fmadd_ps(_mm256_loadu_ps(x.add(8)), w1, high[i]);
                    low[i] = _mm256_fmadd_ps(_mm256_loadu_ps(x.add(16)), w2, low[i]);
                    high[i] = _mm256_fmadd_ps(_mm256_loadu_ps(x.add(24)), w3, high[i]);
                }
            }
            for i in 0..M {
                *y.add(i * stride) = tree_256(low[i], high[i]);
            }
        }
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "calls the kernels directly")]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};
    use half::{bf16, f16};

    use super::super::dot::dots;
    use super::*;

    type Kernel =
        unsafe fn(Rows<'_>, std::ops::Range<usize>, (usize, usize), *const f32, *mut f32, usize) -> bool;

    fn kernels() -> Vec<Kernel> {
        let mut all: Vec<Kernel> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                all.push(x86::packed_avx2);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                all.push(x86::packed_avx512);
            }
        }
        all
    }

    #[test]
    fn unpacking_in_registers_gives_the_bits_of_unpacking_first() -> candle_core::Result<()> {
        let (n, k) = (11, 512);
        let dense = Tensor::randn(0f32, 0.3, (n, k), &Device::Cpu)?;
        let values = dense.flatten_all()?.to_vec1::<f32>()?;
        let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        let brains: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let blocks = [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K]
            .map(|format| QTensor::quantize(&dense, format).map(|q| (q, format)));
        let blocks = blocks.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
        let bytes =
            blocks.iter().map(|(q, f)| Ok((q.data()?, *f))).collect::<candle_core::Result<Vec<_>>>()?;
        let mut all = vec![Rows::F16(&halves), Rows::Bf16(&brains)];
        all.extend(bytes.iter().map(|(bytes, format)| Rows::Blocks { bytes, format: *format }));
        for weight in all {
            let mut unpacked = vec![0f32; n * k];
            for (row, out) in unpacked.chunks_exact_mut(k).enumerate() {
                weight.unpack(row, k, out);
            }
            for m in 1..=FEW {
                let x = Tensor::randn(0f32, 1.0, m * k, &Device::Cpu)?.to_vec1::<f32>()?;
                let mut expected = vec![0f32; m * n];
                // SAFETY: the slices have the sizes that `dots` asks for.
                unsafe { dots(m, n, k, x.as_ptr(), unpacked.as_ptr(), expected.as_mut_ptr(), n) };
                for kernel in kernels() {
                    let mut y = vec![0f32; m * n];
                    // SAFETY: as above.
                    assert!(unsafe { kernel(weight, 0..n, (m, k), x.as_ptr(), y.as_mut_ptr(), n) });
                    assert_eq!(y, expected, "m = {m}");
                }
            }
        }
        Ok(())
    }
}

//! Rows of weights, in whatever format they are held, as f32.
//!
//! This is the only place that knows how a format is laid out. A product with a quantized weight is therefore
//! exactly the f32 product with its dequantized rows: the format's own rounding is all the error there is.
//! GGML's block layouts: q8_0 is `{f16 d; i8 q[32]}`, q4_0 is `{f16 d; u8 q[16]}`, q4_k is
//! `{f16 d; f16 dmin; u8 scales[12]; u8 q[128]}`, q6_k is `{u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d}`.

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::multiversion;

/// A weight matrix `[rows, k]` as bytes or numbers in memory.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Blocks { bytes: &'a [u8], format: GgmlDType },
}

impl<'a> Rows<'a> {
    /// Rows as they lie, where no unpacking is needed.
    pub(crate) fn as_f32(self) -> Option<&'a [f32]> {
        match self {
            Rows::F32(all) => Some(all),
            _ => None,
        }
    }

    /// How many rows of `k` columns there are.
    pub(crate) fn count(self, k: usize) -> usize {
        match self {
            Rows::F32(all) => all.len() / k,
            Rows::F16(all) => all.len() / k,
            Rows::Bf16(all) => all.len() / k,
            Rows::Blocks { bytes, format } => bytes.len() / (k / format.block_size() * format.type_size()),
        }
    }

    /// Some of the rows.
    pub(crate) fn band(self, rows: Range<usize>, k: usize) -> Self {
        let elements = rows.start * k..rows.end * k;
        match self {
            Rows::F32(all) => Rows::F32(&all[elements]),
            Rows::F16(all) => Rows::F16(&all[elements]),
            Rows::Bf16(all) => Rows::Bf16(&all[elements]),
            Rows::Blocks { bytes, format } => {
                let row_bytes = k / format.block_size() * format.type_size();
                Rows::Blocks { bytes: &bytes[rows.start * row_bytes..rows.end * row_bytes], format }
            }
        }
    }

    /// Writes row `row` of `k` columns to `out`.
    pub(crate) fn unpack(self, row: usize, k: usize, out: &mut [f32]) {
        let range = row * k..(row + 1) * k;
        match self {
            Rows::F32(all) => out.copy_from_slice(&all[range]),
            Rows::F16(all) => all[range].convert_to_f32_slice(out),
            Rows::Bf16(all) => widen(&all[range], out),
            Rows::Blocks { bytes, format } => {
                let row_bytes = k / format.block_size() * format.type_size();
                let blocks = &bytes[row * row_bytes..(row + 1) * row_bytes];
                match format {
                    GgmlDType::Q8_0 => q8_0(blocks, out),
                    GgmlDType::Q4_0 => q4_0(blocks, out),
                    GgmlDType::Q4K => q4_k(blocks, out),
                    GgmlDType::Q6K => q6_k(blocks, out),
                    other => unreachable!("{other:?} is never chosen when quantizing; see nn::quant"),
                }
            }
        }
    }
}

/// A scale. Finite, so shifting the bits and multiplying with 2^112 is exact, and needs no branch and no call.
#[inline(always)]
pub(super) fn f16_at(bytes: &[u8], offset: usize) -> f32 {
    let bits = u16::from_le_bytes([bytes[offset], bytes[offset + 1]]) as u32;
    let magnitude = f32::from_bits((bits & 0x7FFF) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

multiversion! {
    fn widen(from: &[bf16], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(from) {
            *o = f32::from_bits((b.to_bits() as u32) << 16);
        }
    }
}

multiversion! {
    fn q8_0(blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(34).zip(out.chunks_exact_mut(32)) {
            let d = f16_at(block, 0);
            for (o, &q) in out.iter_mut().zip(&block[2..]) {
                *o = d * (q as i8) as f32;
            }
        }
    }
}

multiversion! {
    fn q4_0(blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(18).zip(out.chunks_exact_mut(32)) {
            let d = f16_at(block, 0);
            let (low, high) = out.split_at_mut(16);
            for ((l, h), &q) in low.iter_mut().zip(high).zip(&block[2..]) {
                *l = d * ((q & 15) as i32 - 8) as f32;
                *h = d * ((q >> 4) as i32 - 8) as f32;
            }
        }
    }
}

/// Six-bit scale and minimum of sub-block `j`: the first four lie in the low bits of bytes 0..8, the others are
/// put together from bytes 8..12 and the high bits.
#[inline(always)]
pub(super) fn scale_min(j: usize, packed: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    };
    (scale as f32, min as f32)
}

multiversion! {
    fn q4_k(blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(144).zip(out.chunks_exact_mut(256)) {
            let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
            let (scales, q) = block[4..].split_at(12);
            for (pair, (q, out)) in q.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
                let (s0, m0) = scale_min(2 * pair, scales);
                let (s1, m1) = scale_min(2 * pair + 1, scales);
                let (d0, d1, m0, m1) = (d * s0, d * s1, dmin * m0, dmin * m1);
                let (low, high) = out.split_at_mut(32);
                for ((l, h), &q) in low.iter_mut().zip(high).zip(q) {
                    *l = d0 * (q & 15) as f32 - m0;
                    *h = d1 * (q >> 4) as f32 - m1;
                }
            }
        }
    }
}

multiversion! {
    fn q6_k(blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(210).zip(out.chunks_exact_mut(256)) {
            let (ql, rest) = block.split_at(128);
            let (qh, rest) = rest.split_at(64);
            let (scales, d) = rest.split_at(16);
            let d = f16_at(d, 0);
            for half in 0..2 {
                let (ql, qh) = (&ql[64 * half..64 * half + 64], &qh[32 * half..32 * half + 32]);
                let (scales, out) = (&scales[8 * half..8 * half + 8], &mut out[128 * half..128 * half + 128]);
                for l in 0..32 {
                    let quarter = [
                        (ql[l] & 15) | ((qh[l] & 3) << 4),
                        (ql[l + 32] & 15) | (((qh[l] >> 2) & 3) << 4),
                        (ql[l] >> 4) | (((qh[l] >> 4) & 3) << 4),
                        (ql[l + 32] >> 4) | ((qh[l] >> 6) << 4),
                    ];
                    for (part, q) in quarter.into_iter().enumerate() {
                        let scale = d * (scales[l / 16 + 2 * part] as i8) as f32;
                        out[l + 32 * part] = scale * (q as i32 - 32) as f32;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn rows_equal_candles_own_dequantization() -> candle_core::Result<()> {
        let (rows, k) = (5, 512);
        let dense = Tensor::randn(0f32, 0.3, (rows, k), &Device::Cpu)?;
        for format in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K] {
            let blocks = QTensor::quantize(&dense, format)?;
            let expected = blocks.dequantize(&Device::Cpu)?.to_vec2::<f32>()?;
            let bytes = blocks.data()?;
            let view = Rows::Blocks { bytes: &bytes, format };
            for (row, expected) in expected.iter().enumerate() {
                let mut out = vec![f32::NAN; k];
                view.unpack(row, k, &mut out);
                let worst = out.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(worst < 1e-6, "{format:?} row {row}: {worst}");
            }
        }
        Ok(())
    }

    #[test]
    fn half_formats_widen_exactly() {
        let values = [0.0f32, -1.5, 3.140625, 65504.0, 6.1e-5];
        let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        let brains: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let mut out = [0f32; 5];
        Rows::F16(&halves).unpack(0, 5, &mut out);
        assert_eq!(out.to_vec(), halves.iter().map(|h| h.to_f32()).collect::<Vec<_>>());
        Rows::Bf16(&brains).unpack(0, 5, &mut out);
        assert_eq!(out.to_vec(), brains.iter().map(|h| h.to_f32()).collect::<Vec<_>>());
    }
}

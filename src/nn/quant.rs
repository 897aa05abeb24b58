//! How a weight matrix is held: dense in f32, f16 or bf16, or in GGML blocks of 8 or 4 bits. One type for all,
//! so that a format is a property of a layer and never a second copy of a model.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{CpuStorage, DType, Device, Module, Result, Storage, Tensor};

use super::ops::gemm::{LowRankTerm, x_w, x_wt};
use super::ops::has_kernels;
use super::ops::product::{LowRank, Product};
use super::ops::unpack::Rows;

/// How linear weights are quantized while loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantization {
    /// Dense.
    #[default]
    None,
    /// 8-bit, blocks of 32 with one f16 scale.
    Q8_0,
    /// 4-bit, blocks of 32 with one f16 scale.
    Q4_0,
    /// 4-bit, blocks of 256 with 6-bit scales and minima.
    Q4K,
}

/// What a weight is for; embeddings and output heads lose more by four bits than layers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A linear layer inside the decoder.
    Layer,
    /// Token embedding or output head.
    Vocabulary,
}

impl Quantization {
    /// `none`, `q8_0`, `q4_0` or `q4_k`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4K => "q4_k",
        }
    }

    /// The block format for a matrix with `columns` columns; `None` keeps it dense. Rows that are no multiple of
    /// 256 take q4_0 instead of q4_k, and rows that are no multiple of 32 stay dense.
    pub fn format(self, role: Role, columns: usize) -> Option<GgmlDType> {
        if self == Self::None || !columns.is_multiple_of(32) {
            return None;
        }
        match (self, role) {
            (Self::Q8_0, _) | (_, Role::Vocabulary) => Some(GgmlDType::Q8_0),
            (Self::Q4K, Role::Layer) if columns.is_multiple_of(256) => Some(GgmlDType::Q4K),
            _ => Some(GgmlDType::Q4_0),
        }
    }
}

/// Elements that lie dense while a large matrix is quantized: 1 MB in f32. Larger pieces would stay with the
/// allocator after they are freed.
const BAND: usize = 1 << 18;

/// A weight matrix `[rows, columns]`, multiplied from the right: y = x·Wᵀ.
#[derive(Clone)]
pub struct Weight {
    held: Held,
    rows: usize,
    columns: usize,
}

#[derive(Clone)]
enum Held {
    Dense(Tensor),
    Blocks(Arc<QTensor>),
}

impl Weight {
    /// Holds a dense matrix as it is.
    ///
    /// # Errors
    /// A tensor that is no matrix.
    pub fn dense(tensor: Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        Ok(Self { held: Held::Dense(tensor.contiguous()?), rows, columns })
    }

    /// Quantizes a dense matrix on the CPU and holds the blocks on `device`.
    pub fn blocks(tensor: &Tensor, format: GgmlDType, device: &Device) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let on_host = tensor.to_device(&Device::Cpu)?;
        let blocks = QTensor::quantize_onto(&on_host, format, device)?;
        Ok(Self { held: Held::Blocks(Arc::new(blocks)), rows, columns })
    }

    /// As [`Weight::blocks`], but of a matrix that is read a band of rows at a time, so that it never lies dense
    /// in memory. `read` gives the rows of a range, on the CPU.
    ///
    /// # Errors
    /// What `read` fails with.
    pub fn blocks_by_bands(
        [rows, columns]: [usize; 2],
        format: GgmlDType,
        device: &Device,
        mut read: impl FnMut(Range<usize>) -> anyhow::Result<Tensor>,
    ) -> anyhow::Result<Self> {
        let band = (BAND / columns.max(1)).max(1);
        if rows <= band {
            return Ok(Self::blocks(&read(0..rows)?, format, device)?);
        }
        let mut bytes = Vec::with_capacity(rows * columns / format.block_size() * format.type_size());
        for from in (0..rows).step_by(band) {
            let dense = read(from..(from + band).min(rows))?;
            bytes.extend_from_slice(&QTensor::quantize(&dense, format)?.data()?);
        }
        let storage = QStorage::from_data(Cow::Owned(bytes), device, format)?;
        Ok(Self { held: Held::Blocks(Arc::new(QTensor::new(storage, (rows, columns))?)), rows, columns })
    }

    /// Rows: features out.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: features in.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        match &self.held {
            Held::Dense(t) => (t.elem_count() * t.dtype().size_in_bytes()) as u64,
            Held::Blocks(q) => q.storage_size_in_bytes() as u64,
        }
    }

    /// The whole matrix in f32, as a product sees it.
    pub fn to_f32(&self) -> Result<Tensor> {
        match &self.held {
            Held::Dense(t) => t.to_dtype(DType::F32),
            Held::Blocks(q) => q.dequantize(&q.device()),
        }
    }

    /// Rows by index, `[ids.len(), columns]`, in `dtype`.
    pub fn gather(&self, ids: &[u32], dtype: DType) -> Result<Tensor> {
        match &self.held {
            Held::Dense(t) if !has_kernels(t.device()) => {
                t.index_select(&Tensor::new(ids, t.device())?, 0)?.to_dtype(dtype)
            }
            Held::Blocks(q) if !has_kernels(&q.device()) => {
                q.embedding(&Tensor::new(ids, &q.device())?)?.to_dtype(dtype)
            }
            _ => self.with_rows(|rows| {
                let mut out = vec![0f32; ids.len() * self.columns];
                for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.columns)) {
                    rows.unpack(id as usize, self.columns, out);
                }
                Tensor::from_vec(out, (ids.len(), self.columns), &Device::Cpu)
            }),
        }
    }

    /// The matrix product of `x` `[m, columns]` without adapters or bias, by candle's operations.
    pub(crate) fn composed_product(&self, x: &Tensor) -> Result<Tensor> {
        match &self.held {
            Held::Dense(t) => x.matmul(&t.to_dtype(x.dtype())?.t()?),
            Held::Blocks(q) => {
                let product =
                    QMatMul::from_arc(q.clone())?.forward(&x.to_dtype(DType::F32)?.contiguous()?)?;
                product.to_dtype(x.dtype())
            }
        }
    }

    /// The product by our kernel: `[m, rows]`.
    pub(crate) fn kernel_product(
        &self,
        x: &[f32],
        bias: Option<&[f32]>,
        low_rank: &[LowRank<'_>],
    ) -> Result<Vec<f32>> {
        self.with_rows(|weight| {
            let (k, n) = (self.columns, self.rows);
            Ok(Product { x, m: x.len() / k, k, n, weight, bias, low_rank }.compute())
        })
    }

    /// x·W by candle's operations: `x` `[m, rows]`, gives `[m, columns]`. The way back of a product.
    pub(crate) fn composed_back_product(&self, x: &Tensor) -> Result<Tensor> {
        match &self.held {
            Held::Dense(t) => x.matmul(&t.to_dtype(x.dtype())?),
            Held::Blocks(q) => x.matmul(&q.dequantize_f16(&q.device())?.to_dtype(x.dtype())?),
        }
    }

    /// x·Wᵀ + low rank + bias of many rows, by the kernel for training: `[m, rows]`.
    pub(crate) fn train_product(
        &self,
        x: &[f32],
        term: Option<LowRankTerm<'_>>,
        bias: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        self.with_rows(|weight| Ok(x_wt(x, weight, self.columns, term, bias)))
    }

    /// x·W + low rank of many rows, by the kernel for training: `[m, columns]`.
    pub(crate) fn train_back_product(&self, x: &[f32], term: Option<LowRankTerm<'_>>) -> Result<Vec<f32>> {
        self.with_rows(|weight| Ok(x_w(x, weight, self.columns, term)))
    }

    /// As [`Weight::train_product`] for the rows `band` of W alone: `[m, band.len()]`.
    pub(crate) fn band_product(
        &self,
        x: &[f32],
        band: Range<usize>,
        bias: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        self.with_rows(|weight| Ok(x_wt(x, weight.band(band, self.columns), self.columns, None, bias)))
    }

    /// As [`Weight::train_back_product`] for the rows `band` of W alone: `x` is `[m, band.len()]`.
    pub(crate) fn band_back_product(&self, x: &[f32], band: Range<usize>) -> Result<Vec<f32>> {
        self.with_rows(|weight| Ok(x_w(x, weight.band(band, self.columns), self.columns, None)))
    }

    fn with_rows<R>(&self, f: impl FnOnce(Rows<'_>) -> Result<R>) -> Result<R> {
        match &self.held {
            Held::Dense(t) => {
                let (storage, layout) = t.storage_and_layout();
                let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
                else {
                    candle_core::bail!("expected a contiguous weight on the CPU");
                };
                f(match storage {
                    CpuStorage::F32(all) => Rows::F32(&all[start..end]),
                    CpuStorage::F16(all) => Rows::F16(&all[start..end]),
                    CpuStorage::BF16(all) => Rows::Bf16(&all[start..end]),
                    _ => candle_core::bail!("weights are f32, f16 or bf16, not {:?}", t.dtype()),
                })
            }
            Held::Blocks(q) => {
                let bytes: Cow<'_, [u8]> = q.data()?;
                f(Rows::Blocks { bytes: &bytes, format: q.dtype() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::linear::Linear;
    use crate::nn::lora::LoraBatch;

    fn product(weight: Weight, x: &Tensor) -> Result<Vec<Vec<f32>>> {
        Linear::new(weight, None, None).forward(x, &LoraBatch::default())?.to_vec2()
    }

    /// Half a step of each element's block, from the block's own definition and the dense weights: what rounding
    /// to the format may cost, f16 rounding of the scale (2^-11) included.
    fn half_steps(format: GgmlDType, row: &[f32]) -> Vec<f32> {
        let extent = |block: &[f32]| block.iter().fold(0f32, |m, w| m.max(w.abs()));
        match format {
            // Steps of max / 127.
            GgmlDType::Q8_0 => {
                row.chunks(32).flat_map(|b| vec![extent(b) * (0.5 / 127.0 + 1.0 / 2048.0); 32]).collect()
            }
            // Steps of max / 8 with one side a step short: the far end may be a whole step away.
            GgmlDType::Q4_0 => {
                row.chunks(32).flat_map(|b| vec![extent(b) * (1.0 / 8.0 + 1.0 / 2048.0); 32]).collect()
            }
            // Sub-blocks of 32 with steps of (max - min) / 15; scale and minimum are themselves rounded to 6 bits
            // of the largest of their eight, which adds up to one more part in 126 of that largest.
            _ => row
                .chunks(256)
                .flat_map(|super_block| {
                    let spread = |b: &[f32]| {
                        let low = b.iter().copied().fold(0f32, f32::min);
                        (b.iter().copied().fold(f32::MIN, f32::max).max(0.0) - low, -low)
                    };
                    let parts: Vec<(f32, f32)> = super_block.chunks(32).map(spread).collect();
                    let widest = parts.iter().fold(0f32, |m, p| m.max(p.0));
                    let lowest = parts.iter().fold(0f32, |m, p| m.max(p.1));
                    let step = |p: &(f32, f32)| p.0 * (0.5 / 15.0) + widest / 63.0 + lowest / 63.0;
                    parts.iter().flat_map(|p| vec![step(p); 32]).collect::<Vec<_>>()
                })
                .collect(),
        }
    }

    #[test]
    fn a_quantized_product_is_off_by_its_formats_rounding_and_nothing_else() -> Result<()> {
        let (m, n, k) = (5, 12, 512);
        let dense = Tensor::randn(0f32, 0.05, (n, k), &Device::Cpu)?;
        let x = Tensor::randn(0f32, 1.0, (m, k), &Device::Cpu)?;
        let exact = product(Weight::dense(dense.clone())?, &x)?;
        let (w_rows, x_rows) = (dense.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
        for format in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K] {
            let weight = Weight::blocks(&dense, format, &Device::Cpu)?;
            let same_in_f32 = product(Weight::dense(weight.to_f32()?)?, &x)?;
            let ours = product(weight, &x)?;
            for i in 0..m {
                for j in 0..n {
                    let apart = (ours[i][j] - same_in_f32[i][j]).abs();
                    assert!(apart <= 2e-6, "{format:?}: {apart} from the product with dequantized weights");
                    let steps = half_steps(format, &w_rows[j]);
                    let bound: f32 = steps.iter().zip(&x_rows[i]).map(|(s, x)| s * x.abs()).sum();
                    let error = (ours[i][j] - exact[i][j]).abs();
                    assert!(error <= bound, "{format:?}: error {error} above the format's own {bound}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn half_precision_products_are_those_of_the_rounded_weights() -> Result<()> {
        let dense = Tensor::randn(0f32, 0.05, (9, 70), &Device::Cpu)?;
        let x = Tensor::randn(0f32, 1.0, (13, 70), &Device::Cpu)?;
        for dtype in [DType::F16, DType::BF16] {
            let rounded = dense.to_dtype(dtype)?;
            let wide = product(Weight::dense(rounded.to_dtype(DType::F32)?)?, &x)?;
            assert_eq!(product(Weight::dense(rounded)?, &x)?, wide, "{dtype:?}");
        }
        Ok(())
    }

    #[test]
    fn formats_follow_the_row_length() {
        assert_eq!(Quantization::Q4K.format(Role::Layer, 512), Some(GgmlDType::Q4K));
        assert_eq!(Quantization::Q4K.format(Role::Layer, 576), Some(GgmlDType::Q4_0));
        assert_eq!(Quantization::Q4K.format(Role::Vocabulary, 512), Some(GgmlDType::Q8_0));
        assert_eq!(Quantization::Q8_0.format(Role::Layer, 48), None);
        assert_eq!(Quantization::None.format(Role::Layer, 512), None);
    }
}

//! How a weight matrix is held: dense in f32, f16 or bf16, or in GGML blocks of 8 or 4 bits. One type for all,
//! so that a format is a property of a layer and never a second copy of a model.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{CpuStorage, DType, Device, Module, Result, Storage, Tensor};

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
                let product = QMatMul::from_arc(q.clone())?.forward(&x.to_dtype(DType::F32)?.contiguous()?)?;
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

    fn with_rows<R>(&self, f: impl FnOnce(Rows<'_>) -> Result<R>) -> Result<R> {
        match &self.held {
            Held::Dense(t) => {
                let (storage, layout) = t.storage_and_layout();
                let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
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

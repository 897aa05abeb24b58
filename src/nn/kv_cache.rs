//! The KV cache: pages of 16 positions, shared by all sequences, written in place. A sequence holds just the
//! pages that it fills, so no memory goes into padding, and nothing is moved when sequences come and go.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::ops::{self, f32_view};

/// Positions in a page.
pub const PAGE_TOKENS: usize = 16;

/// Rows of one sequence in a batch, and where its past lies.
#[derive(Debug, Clone)]
pub struct SequenceSpan {
    /// Rows of the batch, oldest position first.
    pub rows: Range<usize>,
    /// Position of the first row: the number of tokens that are cached already.
    pub start: usize,
    /// Page of each block of 16 positions; covers the new rows too.
    pub pages: Vec<u32>,
}

/// Shape of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Key/value heads a layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes that one page takes over all layers, keys and values.
    pub fn page_bytes(&self, dtype: DType) -> u64 {
        (2 * self.layers * self.kv_heads * self.head_dim * PAGE_TOKENS * dtype.size_in_bytes()) as u64
    }
}

/// Keys and values of every layer.
pub struct KvCache {
    shape: KvShape,
    pages: usize,
    layers: Vec<Layer>,
}

pub(crate) enum Layer {
    /// For our kernels: keys `[pages, kv_heads, head_dim, PAGE_TOKENS]` so that 16 scores are computed at once,
    /// values `[pages, kv_heads, PAGE_TOKENS, head_dim]`.
    Kernel { keys: Vec<f32>, values: Vec<f32> },
    /// For candle's operations: both `[pages * PAGE_TOKENS, kv_heads, head_dim]`.
    Composed { keys: Tensor, values: Tensor },
}

impl KvCache {
    /// Takes the memory for `pages` pages. On the CPU the system hands it out as it is first written.
    pub fn new(shape: KvShape, pages: usize, dtype: DType, device: &Device) -> Result<Self> {
        let layer = || -> Result<Layer> {
            if ops::has_kernels(device) {
                let elements = pages * PAGE_TOKENS * shape.kv_heads * shape.head_dim;
                return Ok(Layer::Kernel { keys: vec![0f32; elements], values: vec![0f32; elements] });
            }
            let zeros =
                || Tensor::zeros((pages * PAGE_TOKENS, shape.kv_heads, shape.head_dim), dtype, device);
            Ok(Layer::Composed { keys: zeros()?, values: zeros()? })
        };
        let layers = (0..shape.layers).map(|_| layer()).collect::<Result<_>>()?;
        Ok(Self { shape, pages, layers })
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn shape(&self) -> KvShape {
        self.shape
    }

    pub(crate) fn layer(&self, layer: usize) -> &Layer {
        &self.layers[layer]
    }

    /// Stores the rows' keys and values, both `[rows, kv_heads, head_dim]`, at their positions.
    pub fn write(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        spans: &[SequenceSpan],
    ) -> Result<()> {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        match &mut self.layers[layer] {
            Layer::Kernel { keys: key_pages, values: value_pages } => {
                let (keys, values) = (f32_view(keys)?, f32_view(values)?);
                for_positions(spans, |row, page, offset| {
                    for head in 0..kv_heads {
                        let from = (row * kv_heads + head) * head_dim;
                        let page = (page * kv_heads + head) * head_dim * PAGE_TOKENS;
                        for (d, &key) in keys[from..from + head_dim].iter().enumerate() {
                            key_pages[page + d * PAGE_TOKENS + offset] = key;
                        }
                        let to = page + offset * head_dim;
                        value_pages[to..to + head_dim].copy_from_slice(&values[from..from + head_dim]);
                    }
                    Ok(())
                })
            }
            Layer::Composed { keys: key_pages, values: value_pages } => {
                let (keys, values) = (keys.contiguous()?, values.contiguous()?);
                for_positions(spans, |row, page, offset| {
                    let slot = page * PAGE_TOKENS + offset;
                    key_pages.slice_set(&keys.narrow(0, row, 1)?.contiguous()?, 0, slot)?;
                    value_pages.slice_set(&values.narrow(0, row, 1)?.contiguous()?, 0, slot)
                })
            }
        }
    }
}

/// Calls `f(row, page, offset in page)` for every row of every span.
fn for_positions(spans: &[SequenceSpan], mut f: impl FnMut(usize, usize, usize) -> Result<()>) -> Result<()> {
    for span in spans {
        for (i, row) in span.rows.clone().enumerate() {
            let position = span.start + i;
            f(row, span.pages[position / PAGE_TOKENS] as usize, position % PAGE_TOKENS)?;
        }
    }
    Ok(())
}

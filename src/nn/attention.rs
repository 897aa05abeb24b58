//! Causal attention of a ragged batch over the KV cache: grouped heads, sliding windows, ALiBi.

use candle_core::{D, DType, Result, Tensor};

use super::kv_cache::{KvCache, KvShape, Layer, PAGE_TOKENS, SequenceSpan};
use super::ops::attend::Attend;
use super::ops::f32_view;

/// What attention is in one model, the same for every layer but for the window.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// What scores are multiplied with, most often 1 / sqrt(head_dim).
    pub scale: f64,
    /// One slope a head where positions enter as a bias (ALiBi, Press et al. 2022).
    pub alibi_slopes: Option<Vec<f32>>,
}

/// The slopes of ALiBi for any number of heads: powers of 2^(-8/n) for a power of two n, and for the heads beyond
/// it every other power of the next one, as in the paper's own code.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let whole = 1usize << heads.ilog2();
    let powers = |n: usize| {
        let base = 2f64.powf(-8.0 / n as f64);
        move |i: usize| base.powi(i as i32 + 1) as f32
    };
    let first = powers(whole);
    let between = powers(2 * whole);
    (0..whole).map(first).chain((0..heads - whole).map(|i| between(2 * i))).collect()
}

/// Attends from `q` `[rows, heads, head_dim]` to the cached positions of each row's sequence, the row itself
/// included; its own keys and values must be written already. Gives `[rows, heads * head_dim]`.
pub fn attend(
    q: &Tensor,
    cache: &KvCache,
    layer: usize,
    spans: &[SequenceSpan],
    spec: &AttentionSpec,
    window: Option<usize>,
) -> Result<Tensor> {
    let (rows, heads, head_dim) = q.dims3()?;
    let KvShape { kv_heads, .. } = cache.shape();
    match cache.layer(layer) {
        Layer::Kernel { keys, values } => {
            let view = f32_view(q)?;
            let y = Attend { q: &view, keys, values, heads, kv_heads, head_dim, spec, window }.compute(spans);
            Tensor::from_vec(y, (rows, heads * head_dim), q.device())
        }
        Layer::Composed { keys, values } => {
            let parts = spans
                .iter()
                .map(|span| {
                    composed(
                        &q.narrow(0, span.rows.start, span.rows.len())?,
                        keys,
                        values,
                        span,
                        spec,
                        window,
                    )
                })
                .collect::<Result<Vec<_>>>()?;
            Tensor::cat(&parts, 0)
        }
    }
}

/// One sequence by candle's operations: gathers its pages, then softmax(q kᵀ + bias) v.
fn composed(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    span: &SequenceSpan,
    spec: &AttentionSpec,
    window: Option<usize>,
) -> Result<Tensor> {
    let (rows, heads, head_dim) = q.dims3()?;
    let kv_heads = keys.dim(1)?;
    let group = heads / kv_heads;
    let length = span.start + rows;
    let slots: Vec<u32> = (0..length)
        .map(|j| span.pages[j / PAGE_TOKENS] * PAGE_TOKENS as u32 + (j % PAGE_TOKENS) as u32)
        .collect();
    let slots = Tensor::new(slots, q.device())?;
    let keys = keys.index_select(&slots, 0)?.permute((1, 2, 0))?.contiguous()?; // [Hk, D, T]
    let values = values.index_select(&slots, 0)?.transpose(0, 1)?.contiguous()?; // [Hk, T, D]
    let q = q.reshape((rows, kv_heads, group, head_dim))?.permute((1, 2, 0, 3))?;
    let q = q.contiguous()?.reshape((kv_heads, group * rows, head_dim))?; // [Hk, G * M, D]
    let scores = (q.matmul(&keys)?.to_dtype(DType::F32)? * spec.scale)?.reshape((heads, rows, length))?;
    let mut bias = Vec::with_capacity(heads * rows * length);
    for head in 0..heads {
        let slope = spec.alibi_slopes.as_ref().map_or(0.0, |s| s[head]);
        for row in 0..rows {
            let position = span.start + row;
            let oldest = window.map_or(0, |w| (position + 1).saturating_sub(w));
            bias.extend((0..length).map(|j| {
                if j < oldest || j > position {
                    f32::NEG_INFINITY
                } else {
                    slope * (j as f32 - position as f32)
                }
            }));
        }
    }
    let scores = (scores + Tensor::from_vec(bias, (heads, rows, length), q.device())?)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(values.dtype())?;
    let mixed = weights.reshape((kv_heads, group * rows, length))?.matmul(&values)?; // [Hk, G * M, D]
    mixed.reshape((kv_heads, group, rows, head_dim))?.permute((2, 0, 1, 3))?.reshape((rows, heads * head_dim))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_of_powers_of_two_and_others() {
        assert_eq!(alibi_slopes(8)[0], 0.5);
        assert_eq!(alibi_slopes(8)[7], 1.0 / 256.0);
        // Six heads: those of four, then the first and third of eight.
        assert_eq!(alibi_slopes(6), vec![0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]);
    }
}

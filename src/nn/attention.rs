//! Causal attention of a ragged batch over the KV cache: grouped heads, sliding windows, ALiBi.

use std::ops::Range;

use candle_core::{D, DType, Device, Result, Tensor};

use super::kv_cache::{KvCache, KvShape, Layer, PAGE_TOKENS, SequenceSpan};
use super::ops::attend::Attend;
use super::ops::attend_rows::{AttendRows, Forward};
use super::ops::{f32_view, has_kernels};

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

/// Attention among the rows of sequences that begin and end in the batch, without a cache: training's. `q` is
/// `[rows, heads, D]`, `k` and `v` are `[rows, kv_heads, D]`. Gives `[rows, heads * D]`, and for our kernels the
/// logarithms of the sums of exponentials `[rows, heads]`, which the way back needs.
pub(crate) fn attend_rows(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    sequences: &[Range<usize>],
    spec: &AttentionSpec,
    window: Option<usize>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, heads, head_dim) = q.dims3()?;
    if has_kernels(q.device()) {
        let shape = rows_kernel(q, k, sequences, spec, window)?;
        let (mixed, sums) = shape.forward(&f32_view(q)?, &f32_view(k)?, &f32_view(v)?);
        let mixed = Tensor::from_vec(mixed, (rows, heads * head_dim), q.device())?;
        return Ok((mixed, Some(Tensor::from_vec(sums, (rows, heads), q.device())?)));
    }
    let parts = sequences.iter().map(|s| {
        let part = |t: &Tensor| t.narrow(0, s.start, s.len());
        let (weights, v) = (row_weights(&part(q)?, &part(k)?, spec, window)?, repeated(&part(v)?, heads)?);
        let mixed = weights.to_dtype(v.dtype())?.matmul(&v)?; // [H, T, D]
        mixed.transpose(0, 1)?.contiguous()?.reshape((s.len(), heads * head_dim))
    });
    Ok((Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?, None))
}

/// Gradients by q, k and v of [`attend_rows`], from what it was given, what it gave, and the gradient by that.
pub(crate) fn attend_rows_backward(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (mixed, log_sums): (&Tensor, Option<&Tensor>),
    gradient: &Tensor,
    sequences: &[Range<usize>],
    spec: &AttentionSpec,
    window: Option<usize>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (rows, heads, head_dim) = q.dims3()?;
    if let Some(log_sums) = log_sums {
        let shape = rows_kernel(q, k, sequences, spec, window)?;
        let forward = Forward {
            q: &f32_view(q)?,
            k: &f32_view(k)?,
            v: &f32_view(v)?,
            mixed: &f32_view(mixed)?,
            log_sums: &f32_view(log_sums)?,
        };
        let all = shape.backward(forward, &f32_view(gradient)?);
        let back = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), q.device());
        return Ok((back(all.q, q)?, back(all.k, k)?, back(all.v, v)?));
    }
    let gradient = gradient.reshape((rows, heads, head_dim))?;
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for s in sequences {
        let part = |t: &Tensor| t.narrow(0, s.start, s.len());
        let (q, k, v) = (part(q)?, part(k)?, part(v)?);
        let kv_heads = k.dim(1)?;
        let p = row_weights(&q, &k, spec, window)?; // [H, T, T]
        let dy = part(&gradient)?.transpose(0, 1)?.contiguous()?; // [H, T, D]
        let dp = dy.matmul(&repeated(&v, heads)?.transpose(1, 2)?.contiguous()?)?.to_dtype(DType::F32)?;
        let along = (&p * &dp)?.sum_keepdim(D::Minus1)?;
        let ds = ((&p * dp.broadcast_sub(&along)?)? * spec.scale)?.to_dtype(q.dtype())?;
        let p = p.to_dtype(q.dtype())?;
        let rows_first = |t: Tensor| t.transpose(0, 1)?.contiguous();
        // Heads that share keys and values add up what they give.
        let grouped = |t: Tensor| {
            let shape = (kv_heads, heads / kv_heads, s.len(), head_dim);
            rows_first(t.reshape(shape)?.sum(1)?)
        };
        dq.push(rows_first(ds.matmul(&repeated(&k, heads)?)?)?);
        let q_by_head = q.transpose(0, 1)?.contiguous()?;
        dk.push(grouped(ds.transpose(1, 2)?.contiguous()?.matmul(&q_by_head)?)?);
        dv.push(grouped(p.transpose(1, 2)?.contiguous()?.matmul(&dy)?)?);
    }
    Ok((Tensor::cat(&dq, 0)?, Tensor::cat(&dk, 0)?, Tensor::cat(&dv, 0)?))
}

fn rows_kernel<'a>(
    q: &Tensor,
    k: &Tensor,
    sequences: &'a [Range<usize>],
    spec: &'a AttentionSpec,
    window: Option<usize>,
) -> Result<AttendRows<'a>> {
    Ok(AttendRows {
        heads: q.dim(1)?,
        kv_heads: k.dim(1)?,
        head_dim: q.dim(2)?,
        scale: spec.scale as f32,
        slopes: spec.alibi_slopes.as_deref().unwrap_or_default(),
        window,
        sequences,
    })
}

/// `[T, kv_heads, D]` as `[heads, T, D]`, each key/value head as often as heads share it.
fn repeated(t: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, kv_heads, d) = t.dims3()?;
    let by_head = t.transpose(0, 1)?.reshape((kv_heads, 1, rows, d))?;
    by_head.expand((kv_heads, heads / kv_heads, rows, d))?.reshape((heads, rows, d))
}

/// The probabilities of one sequence by candle's operations, `[heads, T, T]`, f32.
fn row_weights(q: &Tensor, k: &Tensor, spec: &AttentionSpec, window: Option<usize>) -> Result<Tensor> {
    let (rows, heads, _) = q.dims3()?;
    let q_by_head = q.transpose(0, 1)?.contiguous()?;
    let keys = repeated(k, heads)?.transpose(1, 2)?.contiguous()?;
    let scores = (q_by_head.matmul(&keys)?.to_dtype(DType::F32)? * spec.scale)?;
    let bias = bias(heads, 0..rows, rows, spec, window, q.device())?;
    candle_nn::ops::softmax(&(scores + bias)?, D::Minus1)
}

/// What is added to the scores `[heads, positions.len(), length]` of queries at `positions`: ALiBi's bias, and
/// minus infinity where a query must not look.
fn bias(
    heads: usize,
    positions: Range<usize>,
    length: usize,
    spec: &AttentionSpec,
    window: Option<usize>,
    device: &Device,
) -> Result<Tensor> {
    let shape = (heads, positions.len(), length);
    let mut bias = Vec::with_capacity(heads * positions.len() * length);
    for head in 0..heads {
        let slope = spec.alibi_slopes.as_ref().map_or(0.0, |s| s[head]);
        for position in positions.clone() {
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
    Tensor::from_vec(bias, shape, device)
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
    let bias = bias(heads, span.start..length, length, spec, window, q.device())?;
    let scores = (scores + bias)?;
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

//! RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016) over the last dimension.

use candle_core::{D, DType, Result, Tensor};

use super::math::lane_sum;
use super::{Shared, f32_view, has_kernels, multiversion, parallel};

/// x / sqrt(mean(x²) + eps) * weight, over rows of `weight.len()` elements. `x` is any shape whose element
/// count is a multiple; the shape is kept. The weight is f32.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if has_kernels(x.device()) {
        let weight = f32_view(weight)?;
        let w = &*weight;
        return by_rows(x, w.len(), |x, y| rms_row(x, w, eps as f32, y));
    }
    let wide = x.to_dtype(DType::F32)?.reshape(((), weight.elem_count()))?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    normed.broadcast_mul(weight)?.to_dtype(x.dtype())?.reshape(x.shape())
}

/// (x - mean) / sqrt(var + eps) * weight + bias, as [`rms_norm`].
pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if has_kernels(x.device()) {
        let (weight, bias) = (f32_view(weight)?, f32_view(bias)?);
        let (w, b) = (&*weight, &*bias);
        return by_rows(x, w.len(), |x, y| layer_row(x, w, b, eps as f32, y));
    }
    let wide = x.to_dtype(DType::F32)?.reshape(((), weight.elem_count()))?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(var + eps)?.sqrt()?)?;
    normed.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())?.reshape(x.shape())
}

/// Gradient by x of [`rms_norm`], from the gradient by its result; the weight is frozen.
pub(crate) fn rms_norm_backward(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    if has_kernels(x.device()) {
        let weight = f32_view(weight)?;
        let w = &*weight;
        return by_two_rows(x, dy, w.len(), |x, dy, dx| rms_row_backward(x, dy, w, eps as f32, dx));
    }
    let wide = |t: &Tensor| t.to_dtype(DType::F32)?.reshape(((), weight.elem_count()));
    let (rows, gradient) = (wide(x)?, wide(dy)?.broadcast_mul(weight)?);
    let scale = (rows.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let normed = rows.broadcast_mul(&scale)?;
    let along = (&gradient * &normed)?.mean_keepdim(D::Minus1)?;
    let dx = (gradient - normed.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
    dx.to_dtype(x.dtype())?.reshape(x.shape())
}

/// Gradient by the weight of [`rms_norm`], from the gradient by its result.
pub(crate) fn rms_norm_weight_gradient(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32)?.reshape(((), weight.elem_count()));
    let (rows, gradient) = (wide(x)?, wide(dy)?);
    let scale = (rows.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    (gradient * rows.broadcast_mul(&scale)?)?.sum(0)
}

/// Gradient by x of [`layer_norm`], as [`rms_norm_backward`].
pub(crate) fn layer_norm_backward(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    if has_kernels(x.device()) {
        let weight = f32_view(weight)?;
        let w = &*weight;
        return by_two_rows(x, dy, w.len(), |x, dy, dx| layer_row_backward(x, dy, w, eps as f32, dx));
    }
    let wide = |t: &Tensor| t.to_dtype(DType::F32)?.reshape(((), weight.elem_count()));
    let (rows, gradient) = (wide(x)?, wide(dy)?.broadcast_mul(weight)?);
    let centred = rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)?;
    let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let normed = centred.broadcast_mul(&scale)?;
    let along = (&gradient * &normed)?.mean_keepdim(D::Minus1)?;
    let free = gradient.broadcast_sub(&gradient.mean_keepdim(D::Minus1)?)?;
    let dx = (free - normed.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
    dx.to_dtype(x.dtype())?.reshape(x.shape())
}

/// [`by_rows`] with a second input of the same shape.
#[expect(unsafe_code, reason = "threads write disjoint rows")]
fn by_two_rows(
    x: &Tensor,
    other: &Tensor,
    d: usize,
    f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> Result<Tensor> {
    let views = (f32_view(x)?, f32_view(other)?);
    let (x_all, other_all) = (&*views.0, &*views.1);
    if x_all.len() != other_all.len() {
        candle_core::bail!("rows of {} and {} elements", x_all.len(), other_all.len());
    }
    let mut y = vec![0f32; x_all.len()];
    let out = Shared::new(&mut y);
    parallel(x_all.len() / d, x_all.len(), |rows| {
        let range = rows.start * d..rows.end * d;
        // SAFETY: each thread has its own rows.
        f(&x_all[range.clone()], &other_all[range.clone()], unsafe { out.part(range) });
    });
    Tensor::from_vec(y, x.shape(), x.device())
}

/// Applies `f(rows of x, rows of y)` in parallel; `f` takes whole rows of `d` elements, several at a time.
#[expect(unsafe_code, reason = "threads write disjoint rows")]
fn by_rows(x: &Tensor, d: usize, f: impl Fn(&[f32], &mut [f32]) + Sync) -> Result<Tensor> {
    let view = f32_view(x)?;
    let from = &*view;
    let mut y = vec![0f32; from.len()];
    let out = Shared::new(&mut y);
    parallel(from.len() / d, from.len(), |rows| {
        let range = rows.start * d..rows.end * d;
        // SAFETY: each thread has its own rows.
        f(&from[range.clone()], unsafe { out.part(range) });
    });
    Tensor::from_vec(y, x.shape(), x.device())
}

multiversion! {
    fn rms_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let d = w.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let squares = lane_sum(d, |i, acc| x[i].mul_add(x[i], acc));
            let scale = 1.0 / (squares / d as f32 + eps).sqrt();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * scale * w;
            }
        }
    }
}

multiversion! {
    fn layer_row(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) {
        let d = w.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let mean = lane_sum(d, |i, acc| acc + x[i]) / d as f32;
            let squares = lane_sum(d, |i, acc| (x[i] - mean).mul_add(x[i] - mean, acc));
            let scale = 1.0 / (squares / d as f32 + eps).sqrt();
            for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = ((x - mean) * scale).mul_add(w, b);
            }
        }
    }
}

multiversion! {
    fn rms_row_backward(x: &[f32], dy: &[f32], w: &[f32], eps: f32, dx: &mut [f32]) {
        let d = w.len();
        for ((x, dy), dx) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
            let squares = lane_sum(d, |i, acc| x[i].mul_add(x[i], acc));
            let along = lane_sum(d, |i, acc| (dy[i] * w[i]).mul_add(x[i], acc));
            let scale = 1.0 / (squares / d as f32 + eps).sqrt();
            let pull = along * scale * scale / d as f32;
            for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                *dx = x.mul_add(-pull, dy * w) * scale;
            }
        }
    }
}

multiversion! {
    fn layer_row_backward(x: &[f32], dy: &[f32], w: &[f32], eps: f32, dx: &mut [f32]) {
        let d = w.len();
        for ((x, dy), dx) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
            let mean = lane_sum(d, |i, acc| acc + x[i]) / d as f32;
            let squares = lane_sum(d, |i, acc| (x[i] - mean).mul_add(x[i] - mean, acc));
            let scale = 1.0 / (squares / d as f32 + eps).sqrt();
            let level = lane_sum(d, |i, acc| dy[i].mul_add(w[i], acc)) / d as f32;
            let along = lane_sum(d, |i, acc| (dy[i] * w[i]).mul_add(x[i] - mean, acc));
            let pull = along * scale * scale / d as f32;
            for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                *dx = (x - mean).mul_add(-pull, dy.mul_add(w, -level)) * scale;
            }
        }
    }
}

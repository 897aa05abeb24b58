//! Rotary position embedding (Su et al. 2021) in the half-split form that checkpoints on the hub use: element i
//! turns with element i + D/2.

use candle_core::{Result, Tensor};

use super::{Shared, f32_view, has_kernels, multiversion, parallel};

/// Turns every head of every row by the angle of its row's position.
///
/// `x` is `[rows, heads, D]`; `cos` and `sin` are `[positions, D / 2]`, f32; `positions` has one entry a row.
/// `direction` is 1, or -1 to turn back, which is also the backward pass.
pub(crate) fn rotate(
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    positions: &[u32],
    direction: f32,
) -> Result<Tensor> {
    let (rows, heads, d) = x.dims3()?;
    if !has_kernels(x.device()) {
        let at = Tensor::new(positions, x.device())?;
        let table = |t: &Tensor| t.index_select(&at, 0)?.reshape((rows, 1, d / 2))?.to_dtype(x.dtype());
        let (cos, sin) = (table(cos)?, (table(sin)? * direction as f64)?);
        let (low, high) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
        let new_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let new_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        return Tensor::cat(&[new_low, new_high], 2);
    }
    let y = by_rows(&f32_view(x)?, &f32_view(cos)?, &f32_view(sin)?, positions, direction, d);
    Tensor::from_vec(y, (rows, heads, d), x.device())
}

#[expect(unsafe_code, reason = "threads write disjoint rows")]
fn by_rows(x: &[f32], cos: &[f32], sin: &[f32], positions: &[u32], direction: f32, d: usize) -> Vec<f32> {
    let mut y = vec![0f32; x.len()];
    let out = Shared::new(&mut y);
    let width = x.len() / positions.len().max(1);
    parallel(positions.len(), x.len(), |rows| {
        for row in rows {
            let range = row * width..(row + 1) * width;
            let angle = positions[row] as usize * d / 2;
            let (cos, sin) = (&cos[angle..angle + d / 2], &sin[angle..angle + d / 2]);
            // SAFETY: each thread has its own rows.
            turn(&x[range.clone()], cos, sin, direction, unsafe { out.part(range) });
        }
    });
    y
}

multiversion! {
    fn turn(x: &[f32], cos: &[f32], sin: &[f32], direction: f32, y: &mut [f32]) {
        let half = cos.len();
        for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
            let ((low, high), (y_low, y_high)) = (x.split_at(half), y.split_at_mut(half));
            for i in 0..half {
                let sin = direction * sin[i];
                y_low[i] = low[i] * cos[i] - high[i] * sin;
                y_high[i] = high[i] * cos[i] + low[i] * sin;
            }
        }
    }
}

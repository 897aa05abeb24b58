//! What training minimises: a loss a token, as a function of the token's log-probability, and the kernel that
//! takes some positions from hidden state to log-probability and back to the gradient of the hidden state. The
//! logits of those positions are all that is ever held of `[tokens, vocabulary]`.

use candle_core::{D, DType, Result, Tensor};

use super::linear::Linear;
use super::ops::math::{exp, lane_sum};
use super::ops::{Shared, f32_view, has_kernels, multiversion, parallel};

/// A loss a token. Each gives its value and its derivative by ln p, which is all that the kernel needs: another
/// loss is another variant with what it compares with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenLoss {
    /// -ln p.
    CrossEntropy,
}

impl TokenLoss {
    /// The loss at this log-probability, and its derivative by it.
    pub fn at(self, logprob: f32) -> (f32, f32) {
        match self {
            Self::CrossEntropy => (-logprob, -1.0),
        }
    }
}

/// What some positions gave.
pub(crate) struct Outcome {
    /// ln p of each position's target.
    pub(crate) logprobs: Vec<f32>,
    /// Σ weight · loss.
    pub(crate) loss_sum: f64,
    /// By the hidden states, `[positions, hidden]`, in their type.
    pub(crate) gradient: Option<Tensor>,
}

/// Positions to work on together.
pub(crate) struct Positions<'a> {
    /// Token that each should predict.
    pub(crate) targets: &'a [u32],
    /// Weight of each one's loss.
    pub(crate) weights: &'a [f32],
    /// The loss.
    pub(crate) loss: TokenLoss,
    /// What logits are divided by.
    pub(crate) logits_divisor: f64,
    /// What the gradient is multiplied with (loss scaling); `None` asks for no gradient.
    pub(crate) gradient_scale: Option<f64>,
}

impl Positions<'_> {
    /// Log-probabilities, loss and gradient from normed hidden states `[positions, hidden]` and the output head.
    pub(crate) fn through(&self, hidden: &Tensor, head: &Linear) -> Result<Outcome> {
        if has_kernels(hidden.device()) {
            return self.by_kernel(hidden, head);
        }
        let inverse = 1.0 / self.logits_divisor;
        let (y, _) = head.train_forward(hidden, None, None)?;
        let logits = (y.to_dtype(DType::F32)? * inverse)?;
        let targets = Tensor::new(self.targets, hidden.device())?.unsqueeze(1)?;
        let centred = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        let exponentials = centred.exp()?;
        let sums = exponentials.sum_keepdim(D::Minus1)?;
        let logprobs = (centred.gather(&targets, D::Minus1)? - sums.log()?)?.squeeze(1)?.to_vec1::<f32>()?;
        let (loss_sum, slopes) = self.losses(&logprobs);
        let gradient = match self.gradient_scale {
            None => None,
            Some(_) => {
                let slopes = (Tensor::new(slopes, hidden.device())?.unsqueeze(1)? * inverse)?;
                let spread = exponentials.broadcast_div(&sums)?.broadcast_mul(&slopes.neg()?)?;
                let by_logits = spread.scatter_add(&targets, &slopes, D::Minus1)?;
                let (dx, _) = head.train_backward(
                    hidden,
                    None,
                    &by_logits.to_dtype(hidden.dtype())?,
                    None,
                    None,
                    true,
                )?;
                dx
            }
        };
        Ok(Outcome { logprobs, loss_sum, gradient })
    }

    #[expect(unsafe_code, reason = "threads write disjoint rows")]
    fn by_kernel(&self, hidden: &Tensor, head: &Linear) -> Result<Outcome> {
        let vocabulary = head.weight().rows();
        let inverse = (1.0 / self.logits_divisor) as f32;
        let mut logits = head.train_product(&f32_view(hidden)?)?;
        let count = self.targets.len();
        let (mut logprobs, mut sums) = (vec![0f32; count], vec![0f32; count]);
        {
            let all = Shared::new(&mut logits);
            let (to_logprobs, to_sums) = (Shared::new(&mut logprobs), Shared::new(&mut sums));
            parallel(count, 16 * count * vocabulary, |rows| {
                for row in rows {
                    // SAFETY: each thread has its own rows.
                    let (logits, logprob, sum) = unsafe {
                        (
                            all.part(row * vocabulary..(row + 1) * vocabulary),
                            to_logprobs.part(row..row + 1),
                            to_sums.part(row..row + 1),
                        )
                    };
                    (logprob[0], sum[0]) = exponentials(logits, self.targets[row] as usize, inverse);
                }
            });
        }
        let (loss_sum, slopes) = self.losses(&logprobs);
        if self.gradient_scale.is_none() {
            return Ok(Outcome { logprobs, loss_sum, gradient: None });
        }
        let all = Shared::new(&mut logits);
        parallel(count, 4 * count * vocabulary, |rows| {
            for row in rows {
                // SAFETY: each thread has its own rows.
                let by_logits = unsafe { all.part(row * vocabulary..(row + 1) * vocabulary) };
                let slope = slopes[row] * inverse;
                scale(by_logits, -slope / sums[row]);
                by_logits[self.targets[row] as usize] += slope;
            }
        });
        let gradient = head.weight().train_back_product(&logits, None)?;
        let gradient = Tensor::from_vec(gradient, hidden.shape(), hidden.device())?;
        Ok(Outcome { logprobs, loss_sum, gradient: Some(gradient) })
    }

    /// Σ weight · loss, and the derivative of each position's share by its log-probability, scaled.
    fn losses(&self, logprobs: &[f32]) -> (f64, Vec<f32>) {
        let scale = self.gradient_scale.unwrap_or(0.0) as f32;
        let mut sum = 0f64;
        let slopes = logprobs
            .iter()
            .zip(self.weights)
            .map(|(&logprob, &weight)| {
                let (loss, slope) = self.loss.at(logprob);
                sum += weight as f64 * loss as f64;
                weight * slope * scale
            })
            .collect();
        (sum, slopes)
    }
}

multiversion! {
    /// Turns a row of logits into exponentials; gives ln p of the target, and the exponentials' sum.
    fn exponentials(row: &mut [f32], target: usize, inverse: f32) -> (f32, f32) {
        let mut most = [f32::NEG_INFINITY; 16];
        for part in row.chunks_mut(16) {
            for (m, x) in most.iter_mut().zip(part) {
                *x *= inverse;
                // A logit that is not a number must not be passed over.
                *m = if *x <= *m { *m } else { *x };
            }
        }
        let most = most.iter().fold(f32::NEG_INFINITY, |a, &b| if b <= a { a } else { b });
        let chosen = row[target] - most;
        for x in row.iter_mut() {
            *x = exp(*x - most);
        }
        let sum = lane_sum(row.len(), |j, acc| acc + row[j]);
        (chosen - sum.ln(), sum)
    }
}

multiversion! {
    fn scale(row: &mut [f32], by: f32) {
        for x in row.iter_mut() {
            *x *= by;
        }
    }
}

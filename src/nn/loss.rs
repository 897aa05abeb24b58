//! What training minimises: a loss a token, as a function of the token's log-probability, and the kernel that
//! takes some positions from hidden state to log-probability and back to the gradient of the hidden state. The
//! logits of those positions are all that is ever held of `[tokens, vocabulary]`.

use candle_core::{D, DType, Result, Tensor};

use super::linear::Linear;
use super::ops::gemm::at_b;
use super::ops::math::{exp, lane_sum};
use super::ops::{Shared, f32_view, has_kernels, multiversion, parallel_rows};
pub use super::policy::{PolicyToken, TokenLoss};

/// What some positions gave.
pub(crate) struct Outcome {
    /// ln p of each position's target.
    pub(crate) logprobs: Vec<f32>,
    /// Entropy of each position's distribution, in nats, where the loss is a policy's; else empty.
    pub(crate) entropies: Vec<f32>,
    /// Σ weight · loss.
    pub(crate) loss_sum: f64,
    /// By the hidden states, `[positions, hidden]`, in their type.
    pub(crate) gradient: Option<Tensor>,
    /// By the head's weight, `[vocabulary, hidden]` in f32, where it was asked for.
    pub(crate) by_head: Option<Tensor>,
}

/// Positions to work on together.
#[derive(Debug, Clone)]
pub(crate) struct Positions {
    /// Token that each should predict.
    pub(crate) targets: Vec<u32>,
    /// Weight of each one's loss.
    pub(crate) weights: Vec<f32>,
    /// What a policy's loss compares with, a token each; empty for the others.
    pub(crate) policy: Vec<PolicyToken>,
    /// The loss.
    pub(crate) loss: TokenLoss,
    /// What logits are divided by.
    pub(crate) logits_divisor: f64,
    /// What the gradient is multiplied with (loss scaling); `None` asks for no gradient.
    pub(crate) gradient_scale: Option<f64>,
    /// Whether the head's weight wants a gradient too.
    pub(crate) head_learns: bool,
}

/// Multiply-adds of one piece of the work; few in unit tests, so that small vocabularies take several.
const PIECE: usize = if cfg!(test) { 1 } else { 1_500_000_000 };

/// Some positions on their way from normed hidden states `[positions, hidden]` through the output head and back,
/// a band of the vocabulary at a time. The bands follow from the shapes, so no result depends on what happens
/// between two pieces.
pub(crate) struct LossChunk {
    positions: Positions,
    hidden: Tensor,
    /// Words of each band.
    band: usize,
    /// Of each band that is done, `[positions, words]`: logits at first, exponentials when all are there.
    bands: Vec<Vec<f32>>,
    most: Vec<f32>,
    logprobs: Vec<f32>,
    sums: Vec<f32>,
    /// Σ e·ln e over the exponentials e of each position; empty where no entropy is wanted.
    moments: Vec<f32>,
    loss_sum: f64,
    /// Derivative of each position's share of the loss by its target's logit.
    slopes: Vec<f32>,
    gradient: Vec<f32>,
    /// By the head's weight, the bands that are done; empty where it does not learn.
    by_head: Vec<f32>,
    stage: Stage,
}

/// What a chunk does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Logits(usize),
    Sums,
    Back(usize),
}

impl LossChunk {
    pub(crate) fn new(positions: Positions, hidden: Tensor, head: &Linear) -> Self {
        let count = positions.targets.len();
        let per_word = (count * head.weight().columns()).max(1);
        let band = (PIECE / per_word).max(256).next_multiple_of(32).min(head.weight().rows().max(1));
        let moments = if positions.loss.is_policy() { vec![0.0; count] } else { Vec::new() };
        Self {
            positions,
            moments,
            hidden,
            band,
            bands: Vec::new(),
            most: vec![f32::NEG_INFINITY; count],
            logprobs: vec![0.0; count],
            sums: vec![0.0; count],
            loss_sum: 0.0,
            slopes: Vec::new(),
            gradient: Vec::new(),
            by_head: Vec::new(),
            stage: Stage::Logits(0),
        }
    }

    /// Does one piece; gives the outcome with the last.
    pub(crate) fn advance(&mut self, head: &Linear) -> Result<Option<Outcome>> {
        if !has_kernels(self.hidden.device()) {
            return self.positions.composed(&self.hidden, head).map(Some);
        }
        let vocabulary = head.weight().rows();
        let words = |band: usize| band * self.band..((band + 1) * self.band).min(vocabulary);
        match self.stage {
            Stage::Logits(band) => {
                let words = words(band);
                let logits = head.band_product(&f32_view(&self.hidden)?, words.clone())?;
                self.take(logits, words.len());
                let more = words.end < vocabulary;
                self.stage = if more { Stage::Logits(band + 1) } else { Stage::Sums };
                Ok(None)
            }
            Stage::Sums => {
                self.exponentials();
                let (loss_sum, slopes) = self.positions.losses(&self.logprobs);
                (self.loss_sum, self.slopes) = (loss_sum, slopes);
                if self.positions.gradient_scale.is_none() {
                    return Ok(Some(self.outcome(None)));
                }
                self.gradient = vec![0.0; self.hidden.elem_count()];
                self.stage = Stage::Back(0);
                Ok(None)
            }
            Stage::Back(band) => {
                let words = words(band);
                let by_logits = self.by_logits(band, words.clone());
                let part = head.weight().band_back_product(&by_logits, words.clone())?;
                add(&mut self.gradient, &part);
                if self.positions.head_learns {
                    let (words, columns) = (words.len(), head.weight().columns());
                    self.by_head.extend(at_b(&by_logits, &f32_view(&self.hidden)?, words, columns));
                }
                if words.end < vocabulary {
                    self.stage = Stage::Back(band + 1);
                    return Ok(None);
                }
                let gradient = std::mem::take(&mut self.gradient);
                let gradient = Tensor::from_vec(gradient, self.hidden.shape(), self.hidden.device())?;
                let mut outcome = self.outcome(Some(gradient));
                if self.positions.head_learns {
                    let by_head = std::mem::take(&mut self.by_head);
                    let shape = (vocabulary, head.weight().columns());
                    outcome.by_head = Some(Tensor::from_vec(by_head, shape, self.hidden.device())?);
                }
                Ok(Some(outcome))
            }
        }
    }

    fn outcome(&mut self, gradient: Option<Tensor>) -> Outcome {
        let logprobs = std::mem::take(&mut self.logprobs);
        let entropy = |(moment, sum): (&f32, &f32)| sum.ln() - moment / sum;
        let entropies = self.moments.iter().zip(&self.sums).map(entropy).collect();
        Outcome { logprobs, entropies, loss_sum: self.loss_sum, gradient, by_head: None }
    }

    /// Keeps a band's logits, and the largest that each position has seen.
    #[expect(unsafe_code, reason = "threads write disjoint rows")]
    fn take(&mut self, mut logits: Vec<f32>, words: usize) {
        let inverse = (1.0 / self.positions.logits_divisor) as f32;
        let (all, to_most) = (Shared::new(&mut logits), Shared::new(&mut self.most));
        parallel_rows(self.logprobs.len(), 4 * self.logprobs.len() * words, |rows| {
            for row in rows {
                // SAFETY: each thread has its own rows.
                let (logits, most) =
                    unsafe { (all.part(row * words..(row + 1) * words), to_most.part(row..row + 1)) };
                most[0] = largest(logits, inverse, most[0]);
            }
        });
        self.bands.push(logits);
    }

    /// Turns all logits into exponentials, and gets each position's log-probability and sum.
    #[expect(unsafe_code, reason = "threads write disjoint rows")]
    fn exponentials(&mut self) {
        let count = self.logprobs.len();
        let (band, most, targets) = (self.band, &self.most, &self.positions.targets);
        let with_entropy = !self.moments.is_empty();
        let (to_logprobs, to_sums) = (Shared::new(&mut self.logprobs), Shared::new(&mut self.sums));
        let to_moments = Shared::new(&mut self.moments);
        for (number, logits) in self.bands.iter_mut().enumerate() {
            let words = logits.len() / count.max(1);
            let all = Shared::new(logits);
            parallel_rows(count, 16 * count * words, |rows| {
                for row in rows {
                    // SAFETY: each thread has its own rows.
                    let (logits, logprob, sum) = unsafe {
                        (
                            all.part(row * words..(row + 1) * words),
                            to_logprobs.part(row..row + 1),
                            to_sums.part(row..row + 1),
                        )
                    };
                    let target = targets[row] as usize;
                    if target / band == number {
                        logprob[0] = logits[target % band] - most[row];
                    }
                    if with_entropy {
                        // SAFETY: as above.
                        let moment = unsafe { to_moments.part(row..row + 1) };
                        moment[0] += moment_of(logits, most[row]);
                    }
                    sum[0] += exponentials(logits, most[row]);
                }
            });
        }
        for (logprob, sum) in self.logprobs.iter_mut().zip(&self.sums) {
            *logprob -= sum.ln();
        }
    }

    /// Takes a band's exponentials and makes them the gradient by its logits.
    #[expect(unsafe_code, reason = "threads write disjoint rows")]
    fn by_logits(&mut self, band: usize, words: std::ops::Range<usize>) -> Vec<f32> {
        let inverse = (1.0 / self.positions.logits_divisor) as f32;
        let mut by_logits = std::mem::take(&mut self.bands[band]);
        let all = Shared::new(&mut by_logits);
        parallel_rows(self.slopes.len(), 4 * self.slopes.len() * words.len(), |rows| {
            for row in rows {
                // SAFETY: each thread has its own rows.
                let by_logits = unsafe { all.part(row * words.len()..(row + 1) * words.len()) };
                let slope = self.slopes[row] * inverse;
                scale(by_logits, -slope / self.sums[row]);
                let target = self.positions.targets[row] as usize;
                if words.contains(&target) {
                    by_logits[target - words.start] += slope;
                }
            }
        });
        by_logits
    }
}

impl Positions {
    /// All of it by candle's operations.
    fn composed(&self, hidden: &Tensor, head: &Linear) -> Result<Outcome> {
        let inverse = 1.0 / self.logits_divisor;
        let (y, _) = head.train_forward(hidden, None, None)?;
        let logits = (y.to_dtype(DType::F32)? * inverse)?;
        let targets = Tensor::new(self.targets.as_slice(), hidden.device())?.unsqueeze(1)?;
        let centred = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        let exponentials = centred.exp()?;
        let sums = exponentials.sum_keepdim(D::Minus1)?;
        let logprobs = (centred.gather(&targets, D::Minus1)? - sums.log()?)?.squeeze(1)?.to_vec1::<f32>()?;
        let entropies = if self.loss.is_policy() {
            let moments = (&exponentials * &centred)?.sum_keepdim(D::Minus1)?;
            (sums.log()? - (moments / &sums)?)?.squeeze(1)?.to_vec1::<f32>()?
        } else {
            Vec::new()
        };
        let (loss_sum, slopes) = self.losses(&logprobs);
        if self.gradient_scale.is_none() {
            return Ok(Outcome { logprobs, entropies, loss_sum, gradient: None, by_head: None });
        }
        let slopes = (Tensor::new(slopes, hidden.device())?.unsqueeze(1)? * inverse)?;
        let spread = exponentials.broadcast_div(&sums)?.broadcast_mul(&slopes.neg()?)?;
        let by_logits = spread.scatter_add(&targets, &slopes, D::Minus1)?.to_dtype(hidden.dtype())?;
        let (gradient, _) = head.train_backward(hidden, None, &by_logits, None, None, true)?;
        let by_head = self.head_learns.then(|| head.weight_gradient(hidden, &by_logits)).transpose()?;
        Ok(Outcome { logprobs, entropies, loss_sum, gradient, by_head })
    }

    /// Σ weight · loss, and the derivative of each position's share by its log-probability, scaled.
    fn losses(&self, logprobs: &[f32]) -> (f64, Vec<f32>) {
        let scale = self.gradient_scale.unwrap_or(0.0) as f32;
        let mut sum = 0f64;
        let slopes = logprobs
            .iter()
            .zip(&self.weights)
            .enumerate()
            .map(|(at, (&logprob, &weight))| {
                let token = self.policy.get(at).copied().unwrap_or_default();
                let (loss, slope) = self.loss.at(logprob, token);
                sum += weight as f64 * loss as f64;
                weight * slope * scale
            })
            .collect();
        (sum, slopes)
    }
}

multiversion! {
    /// Multiplies a row of logits; gives the largest of them and `most`.
    fn largest(row: &mut [f32], inverse: f32, most: f32) -> f32 {
        let mut lanes = [most; 16];
        for part in row.chunks_mut(16) {
            for (m, x) in lanes.iter_mut().zip(part) {
                *x *= inverse;
                // A logit that is not a number must not be passed over.
                *m = if *x <= *m { *m } else { *x };
            }
        }
        lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b <= a { a } else { b })
    }
}

multiversion! {
    /// Turns a row of logits into exponentials; gives their sum.
    fn exponentials(row: &mut [f32], most: f32) -> f32 {
        for x in row.iter_mut() {
            *x = exp(*x - most);
        }
        lane_sum(row.len(), |j, acc| acc + row[j])
    }
}

multiversion! {
    /// Σ e·ln e over a row's exponentials e, from its logits.
    fn moment_of(row: &[f32], most: f32) -> f32 {
        lane_sum(row.len(), |j, acc| {
            let centred = row[j] - most;
            acc + exp(centred) * centred
        })
    }
}

multiversion! {
    fn scale(row: &mut [f32], by: f32) {
        for x in row.iter_mut() {
            *x *= by;
        }
    }
}

multiversion! {
    fn add(sum: &mut [f32], part: &[f32]) {
        for (s, &p) in sum.iter_mut().zip(part) {
            *s += p;
        }
    }
}

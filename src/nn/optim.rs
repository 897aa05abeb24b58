//! AdamW (Loshchilov and Hutter 2019) over one tensor at a time, in f32, with torch's order of operations.

use candle_core::{Result, Tensor};

use super::ops::math::lane_sum;
use super::ops::{f32_view, has_kernels, multiversion};

/// One tensor with its moments; all have its shape.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    pub(crate) value: Tensor,
    pub(crate) first: Tensor,
    pub(crate) second: Tensor,
}

/// What one step does to every tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWStep {
    pub(crate) learning_rate: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
    /// 1 for the first step.
    pub(crate) step: u64,
    /// What gradients are multiplied with first: normalisation, loss scale and clipping in one.
    pub(crate) gradient_factor: f64,
}

/// The factors of one step, as the kernel wants them.
#[derive(Clone, Copy)]
struct Factors {
    gradient: f32,
    beta1: f32,
    beta2: f32,
    keep: f32,
    rate: f32,
    root: f32,
    eps: f32,
}

impl Parameter {
    /// A tensor that begins with moments of 0.
    pub(crate) fn new(value: Tensor) -> Result<Self> {
        Ok(Self { first: value.zeros_like()?, second: value.zeros_like()?, value })
    }

    /// Takes one step.
    pub(crate) fn step(&mut self, gradient: &Tensor, by: &AdamWStep) -> Result<()> {
        let steps = by.step as i32;
        let rate = by.learning_rate / (1.0 - by.beta1.powi(steps));
        let root = (1.0 - by.beta2.powi(steps)).sqrt();
        let keep = 1.0 - by.learning_rate * by.weight_decay;
        if has_kernels(self.value.device()) {
            let factors = Factors {
                gradient: by.gradient_factor as f32,
                beta1: by.beta1 as f32,
                beta2: by.beta2 as f32,
                keep: keep as f32,
                rate: rate as f32,
                root: root as f32,
                eps: by.eps as f32,
            };
            let shape = self.value.shape().clone();
            let mut value = f32_view(&self.value)?.to_vec();
            let mut first = f32_view(&self.first)?.to_vec();
            let mut second = f32_view(&self.second)?.to_vec();
            adamw(&mut value, &mut first, &mut second, &f32_view(gradient)?, factors);
            let device = self.value.device().clone();
            self.value = Tensor::from_vec(value, &shape, &device)?;
            self.first = Tensor::from_vec(first, &shape, &device)?;
            self.second = Tensor::from_vec(second, &shape, &device)?;
            return Ok(());
        }
        let gradient = (gradient * by.gradient_factor)?;
        self.first = ((&self.first * by.beta1)? + (&gradient * (1.0 - by.beta1))?)?;
        self.second = ((&self.second * by.beta2)? + (gradient.sqr()? * (1.0 - by.beta2))?)?;
        let divisor = ((self.second.sqrt()? / root)? + by.eps)?;
        self.value = ((&self.value * keep)? - ((&self.first / divisor)? * rate)?)?;
        Ok(())
    }
}

/// The square of the L2 norm of all tensors together.
pub(crate) fn squared_norm<'t>(tensors: impl Iterator<Item = &'t Tensor>) -> Result<f64> {
    let mut sum = 0f64;
    let mut elsewhere = Vec::new();
    for tensor in tensors {
        if has_kernels(tensor.device()) {
            sum += squares(&f32_view(tensor)?) as f64;
        } else {
            elsewhere.push(tensor.sqr()?.sum_all()?);
        }
    }
    if !elsewhere.is_empty() {
        sum += Tensor::stack(&elsewhere, 0)?.to_vec1::<f32>()?.iter().map(|&s| s as f64).sum::<f64>();
    }
    Ok(sum)
}

multiversion! {
    fn squares(x: &[f32]) -> f32 {
        lane_sum(x.len(), |i, acc| x[i].mul_add(x[i], acc))
    }
}

multiversion! {
    fn adamw(value: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], by: Factors) {
        let all = value.iter_mut().zip(first.iter_mut()).zip(second.iter_mut()).zip(gradient);
        for (((value, first), second), &gradient) in all {
            let g = gradient * by.gradient;
            *first = by.beta1 * *first + (1.0 - by.beta1) * g;
            *second = by.beta2 * *second + (1.0 - by.beta2) * g * g;
            let divisor = second.sqrt() / by.root + by.eps;
            *value = by.keep * *value - by.rate * (*first / divisor);
        }
    }
}

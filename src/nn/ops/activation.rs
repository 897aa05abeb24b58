//! Activations of the feed-forward part, alone and gated, and the scaled residual sum.

use candle_core::{Result, Tensor};

use super::math::{exp, gelu_tanh, silu};
use super::{Shared, f32_view, has_kernels, multiversion, parallel};

/// sqrt(2 / pi).
const C: f64 = 0.797_884_560_802_865_4;

/// Activation functions of the supported families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// GELU by its tanh form.
    GeluTanh,
}

impl Activation {
    /// f(x), elementwise.
    pub(crate) fn apply(self, x: &Tensor) -> Result<Tensor> {
        if has_kernels(x.device()) {
            return elementwise(x, x, |x, _, y| self.fill(x, y));
        }
        match self {
            Self::Silu => x.silu(),
            Self::GeluTanh => x.gelu(),
        }
    }

    /// f(gate) * up, elementwise (Shazeer 2020).
    pub(crate) fn gated(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if has_kernels(gate.device()) {
            return elementwise(gate, up, |gate, up, y| {
                self.fill(gate, y);
                multiply(y, up);
            });
        }
        self.apply(gate)? * up
    }

    /// Gradient by x of [`Activation::apply`].
    pub(crate) fn backward(self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        if has_kernels(x.device()) {
            return elementwise(x, gradient, |x, gradient, y| {
                self.fill_derivative(x, y);
                multiply(y, gradient);
            });
        }
        self.composed_derivative(x)? * gradient
    }

    /// Gradients by gate and up of [`Activation::gated`].
    pub(crate) fn gated_backward(
        self,
        gate: &Tensor,
        up: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let d_up = self.gated(gate, gradient)?;
        if has_kernels(gate.device()) {
            let d_gate = elementwise(gate, up, |gate, up, y| {
                self.fill_derivative(gate, y);
                multiply(y, up);
            })?;
            return Ok((elementwise(&d_gate, gradient, product)?, d_up));
        }
        Ok(((self.composed_derivative(gate)? * (up * gradient)?)?, d_up))
    }

    fn composed_derivative(self, x: &Tensor) -> Result<Tensor> {
        match self {
            // s (1 + x (1 - s)) with the logistic function s of x.
            Self::Silu => {
                let s = candle_nn::ops::sigmoid(x)?;
                &s * ((x * (1.0 - &s)?)? + 1.0)?
            }
            // x s with the logistic function s of 2u, u = c (x + 0.044715 x³).
            Self::GeluTanh => {
                let square = x.sqr()?;
                let u = ((x * ((&square * 0.044_715)? + 1.0)?)? * C)?;
                let s = candle_nn::ops::sigmoid(&(u * 2.0)?)?;
                let slope = ((square * (3.0 * 0.044_715 * 2.0 * C))? + 2.0 * C)?;
                &s * ((x * (1.0 - &s)?)? * slope)?.affine(1.0, 1.0)?
            }
        }
    }

    fn fill_derivative(self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Silu => fill_silu_derivative(x, y),
            Self::GeluTanh => fill_gelu_derivative(x, y),
        }
    }

    fn fill(self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Silu => fill_silu(x, y),
            Self::GeluTanh => fill_gelu(x, y),
        }
    }
}

/// x + scale * update: the residual connection.
pub(crate) fn add_scaled(x: &Tensor, update: &Tensor, scale: f64) -> Result<Tensor> {
    if has_kernels(x.device()) {
        return elementwise(x, update, |x, update, y| sum(x, update, scale as f32, y));
    }
    if scale == 1.0 { x + update } else { x + (update * scale)? }
}

#[expect(unsafe_code, reason = "threads write disjoint parts")]
fn elementwise(a: &Tensor, b: &Tensor, f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) -> Result<Tensor> {
    const PART: usize = 1024;
    let views = (f32_view(a)?, f32_view(b)?);
    let (left, right) = (&*views.0, &*views.1);
    if left.len() != right.len() {
        candle_core::bail!("elementwise operands of {} and {} elements", left.len(), right.len());
    }
    let mut y = vec![0f32; left.len()];
    let out = Shared::new(&mut y);
    parallel(left.len().div_ceil(PART), left.len(), |parts| {
        let range = parts.start * PART..(parts.end * PART).min(left.len());
        // SAFETY: each thread has its own parts.
        f(&left[range.clone()], &right[range.clone()], unsafe { out.part(range) });
    });
    Tensor::from_vec(y, a.shape(), a.device())
}

multiversion! {
    fn fill_silu(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = silu(x);
        }
    }
}

multiversion! {
    fn fill_gelu(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = gelu_tanh(x);
        }
    }
}

multiversion! {
    fn fill_silu_derivative(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            let s = 1.0 / (1.0 + exp(-x));
            *y = s * x.mul_add(1.0 - s, 1.0);
        }
    }
}

multiversion! {
    fn fill_gelu_derivative(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            let square = x * x;
            let u = C as f32 * x * square.mul_add(0.044_715, 1.0);
            let s = 1.0 / (1.0 + exp(-2.0 * u));
            let slope = C as f32 * square.mul_add(6.0 * 0.044_715, 2.0);
            *y = s * (x * slope).mul_add(1.0 - s, 1.0);
        }
    }
}

multiversion! {
    fn product(a: &[f32], b: &[f32], y: &mut [f32]) {
        for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
            *y = a * b;
        }
    }
}

multiversion! {
    /// y *= by, elementwise.
    pub(super) fn multiply(y: &mut [f32], by: &[f32]) {
        for (y, &b) in y.iter_mut().zip(by) {
            *y *= b;
        }
    }
}

multiversion! {
    fn sum(x: &[f32], update: &[f32], scale: f32, y: &mut [f32]) {
        for ((y, &x), &u) in y.iter_mut().zip(x).zip(update) {
            *y = u.mul_add(scale, x);
        }
    }
}

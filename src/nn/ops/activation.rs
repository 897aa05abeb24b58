//! Activations of the feed-forward part, alone and gated, and the scaled residual sum.

use std::mem::MaybeUninit;

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
            return elementwise([x], |[x], [y]| match self {
                Self::Silu => fill_silu(x, y),
                Self::GeluTanh => fill_gelu(x, y),
            })
            .map(|[y]| y);
        }
        match self {
            Self::Silu => x.silu(),
            Self::GeluTanh => x.gelu(),
        }
    }

    /// f(gate) * up, elementwise (Shazeer 2020).
    pub(crate) fn gated(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if has_kernels(gate.device()) {
            return elementwise([gate, up], |[gate, up], [y]| match self {
                Self::Silu => gated_silu(gate, up, y),
                Self::GeluTanh => gated_gelu(gate, up, y),
            })
            .map(|[y]| y);
        }
        self.apply(gate)? * up
    }

    /// Gradient by x of [`Activation::apply`].
    pub(crate) fn backward(self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        if has_kernels(x.device()) {
            return elementwise([x, gradient], |[x, gradient], [y]| match self {
                Self::Silu => silu_backward(x, gradient, y),
                Self::GeluTanh => gelu_backward(x, gradient, y),
            })
            .map(|[y]| y);
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
        if has_kernels(gate.device()) {
            let kernel = match self {
                Self::Silu => gated_silu_backward,
                Self::GeluTanh => gated_gelu_backward,
            };
            let both = elementwise([gate, up, gradient], |[gate, up, gradient], [by_gate, by_up]| {
                kernel(gate, up, gradient, by_gate, by_up);
            })?;
            return Ok(both.into());
        }
        let d_up = self.gated(gate, gradient)?;
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
}

/// x + scale * update: the residual connection.
pub(crate) fn add_scaled(x: &Tensor, update: &Tensor, scale: f64) -> Result<Tensor> {
    if has_kernels(x.device()) {
        return elementwise([x, update], |[x, update], [y]| sum(x, update, scale as f32, y)).map(|[y]| y);
    }
    if scale == 1.0 { x + update } else { x + (update * scale)? }
}

/// Results of an elementwise operation of `IN` operands of one shape. `f` writes every element of the parts that
/// it is given.
#[expect(unsafe_code, reason = "threads write disjoint parts, once each")]
fn elementwise<const IN: usize, const OUT: usize>(
    operands: [&Tensor; IN],
    f: impl Fn([&[f32]; IN], [&mut [MaybeUninit<f32>]; OUT]) + Sync,
) -> Result<[Tensor; OUT]> {
    const PART: usize = 1024;
    let (shape, device) = (operands[0].shape(), operands[0].device());
    let elements = shape.elem_count();
    let mut views = Vec::with_capacity(IN);
    for operand in operands {
        if operand.elem_count() != elements {
            candle_core::bail!("elementwise operands of {elements} and {} elements", operand.elem_count());
        }
        views.push(f32_view(operand)?);
    }
    let mut results: [Vec<f32>; OUT] = std::array::from_fn(|_| Vec::with_capacity(elements));
    let out = results.each_mut().map(|y| Shared::new(&mut y.spare_capacity_mut()[..elements]));
    parallel(elements.div_ceil(PART), elements, |parts| {
        let range = parts.start * PART..(parts.end * PART).min(elements);
        // SAFETY: each thread has its own parts.
        let parts = out.each_ref().map(|y| unsafe { y.part(range.clone()) });
        f(std::array::from_fn(|i| &views[i][range.clone()]), parts);
    });
    let mut tensors = Vec::with_capacity(OUT);
    for mut y in results {
        // SAFETY: every part is written by now.
        unsafe { y.set_len(elements) };
        tensors.push(Tensor::from_vec(y, shape, device)?);
    }
    tensors.try_into().map_err(|_| candle_core::Error::Msg("as many results as vectors".into()))
}

/// d silu(x) / dx, from x and its logistic function.
#[inline(always)]
fn silu_slope(x: f32, s: f32) -> f32 {
    s * x.mul_add(1.0 - s, 1.0)
}

/// gelu(x) / x, the logistic function of 2u with u = c (x + 0.044715 x³), and d gelu(x) / dx.
#[inline(always)]
fn gelu_slope(x: f32) -> (f32, f32) {
    let square = x * x;
    let u = C as f32 * x * square.mul_add(0.044_715, 1.0);
    let s = logistic(2.0 * u);
    let slope = C as f32 * square.mul_add(6.0 * 0.044_715, 2.0);
    (s, s * (x * slope).mul_add(1.0 - s, 1.0))
}

#[inline(always)]
fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Kernels that write each element once: y = an expression of the operands' elements.
macro_rules! kernels {
    ($(fn $name:ident($($operand:ident),*) = $value:expr;)*) => {$(
        multiversion! {
            fn $name($($operand: &[f32]),*, y: &mut [MaybeUninit<f32>]) {
                for (i, y) in y.iter_mut().enumerate() {
                    $(let $operand = $operand[i];)*
                    y.write($value);
                }
            }
        }
    )*};
}

kernels! {
    fn fill_silu(x) = silu(x);
    fn fill_gelu(x) = gelu_tanh(x);
    fn gated_silu(gate, up) = silu(gate) * up;
    fn gated_gelu(gate, up) = gelu_tanh(gate) * up;
    fn silu_backward(x, gradient) = silu_slope(x, logistic(x)) * gradient;
    fn gelu_backward(x, gradient) = gelu_slope(x).1 * gradient;
}

/// Kernels of the way back through a gated activation: f and f' at the gate, from one exponential.
macro_rules! gated_backward_kernels {
    ($(fn $name:ident($gate:ident) = $values:expr;)*) => {$(
        multiversion! {
            fn $name(
                gate: &[f32],
                up: &[f32],
                gradient: &[f32],
                by_gate: &mut [MaybeUninit<f32>],
                by_up: &mut [MaybeUninit<f32>],
            ) {
                for (i, (by_gate, by_up)) in by_gate.iter_mut().zip(by_up).enumerate() {
                    let ($gate, up, gradient) = (gate[i], up[i], gradient[i]);
                    let (value, slope) = $values;
                    by_gate.write(slope * up * gradient);
                    by_up.write(value * gradient);
                }
            }
        }
    )*};
}

gated_backward_kernels! {
    fn gated_silu_backward(g) = { let s = logistic(g); (g * s, silu_slope(g, s)) };
    fn gated_gelu_backward(g) = { let (s, slope) = gelu_slope(g); (g * s, slope) };
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
    fn sum(x: &[f32], update: &[f32], scale: f32, y: &mut [MaybeUninit<f32>]) {
        for ((y, &x), &u) in y.iter_mut().zip(x).zip(update) {
            y.write(u.mul_add(scale, x));
        }
    }
}

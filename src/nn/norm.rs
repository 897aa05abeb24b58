//! Normalisation layers with their weights.

use candle_core::{Result, Tensor};

use super::ops;

/// A normalisation over the last dimension; weights are f32 on the model's device.
pub enum Norm {
    /// RMSNorm.
    Rms {
        /// `[d]`; where a family multiplies with 1 + w, the 1 is added when it is loaded.
        weight: Tensor,
        /// Added to the mean square.
        eps: f64,
    },
    /// LayerNorm.
    Layer {
        /// `[d]`.
        weight: Tensor,
        /// `[d]`.
        bias: Tensor,
        /// Added to the variance.
        eps: f64,
    },
}

impl Norm {
    /// Same shape as `x`, whose element count is a multiple of the weight's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms { weight, eps } => ops::norm::rms_norm(x, weight, *eps),
            Self::Layer { weight, bias, eps } => ops::norm::layer_norm(x, weight, bias, *eps),
        }
    }

    /// Gradient by x, from the gradient by what [`Norm::forward`] gave for it.
    pub(crate) fn backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms { weight, eps } => ops::norm::rms_norm_backward(x, weight, *eps, gradient),
            Self::Layer { weight, eps, .. } => ops::norm::layer_norm_backward(x, weight, *eps, gradient),
        }
    }

    /// Gradient by the weight of an RMSNorm, `[d]` in f32: for training a whole model.
    ///
    /// # Errors
    /// A LayerNorm, which no model that is trained whole here has.
    pub(crate) fn weight_gradient(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms { weight, eps } => ops::norm::rms_norm_weight_gradient(x, weight, *eps, gradient),
            Self::Layer { .. } => candle_core::bail!("a LayerNorm's own weights are not trained"),
        }
    }
}

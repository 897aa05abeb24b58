//! Rotary position embedding: the table of angles and its scalings.

use candle_core::{Device, Result, Tensor};

use super::ops;

/// How the frequencies of a checkpoint were stretched beyond its first training length.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    None,
    /// Every frequency divided by the factor (Chen et al. 2023).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Context length before stretching.
        original_max_position_embeddings: f64,
    },
}

/// cos and sin of every position and frequency.
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// The table for `positions` positions of heads with `head_dim` elements.
    pub fn new(
        theta: f64,
        head_dim: usize,
        positions: usize,
        scaling: &RopeScaling,
        device: &Device,
    ) -> Result<Self> {
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| scaled(theta.powf(-2.0 * i as f64 / head_dim as f64), scaling) as f32)
            .collect();
        // Angles in f32, as transformers computes them: at position 100,000 the rounding of the product shows.
        let angle = |at: usize| (at / half) as f32 * frequencies[at % half];
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = (0..positions * half).map(|at| f(angle(at))).collect();
            Tensor::from_vec(values, (positions, half), device)
        };
        Ok(Self { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }

    /// Turns `x` `[rows, heads, head_dim]` by the rows' positions.
    pub fn apply(&self, x: &Tensor, positions: &[u32]) -> Result<Tensor> {
        ops::rotary::rotate(x, &self.cos, &self.sin, positions, 1.0)
    }

    /// Turns back: the gradient by `x`, from the gradient by what [`Rope::apply`] gave.
    pub(crate) fn backward(&self, gradient: &Tensor, positions: &[u32]) -> Result<Tensor> {
        ops::rotary::rotate(gradient, &self.cos, &self.sin, positions, -1.0)
    }
}

fn scaled(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            let turns = original_max_position_embeddings / wavelength;
            let share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            share * frequency + (1.0 - share) * frequency / factor
        }
    }
}

//! Low-rank adapters as tensors (Hu et al. 2021, LoRA; Kalajdzievski 2023, rsLoRA; Liu et al. 2024, DoRA): what
//! one linear layer adds for the rows of a batch that name an adapter. Names and files are not known here.

use candle_core::Tensor;

/// A linear layer that an adapter can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Full name in the checkpoint, without `.weight`: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
}

/// One site's weights on the host, f32.
#[derive(Debug, Clone)]
pub struct SiteWeights {
    /// Index into the model's sites.
    pub site: usize,
    /// `[rank, in_features]`.
    pub a: Tensor,
    /// `[out_features, rank]`.
    pub b: Tensor,
    /// What B·A is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA.
    pub scale: f64,
    /// DoRA's magnitude, `[out_features]`.
    pub magnitude: Option<Tensor>,
}

/// A whole adapter on the host.
#[derive(Debug, Clone)]
pub struct LoraWeights {
    /// At most one entry a site.
    pub sites: Vec<SiteWeights>,
}

impl LoraWeights {
    /// Bytes of the f32 tensors.
    pub fn bytes(&self) -> u64 {
        let of = |t: &Tensor| 4 * t.elem_count() as u64;
        self.sites.iter().map(|s| of(&s.a) + of(&s.b) + s.magnitude.as_ref().map_or(0, of)).sum()
    }
}

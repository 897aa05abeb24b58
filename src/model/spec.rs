//! What a family says about itself: the parts that the shared decoder uses, and the names of its tensors. Holds
//! no machinery.

use candle_core::DType;

use crate::model::config::RopeSpec;
use crate::nn::Activation;
use crate::nn::lora::Site;
use crate::nn::quant::{Quantization, Role};

/// A model of the shared decoder.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Family, as `model_type` names it.
    pub family: &'static str,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Layers.
    pub layers: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// What scores are multiplied with.
    pub attention_scale: f64,
    /// Positions as a bias on scores.
    pub alibi: bool,
    /// Window of each layer.
    pub windows: Vec<Option<usize>>,
    /// Rotary tables; empty where positions enter otherwise.
    pub ropes: Vec<RopeSpec>,
    /// The table of each layer, `None` for a layer without rotary embedding.
    pub rope_of_layer: Vec<Option<usize>>,
    /// Kind of every normalisation.
    pub norm: NormKind,
    /// Added under the root.
    pub norm_eps: f64,
    /// What token embeddings are multiplied with.
    pub embedding_scale: f64,
    /// What each branch is multiplied with before it joins the residual stream.
    pub residual_scale: f64,
    /// What logits are divided by.
    pub logits_divisor: f64,
    /// Linear weights lie as `[in, out]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// Names outside the layers.
    pub names: Names,
    /// Names inside a layer.
    pub layer: LayerNames,
}

impl Spec {
    /// The linear layers that adapters can change, in the order of [`super::decoder::Decoder::sites`], with the shapes
    /// that the checkpoint must have.
    pub fn sites(&self) -> Vec<Site> {
        let (layer, hidden) = (&self.layer, self.hidden_size);
        let (q_out, kv_out) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        // Name, inputs, outputs.
        let mut parts = match layer.qkv {
            Qkv::Separate(q, k, v) => vec![(q, hidden, q_out), (k, hidden, kv_out), (v, hidden, kv_out)],
            Qkv::Fused(name) => vec![(name, hidden, q_out + 2 * kv_out)],
            Qkv::InterleavedByHead(name) => vec![(name, hidden, 3 * q_out)],
        };
        parts.push((layer.attention_out, q_out, hidden));
        match layer.mlp {
            Mlp::Gated { gate, up, down, width } => {
                parts.extend([(gate, hidden, width), (up, hidden, width), (down, width, hidden)]);
            }
            Mlp::FusedGated { gate_up, down, width } => {
                parts.extend([(gate_up, hidden, 2 * width), (down, width, hidden)]);
            }
            Mlp::Plain { up, down, width } => parts.extend([(up, hidden, width), (down, width, hidden)]),
        }
        let prefix = self.names.layers;
        let site = |number: usize, &(part, in_features, out_features): &(&str, usize, usize)| Site {
            name: format!("{prefix}.{number}.{part}"),
            in_features,
            out_features,
        };
        (0..self.layers).flat_map(|number| parts.iter().map(move |part| site(number, part))).collect()
    }

    /// Names of the linear layers that adapters can change.
    pub fn site_names(&self) -> Vec<String> {
        self.sites().into_iter().map(|site| site.name).collect()
    }

    /// Bytes that embeddings and linear layers take when they are held like this, as
    /// [`super::decoder::Decoder::weight_bytes`] tells once they are loaded, but for biases: which layers have one is
    /// known to the checkpoint alone. They are less than a thousandth.
    pub fn weight_bytes(&self, dense: DType, quantize: Quantization) -> u64 {
        let bytes = |rows: usize, columns: usize, role: Option<Role>| {
            let elements = (rows * columns) as u64;
            match role.and_then(|role| quantize.format(role, columns)) {
                Some(format) => elements * format.type_size() as u64 / format.block_size() as u64,
                None => elements * dense.size_in_bytes() as u64,
            }
        };
        let vocabulary = bytes(self.vocab_size, self.hidden_size, Some(Role::Vocabulary));
        let tables = 1 + u64::from(self.names.head.is_some());
        let positions = self.names.positions.map_or(0, |_| bytes(self.max_positions, self.hidden_size, None));
        let layers =
            self.sites().into_iter().map(|s| bytes(s.out_features, s.in_features, Some(Role::Layer)));
        tables * vocabulary + positions + layers.sum::<u64>()
    }
}

/// Kinds of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm.
    Rms,
    /// RMSNorm that multiplies with 1 + weight.
    RmsPlusOne,
    /// LayerNorm with bias.
    Layer,
}

/// Tensor names outside the layers, as transformers names the modules (a checkpoint may leave out the first
/// part).
#[derive(Debug, Clone)]
pub struct Names {
    /// Token embedding.
    pub embedding: &'static str,
    /// Learned position embedding.
    pub positions: Option<&'static str>,
    /// Normalisation right after the embedding.
    pub embedding_norm: Option<&'static str>,
    /// What stands before a layer's number.
    pub layers: &'static str,
    /// Last normalisation.
    pub final_norm: &'static str,
    /// Output head; `None` where it is the token embedding.
    pub head: Option<&'static str>,
}

/// Tensor names inside a layer.
#[derive(Debug, Clone)]
pub struct LayerNames {
    /// Normalisations, each where the family has it.
    pub norms: LayerNorms,
    /// Projections to queries, keys and values.
    pub qkv: Qkv,
    /// Normalisation of queries and keys: a weight of one head or of the whole projection.
    pub qk_norm: Option<(&'static str, &'static str)>,
    /// Projection back from attention.
    pub attention_out: &'static str,
    /// Feed-forward part.
    pub mlp: Mlp,
    /// Its activation.
    pub activation: Activation,
}

/// Where a layer normalises.
#[derive(Debug, Clone, Default)]
pub struct LayerNorms {
    /// The input of attention.
    pub before_attention: Option<&'static str>,
    /// The output of attention, before it joins the residual stream.
    pub after_attention: Option<&'static str>,
    /// The input of the feed-forward part.
    pub before_mlp: Option<&'static str>,
    /// Its output.
    pub after_mlp: Option<&'static str>,
}

/// How queries, keys and values are projected.
#[derive(Debug, Clone)]
pub enum Qkv {
    /// Three matrices.
    Separate(&'static str, &'static str, &'static str),
    /// One matrix whose output is all queries, then all keys, then all values.
    Fused(&'static str),
    /// One matrix whose output is, for each head, its query, key and value (BLOOM).
    InterleavedByHead(&'static str),
}

/// Feed-forward part.
#[derive(Debug, Clone)]
pub enum Mlp {
    /// down(f(gate(x)) * up(x)).
    Gated {
        /// Gate.
        gate: &'static str,
        /// Up.
        up: &'static str,
        /// Down.
        down: &'static str,
        /// Width.
        width: usize,
    },
    /// The same with gate and up in one matrix, gate first.
    FusedGated {
        /// Gate and up.
        gate_up: &'static str,
        /// Down.
        down: &'static str,
        /// Width of each half.
        width: usize,
    },
    /// down(f(up(x))).
    Plain {
        /// Up.
        up: &'static str,
        /// Down.
        down: &'static str,
        /// Width.
        width: usize,
    },
}

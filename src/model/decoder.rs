//! The decoder: every family's layers in one place, driven by a [`Spec`]. One call takes a ragged batch (some
//! rows a prompt's chunk, some a single new token, each with its own adapter or none) through all layers.

pub(crate) mod base;
pub(crate) mod pass;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use super::checkpoint::Checkpoint;
use super::spec::{LayerNames, Mlp, NormKind, Qkv, Spec};
use crate::nn::attention::{AttentionSpec, alibi_slopes, attend};
use crate::nn::kv_cache::{KvCache, KvShape, SequenceSpan};
use crate::nn::linear::Linear;
use crate::nn::lora::{LoraBatch, Site};
use crate::nn::norm::Norm;
use crate::nn::quant::{Quantization, Role, Weight};
use crate::nn::rope::Rope;
use crate::nn::{Activation, add_scaled};

/// How weights are held.
#[derive(Debug, Clone, Copy)]
pub struct Holding {
    /// Dense matrices.
    pub weights: DType,
    /// Activations and cache: f32 on the CPU, as the weights elsewhere.
    pub activations: DType,
    /// Blocks, where wanted.
    pub quantize: Quantization,
}

/// One step's work.
pub struct Batch {
    /// Token of every row.
    pub tokens: Vec<u32>,
    /// The rows of each sequence; together they cover all rows in order.
    pub spans: Vec<SequenceSpan>,
    /// The adapter of each row.
    pub lora: LoraBatch,
    /// Rows whose logits are wanted.
    pub outputs: Vec<u32>,
}

/// A loaded model.
pub struct Decoder {
    spec: Spec,
    device: Device,
    holding: Holding,
    embedding: Weight,
    positions: Option<Weight>,
    embedding_norm: Option<Norm>,
    layers: Vec<Layer>,
    final_norm: Norm,
    head: Linear,
    ropes: Vec<Rope>,
    attention: AttentionSpec,
    sites: Vec<Site>,
    parameters: u64,
}

struct Layer {
    before_attention: Option<Norm>,
    after_attention: Option<Norm>,
    before_mlp: Option<Norm>,
    after_mlp: Option<Norm>,
    qkv: Projections,
    qk_norm: Option<(Norm, Norm)>,
    attention_out: Linear,
    mlp: FeedForward,
}

enum Projections {
    Separate([Linear; 3]),
    Fused(Linear),
    InterleavedByHead(Linear),
}

enum FeedForward {
    Gated { gate: Linear, up: Linear, down: Linear },
    FusedGated { gate_up: Linear, down: Linear },
    Plain { up: Linear, down: Linear },
}

impl Decoder {
    /// Reads the weights, one tensor at a time. `positions` bounds the rotary tables.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape than the configuration asks for, or is not finite.
    pub fn load(
        spec: Spec,
        checkpoint: &Checkpoint,
        holding: Holding,
        positions: usize,
        device: &Device,
    ) -> Result<Self> {
        let mut reader =
            Reader { spec: &spec, checkpoint, holding, device, sites: Vec::new(), parameters: 0 };
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let embedding = reader.matrix(spec.names.embedding, [vocab, hidden], Role::Vocabulary)?;
        let learned = |name| {
            let table = reader.vector(&format!("{name}.weight"), &[spec.max_positions, hidden])?;
            anyhow::Ok(Weight::dense(table)?)
        };
        let learned_positions = spec.names.positions.map(learned).transpose()?;
        let embedding_norm = spec.names.embedding_norm.map(|name| reader.norm(name, hidden)).transpose()?;
        let layers = (0..spec.layers)
            .map(|number| reader.layer(number).with_context(|| format!("layer {number}")))
            .collect::<Result<Vec<_>>>()?;
        let final_norm = reader.norm(spec.names.final_norm, hidden)?;
        let head = match spec.names.head {
            None => Linear::new(embedding.clone(), None, None),
            Some(name) => {
                let weight = reader.matrix(name, [vocab, hidden], Role::Vocabulary)?;
                Linear::new(weight, reader.bias(name, vocab)?, None)
            }
        };
        let ropes = spec
            .ropes
            .iter()
            .map(|rope| Rope::new(rope.theta, spec.head_dim, positions, &rope.scaling, device))
            .collect::<candle_core::Result<_>>()?;
        let attention = AttentionSpec {
            heads: spec.heads,
            scale: spec.attention_scale,
            alibi_slopes: spec.alibi.then(|| alibi_slopes(spec.heads)),
        };
        let Reader { sites, parameters, .. } = reader;
        Ok(Self {
            spec,
            device: device.clone(),
            holding,
            embedding,
            positions: learned_positions,
            embedding_norm,
            layers,
            final_norm,
            head,
            ropes,
            attention,
            sites,
            parameters,
        })
    }

    /// What the family said.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Linear layers that adapters can change, numbered.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Parameters read from the checkpoint.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// The device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of activations and cache.
    pub fn activations(&self) -> DType {
        self.holding.activations
    }

    /// Type of dense weights.
    pub fn weights_dtype(&self) -> DType {
        self.holding.weights
    }

    /// Shape of the cache that [`Decoder::forward`] writes to.
    pub fn kv_shape(&self) -> KvShape {
        KvShape { layers: self.spec.layers, kv_heads: self.spec.kv_heads, head_dim: self.spec.head_dim }
    }

    /// Bytes of embeddings and linear layers as they are held; norms are a rounding error beside them.
    pub fn weight_bytes(&self) -> u64 {
        let head = if self.spec.names.head.is_some() { self.head.bytes() } else { 0 };
        let linears: u64 = self.layers.iter().flat_map(Layer::linears).map(Linear::bytes).sum();
        self.embedding.bytes() + self.positions.as_ref().map_or(0, Weight::bytes) + head + linears
    }

    /// The base weight of a site.
    pub fn site_weight(&self, site: usize) -> Option<&Weight> {
        self.layers.iter().flat_map(Layer::linears).find(|l| l.site() == Some(site)).map(Linear::weight)
    }

    /// Runs a batch and gives the logits of `batch.outputs`, `[outputs, vocab]`, f32. Keys and values of all rows
    /// are in the cache afterwards.
    ///
    /// # Errors
    /// What the device reports.
    pub fn forward(&self, batch: &Batch, cache: &mut KvCache) -> candle_core::Result<Tensor> {
        let positions: Vec<u32> = batch
            .spans
            .iter()
            .flat_map(|span| (span.start..span.start + span.rows.len()).map(|p| p as u32))
            .collect();
        let mut x = self.embed(&batch.tokens, &positions)?; // [R, hidden]
        for (number, layer) in self.layers.iter().enumerate() {
            x = self.layer(number, layer, x, batch, &positions, cache)?;
        }
        if batch.outputs.is_empty() {
            return Tensor::zeros((0, self.spec.vocab_size), DType::F32, &self.device);
        }
        let wanted = Tensor::new(batch.outputs.as_slice(), &self.device)?;
        let x = self.final_norm.forward(&x.index_select(&wanted, 0)?)?;
        let logits = self.head.forward(&x, &LoraBatch::default())?.to_dtype(DType::F32)?;
        if self.spec.logits_divisor != 1.0 { logits / self.spec.logits_divisor } else { Ok(logits) }
    }

    /// Token and position embeddings, `[tokens, hidden]`.
    fn embed(&self, tokens: &[u32], positions: &[u32]) -> candle_core::Result<Tensor> {
        let mut x = self.embedding.gather(tokens, self.holding.activations)?;
        if self.spec.embedding_scale != 1.0 {
            x = (x * self.spec.embedding_scale)?;
        }
        if let Some(table) = &self.positions {
            x = add_scaled(&x, &table.gather(positions, self.holding.activations)?, 1.0)?;
        }
        match &self.embedding_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    fn layer(
        &self,
        number: usize,
        layer: &Layer,
        x: Tensor,
        batch: &Batch,
        positions: &[u32],
        cache: &mut KvCache,
    ) -> candle_core::Result<Tensor> {
        let normed = |norm: &Option<Norm>, x: &Tensor| match norm {
            Some(norm) => norm.forward(x),
            None => Ok(x.clone()),
        };
        let (q, k, v) = self.project(layer, &normed(&layer.before_attention, &x)?, &batch.lora)?;
        let (q, k) = match &layer.qk_norm {
            Some((q_norm, k_norm)) => (q_norm.forward(&q)?, k_norm.forward(&k)?),
            None => (q, k),
        };
        let (q, k) = self.turned(number, q, k, positions)?;
        cache.write(number, &k, &v, &batch.spans)?;
        let window = self.spec.windows[number];
        let mixed = attend(&q, cache, number, &batch.spans, &self.attention, window)?; // [R, H * D]
        let update = layer.attention_out.forward(&mixed, &batch.lora)?;
        let x = add_scaled(&x, &normed(&layer.after_attention, &update)?, self.spec.residual_scale)?;

        let update =
            layer.mlp.forward(&normed(&layer.before_mlp, &x)?, self.spec.layer.activation, &batch.lora)?;
        add_scaled(&x, &normed(&layer.after_mlp, &update)?, self.spec.residual_scale)
    }

    /// Queries `[R, H, D]`, keys and values `[R, Hk, D]`, contiguous.
    fn project(
        &self,
        layer: &Layer,
        x: &Tensor,
        lora: &LoraBatch,
    ) -> candle_core::Result<(Tensor, Tensor, Tensor)> {
        let outputs = match &layer.qkv {
            Projections::Separate(three) => {
                three.iter().map(|linear| linear.forward(x, lora)).collect::<candle_core::Result<_>>()?
            }
            Projections::Fused(qkv) | Projections::InterleavedByHead(qkv) => vec![qkv.forward(x, lora)?],
        };
        self.split(layer, outputs)
    }

    /// What the projections gave, as queries, keys and values.
    fn split(&self, layer: &Layer, outputs: Vec<Tensor>) -> candle_core::Result<(Tensor, Tensor, Tensor)> {
        let Spec { heads, kv_heads, head_dim, .. } = self.spec;
        let rows = outputs[0].dim(0)?;
        match &layer.qkv {
            Projections::Separate(_) => Ok((
                outputs[0].reshape((rows, heads, head_dim))?,
                outputs[1].reshape((rows, kv_heads, head_dim))?,
                outputs[2].reshape((rows, kv_heads, head_dim))?,
            )),
            Projections::Fused(_) => {
                let all = outputs[0].reshape((rows, heads + 2 * kv_heads, head_dim))?;
                let part = |from, count| all.narrow(1, from, count)?.contiguous();
                Ok((part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?))
            }
            Projections::InterleavedByHead(_) => {
                let all = outputs[0].reshape((rows, heads, 3, head_dim))?;
                let part = |which| all.narrow(2, which, 1)?.squeeze(2)?.contiguous();
                Ok((part(0)?, part(1)?, part(2)?))
            }
        }
    }

    /// Queries and keys with their positions, where a layer turns them.
    fn turned(
        &self,
        number: usize,
        q: Tensor,
        k: Tensor,
        positions: &[u32],
    ) -> candle_core::Result<(Tensor, Tensor)> {
        match self.spec.rope_of_layer[number] {
            Some(table) => {
                Ok((self.ropes[table].apply(&q, positions)?, self.ropes[table].apply(&k, positions)?))
            }
            None => Ok((q, k)),
        }
    }
}

impl Layer {
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let qkv: Vec<&Linear> = match &self.qkv {
            Projections::Separate(three) => three.iter().collect(),
            Projections::Fused(one) | Projections::InterleavedByHead(one) => vec![one],
        };
        let mlp = match &self.mlp {
            FeedForward::Gated { gate, up, down } => vec![gate, up, down],
            FeedForward::FusedGated { gate_up, down } => vec![gate_up, down],
            FeedForward::Plain { up, down } => vec![up, down],
        };
        qkv.into_iter().chain([&self.attention_out]).chain(mlp)
    }
}

impl FeedForward {
    fn forward(&self, x: &Tensor, activation: Activation, lora: &LoraBatch) -> candle_core::Result<Tensor> {
        match self {
            Self::Gated { gate, up, down } => {
                let inner = activation.gated(&gate.forward(x, lora)?, &up.forward(x, lora)?)?;
                down.forward(&inner, lora)
            }
            Self::FusedGated { gate_up, down } => {
                let both = gate_up.forward(x, lora)?;
                let width = both.dim(1)? / 2;
                let half = |from| both.narrow(1, from, width)?.contiguous();
                down.forward(&activation.gated(&half(0)?, &half(width)?)?, lora)
            }
            Self::Plain { up, down } => down.forward(&activation.apply(&up.forward(x, lora)?)?, lora),
        }
    }
}

/// Reads tensors for a family and counts what it read.
struct Reader<'a> {
    spec: &'a Spec,
    checkpoint: &'a Checkpoint,
    holding: Holding,
    device: &'a Device,
    sites: Vec<Site>,
    parameters: u64,
}

impl Reader<'_> {
    fn layer(&mut self, number: usize) -> Result<Layer> {
        let Spec { hidden_size, heads, kv_heads, head_dim, .. } = *self.spec;
        let names: LayerNames = self.spec.layer.clone();
        let prefix = format!("{}.{number}", self.spec.names.layers);
        let (q_out, kv_out) = (heads * head_dim, kv_heads * head_dim);
        let full = |name: &str| format!("{prefix}.{name}");
        let mut norm = |name: Option<&str>| name.map(|n| self.norm(&full(n), hidden_size)).transpose();
        let before_attention = norm(names.norms.before_attention)?;
        let after_attention = norm(names.norms.after_attention)?;
        let before_mlp = norm(names.norms.before_mlp)?;
        let after_mlp = norm(names.norms.after_mlp)?;
        let qkv = match names.qkv {
            Qkv::Separate(q, k, v) => Projections::Separate([
                self.site(&full(q), q_out, hidden_size)?,
                self.site(&full(k), kv_out, hidden_size)?,
                self.site(&full(v), kv_out, hidden_size)?,
            ]),
            Qkv::Fused(name) => {
                Projections::Fused(self.site(&full(name), q_out + 2 * kv_out, hidden_size)?)
            }
            Qkv::InterleavedByHead(name) => {
                Projections::InterleavedByHead(self.site(&full(name), 3 * q_out, hidden_size)?)
            }
        };
        let qk_norm = match names.qk_norm {
            None => None,
            Some((q, k)) => Some((self.qk_norm(&full(q), q_out)?, self.qk_norm(&full(k), kv_out)?)),
        };
        let attention_out = self.site(&full(names.attention_out), hidden_size, q_out)?;
        let mlp = match names.mlp {
            Mlp::Gated { gate, up, down, width } => FeedForward::Gated {
                gate: self.site(&full(gate), width, hidden_size)?,
                up: self.site(&full(up), width, hidden_size)?,
                down: self.site(&full(down), hidden_size, width)?,
            },
            Mlp::FusedGated { gate_up, down, width } => FeedForward::FusedGated {
                gate_up: self.site(&full(gate_up), 2 * width, hidden_size)?,
                down: self.site(&full(down), hidden_size, width)?,
            },
            Mlp::Plain { up, down, width } => FeedForward::Plain {
                up: self.site(&full(up), width, hidden_size)?,
                down: self.site(&full(down), hidden_size, width)?,
            },
        };
        Ok(Layer {
            before_attention,
            after_attention,
            before_mlp,
            after_mlp,
            qkv,
            qk_norm,
            attention_out,
            mlp,
        })
    }

    /// A linear layer that adapters can change.
    fn site(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Linear> {
        let weight = self.matrix(name, [out_features, in_features], Role::Layer)?;
        let bias = self.bias(name, out_features)?;
        self.sites.push(Site { name: name.to_owned(), in_features, out_features });
        Ok(Linear::new(weight, bias, Some(self.sites.len() - 1)))
    }

    fn matrix(&mut self, name: &str, [rows, columns]: [usize; 2], role: Role) -> Result<Weight> {
        let name = format!("{name}.weight");
        let turned = self.spec.transposed && role == Role::Layer;
        let shape = if turned { [columns, rows] } else { [rows, columns] };
        self.parameters += (rows * columns) as u64;
        let format = self.holding.quantize.format(role, columns);
        if let (Some(format), false) = (format, turned) {
            let checkpoint = self.checkpoint;
            return Weight::blocks_by_bands([rows, columns], format, self.device, |band| {
                checkpoint.rows(&name, &shape, band)
            });
        }
        let stored = self.checkpoint.tensor(&name, &shape)?;
        let matrix = if turned { stored.t()?.contiguous()? } else { stored };
        Ok(match format {
            Some(format) => Weight::blocks(&matrix, format, self.device)?,
            None => Weight::dense(matrix.to_dtype(self.holding.weights)?.to_device(self.device)?)?,
        })
    }

    /// A bias where the checkpoint has one.
    fn bias(&mut self, name: &str, size: usize) -> Result<Option<Tensor>> {
        let name = format!("{name}.bias");
        self.checkpoint.find(&name).is_some().then(|| self.vector(&name, &[size])).transpose()
    }

    fn norm(&mut self, name: &str, size: usize) -> Result<Norm> {
        let weight = self.vector(&format!("{name}.weight"), &[size])?;
        let eps = self.spec.norm_eps;
        Ok(match self.spec.norm {
            NormKind::Rms => Norm::Rms { weight, eps },
            NormKind::RmsPlusOne => Norm::Rms { weight: (weight + 1.0)?, eps },
            NormKind::Layer => {
                Norm::Layer { weight, bias: self.vector(&format!("{name}.bias"), &[size])?, eps }
            }
        })
    }

    /// Queries and keys are normalised a head at a time or as a whole; the weight's size tells.
    fn qk_norm(&mut self, name: &str, whole: usize) -> Result<Norm> {
        let stored = self.checkpoint.stored(&format!("{name}.weight"))?;
        let size = if stored.shape == [self.spec.head_dim] { self.spec.head_dim } else { whole };
        self.norm(name, size)
    }

    /// A small tensor in f32, on the device.
    fn vector(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored = self.checkpoint.tensor(name, shape)?;
        self.parameters += stored.elem_count() as u64;
        Ok(stored.to_dtype(DType::F32)?.to_device(self.device)?)
    }
}

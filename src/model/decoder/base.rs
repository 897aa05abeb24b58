//! The base weights of a model as parameters of their own, for training a whole model: their names, their values,
//! their gradients. Llama's shape with tied embeddings, dense in f32, is what is trained so.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Tensor};

use super::{Decoder, FeedForward, Layer, Projections};
use crate::model::spec::{Mlp, Qkv, Spec};
use crate::nn::linear::Linear;
use crate::nn::norm::Norm;
use crate::nn::quant::Weight;

/// One weight of the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BaseParameter {
    /// The token embedding, which is the output head too. `[vocabulary, hidden]`.
    Embedding,
    /// The weight of a linear layer, by its site. `[out, in]`.
    Linear(usize),
    /// The norm before a layer's attention. `[hidden]`.
    BeforeAttention(usize),
    /// The norm before a layer's feed-forward part. `[hidden]`.
    BeforeMlp(usize),
    /// The norm before the head. `[hidden]`.
    FinalNorm,
}

/// Gradients by weight, in f32.
pub(crate) type BaseGradients = BTreeMap<BaseParameter, Tensor>;

/// What a weight is for, as far as its first values go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// An embedding, or a linear layer within a block.
    Matrix,
    /// A linear layer whose result is added to the residual stream.
    IntoResidual,
    /// The weight of a norm.
    Norm,
}

/// Name and shape of every weight of a model that is described alone.
///
/// # Errors
/// Another shape than Llama's with tied embeddings.
pub(crate) fn base_shapes(spec: &Spec) -> Result<Vec<(String, Vec<usize>, Part)>> {
    let (names, norms) = (&spec.names, &spec.layer.norms);
    let parts = match (&spec.layer.qkv, &spec.layer.mlp, norms.before_attention, norms.before_mlp, names.head)
    {
        (Qkv::Separate(q, k, v), Mlp::Gated { gate, up, down, width }, Some(first), Some(second), None) => {
            let hidden = spec.hidden_size;
            let (q_out, kv_out) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
            [
                (first, vec![hidden], Part::Norm),
                (*q, vec![q_out, hidden], Part::Matrix),
                (*k, vec![kv_out, hidden], Part::Matrix),
                (*v, vec![kv_out, hidden], Part::Matrix),
                (spec.layer.attention_out, vec![hidden, q_out], Part::IntoResidual),
                (second, vec![hidden], Part::Norm),
                (*gate, vec![*width, hidden], Part::Matrix),
                (*up, vec![*width, hidden], Part::Matrix),
                (*down, vec![hidden, *width], Part::IntoResidual),
            ]
        }
        _ => bail!("only models of Llama's shape with tied embeddings are trained whole"),
    };
    let mut all =
        vec![(format!("{}.weight", names.embedding), vec![spec.vocab_size, spec.hidden_size], Part::Matrix)];
    for number in 0..spec.layers {
        all.extend(parts.iter().map(|(name, shape, part)| {
            (format!("{}.{number}.{name}.weight", names.layers), shape.clone(), *part)
        }));
    }
    all.push((format!("{}.weight", names.final_norm), vec![spec.hidden_size], Part::Norm));
    Ok(all)
}

impl Decoder {
    /// Every weight with its name in the checkpoint and its value in f32.
    ///
    /// # Errors
    /// A model of another shape than can be trained whole.
    pub(crate) fn base_parameters(&self) -> Result<BTreeMap<BaseParameter, (String, Tensor)>> {
        let names = (&self.spec.names, &self.spec.layer.norms);
        let plain = self.positions.is_none() && self.embedding_norm.is_none() && !self.spec.transposed;
        let scales = [self.spec.embedding_scale, self.spec.residual_scale, self.spec.logits_divisor];
        let tied = names.0.head.is_none() && !self.head.has_bias();
        let dense = self.holding.weights == DType::F32 && self.holding.activations == DType::F32;
        ensure!(
            plain && tied && dense && scales == [1.0; 3] && self.layers.iter().all(Layer::is_plain),
            "only models of Llama's shape with tied embeddings and without biases, in f32, are trained whole"
        );
        let mut all = BTreeMap::new();
        all.insert(
            BaseParameter::Embedding,
            (format!("{}.weight", names.0.embedding), self.embedding.to_f32()?),
        );
        for linear in self.layers.iter().flat_map(Layer::linears) {
            if let Some(site) = linear.site() {
                let name = format!("{}.weight", self.sites[site].name);
                all.insert(BaseParameter::Linear(site), (name, linear.weight().to_f32()?));
            }
        }
        for (number, layer) in self.layers.iter().enumerate() {
            let norms = [
                (BaseParameter::BeforeAttention(number), &layer.before_attention, names.1.before_attention),
                (BaseParameter::BeforeMlp(number), &layer.before_mlp, names.1.before_mlp),
            ];
            for (parameter, norm, name) in norms {
                if let (Some(Norm::Rms { weight, .. }), Some(name)) = (norm, name) {
                    let name = format!("{}.{number}.{name}.weight", names.0.layers);
                    all.insert(parameter, (name, weight.clone()));
                }
            }
        }
        if let Norm::Rms { weight, .. } = &self.final_norm {
            let name = format!("{}.weight", names.0.final_norm);
            all.insert(BaseParameter::FinalNorm, (name, weight.clone()));
        }
        Ok(all)
    }

    /// Puts a value in the place of a weight.
    ///
    /// # Errors
    /// A tensor of another rank.
    pub(crate) fn set_base_parameter(&mut self, parameter: BaseParameter, value: &Tensor) -> Result<()> {
        let norm = match parameter {
            BaseParameter::Embedding => {
                self.embedding = Weight::dense(value.clone())?;
                self.head.set_weight(self.embedding.clone());
                return Ok(());
            }
            BaseParameter::Linear(site) => {
                let mut linears = self.layers.iter_mut().flat_map(Layer::linears_mut);
                if let Some(linear) = linears.find(|linear| linear.site() == Some(site)) {
                    linear.set_weight(Weight::dense(value.clone())?);
                }
                return Ok(());
            }
            BaseParameter::BeforeAttention(number) => self.layers[number].before_attention.as_mut(),
            BaseParameter::BeforeMlp(number) => self.layers[number].before_mlp.as_mut(),
            BaseParameter::FinalNorm => Some(&mut self.final_norm),
        };
        if let Some(Norm::Rms { weight, .. }) = norm {
            *weight = value.clone();
        }
        Ok(())
    }

    /// Gradient by the embedding table of what was looked up in it, `[vocabulary, hidden]`.
    pub(super) fn embedding_gradient(
        &self,
        tokens: &[u32],
        gradient: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let shape = (self.embedding.rows(), self.embedding.columns());
        let tokens = Tensor::new(tokens, gradient.device())?;
        Tensor::zeros(shape, DType::F32, gradient.device())?.index_add(
            &tokens,
            &gradient.to_dtype(DType::F32)?,
            0,
        )
    }
}

impl Layer {
    /// Llama's: two norms, no others, no biases.
    fn is_plain(&self) -> bool {
        let rms = |norm: &Option<Norm>| matches!(norm, Some(Norm::Rms { .. }));
        let norms = rms(&self.before_attention) && rms(&self.before_mlp);
        let no_more = self.after_attention.is_none() && self.after_mlp.is_none() && self.qk_norm.is_none();
        norms && no_more && !self.linears().any(Linear::has_bias)
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let qkv: Vec<&mut Linear> = match &mut self.qkv {
            Projections::Separate(three) => three.iter_mut().collect(),
            Projections::Fused(one) | Projections::InterleavedByHead(one) => vec![one],
        };
        let mlp = match &mut self.mlp {
            FeedForward::Gated { gate, up, down } => vec![gate, up, down],
            FeedForward::FusedGated { gate_up, down } => vec![gate_up, down],
            FeedForward::Plain { up, down } => vec![up, down],
        };
        qkv.into_iter().chain([&mut self.attention_out]).chain(mlp)
    }
}

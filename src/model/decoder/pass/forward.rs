//! The way forth through half a layer, with what the way back needs of it.

use candle_core::{Result, Tensor};

use super::super::{Decoder, FeedForward, Layer, Projections};
use super::{KeptAttention, KeptMlp, Pass, inner, normed};
use crate::nn::add_scaled;
use crate::nn::attention::attend_rows;

impl Pass {
    pub(super) fn attention_forward(
        &self,
        model: &Decoder,
        number: usize,
        x: &Tensor,
    ) -> Result<(KeptAttention, Tensor)> {
        let layer = &model.layers[number];
        let normed_x = normed(&layer.before_attention, x)?;
        let (outputs, low): (Vec<Tensor>, Vec<Option<Tensor>>) = match &layer.qkv {
            Projections::Separate(three) => three
                .iter()
                .map(|linear| self.linear(linear, &normed_x))
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .unzip(),
            Projections::Fused(qkv) | Projections::InterleavedByHead(qkv) => {
                let (y, low) = self.linear(qkv, &normed_x)?;
                (vec![y], vec![low])
            }
        };
        let (q, k, v) = model.split(layer, outputs)?;
        let (raw, q, k) = match &layer.qk_norm {
            Some((q_norm, k_norm)) => {
                let (new_q, new_k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
                (Some((q, k)), new_q, new_k)
            }
            None => (None, q, k),
        };
        let (q, k) = model.turned(number, q, k, &self.positions)?;
        let window = model.spec.windows[number];
        let (mixed, log_sums) = attend_rows((&q, &k, &v), &self.sequences, &model.attention, window)?;
        let (update, low_out) = self.linear(&layer.attention_out, &mixed)?;
        let middle = add_scaled(x, &normed(&layer.after_attention, &update)?, model.spec.residual_scale)?;
        let update = layer.after_attention.is_some().then_some(update);
        Ok((KeptAttention { raw, q, k, v, mixed, log_sums, update, low, low_out }, middle))
    }

    pub(super) fn mlp_forward(
        &self,
        model: &Decoder,
        number: usize,
        middle: &Tensor,
    ) -> Result<(KeptMlp, Tensor)> {
        let layer = &model.layers[number];
        let mut kept = self.mlp_halves(layer, middle)?;
        let (inner, down) = inner(&layer.mlp, model.spec.layer.activation, &kept)?;
        let (update, low_down) = self.linear(down, &inner)?;
        let y = add_scaled(middle, &normed(&layer.after_mlp, &update)?, model.spec.residual_scale)?;
        kept.low_down = low_down;
        kept.update = layer.after_mlp.is_some().then_some(update);
        Ok((kept, y))
    }

    /// What the way back needs of the feed-forward part, without its result where that can be done without.
    pub(super) fn mlp_again(&self, model: &Decoder, number: usize, middle: &Tensor) -> Result<KeptMlp> {
        let layer = &model.layers[number];
        if layer.after_mlp.is_some() {
            return Ok(self.mlp_forward(model, number, middle)?.0);
        }
        let mut kept = self.mlp_halves(layer, middle)?;
        let (inner, down) = inner(&layer.mlp, model.spec.layer.activation, &kept)?;
        kept.low_down = match self.site(down) {
            Some(site) => Some(down.train_low(&inner, site, self.dropout(down))?),
            None => None,
        };
        Ok(kept)
    }

    fn mlp_halves(&self, layer: &Layer, middle: &Tensor) -> Result<KeptMlp> {
        let x = normed(&layer.before_mlp, middle)?;
        let (gate, up, low) = match &layer.mlp {
            FeedForward::Gated { gate, up, .. } => {
                let ((gate, low_gate), (up, low_up)) = (self.linear(gate, &x)?, self.linear(up, &x)?);
                (gate, Some(up), vec![low_gate, low_up])
            }
            FeedForward::FusedGated { gate_up, .. } => {
                let (both, low) = self.linear(gate_up, &x)?;
                let width = both.dim(1)? / 2;
                let half = |from| both.narrow(1, from, width)?.contiguous();
                (half(0)?, Some(half(width)?), vec![low])
            }
            FeedForward::Plain { up, .. } => {
                let (up, low) = self.linear(up, &x)?;
                (up, None, vec![low])
            }
        };
        Ok(KeptMlp { gate, up, update: None, low, low_down: None })
    }
}

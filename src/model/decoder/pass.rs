//! One pass of training through the decoder: forward, loss, backward, a small piece at a time, so that whoever
//! drives it can do other work between two pieces. What it computes does not depend on where it is interrupted.
//!
//! The way back goes through one layer after another with the gradient by its output. Where an adapter is trained
//! the base is frozen and only A and B get gradients; where the base itself learns, its weights get theirs in the
//! same walk. A layer keeps either its input alone, and is computed again on the way back, or all that the way
//! back needs.

mod forward;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Result, Tensor};

use super::base::{BaseGradients, BaseParameter};
use super::{Decoder, FeedForward, Projections};
use crate::nn::add_scaled;
use crate::nn::attention::attend_rows_backward;
use crate::nn::linear::Linear;
use crate::nn::lora::{SiteGradient, TrainSite};
use crate::nn::loss::{LossChunk, Positions, TokenLoss};
use crate::nn::norm::Norm;
use crate::nn::policy::{PolicyFigures, PolicyToken};
use crate::nn::{Dropout, mix64};

/// What is trained, by site.
pub(crate) type TrainSites = Vec<Option<TrainSite>>;

/// Gradients by site; `None` where none came yet.
pub(crate) type Gradients = Vec<Option<SiteGradient>>;

/// How a pass is to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PassSettings {
    /// Forward alone if `None`, else what the gradient is multiplied with.
    pub(crate) gradient_scale: Option<f64>,
    /// Layers, counted from the last, that keep what the way back needs.
    pub(crate) kept_layers: usize,
    /// Positions whose logits are held at once.
    pub(crate) loss_positions: usize,
    /// Share of inputs of A that is left out.
    pub(crate) dropout: f64,
    /// Names the dropout's masks.
    pub(crate) key: u64,
    /// What is minimised.
    pub(crate) loss: TokenLoss,
    /// What logits are divided by, beyond what the model itself divides them by.
    pub(crate) temperature: f64,
    /// Whether the base weights get gradients too.
    pub(crate) base_learns: bool,
}

/// A token to predict.
struct Target {
    /// Row of the hidden state that predicts it.
    row: u32,
    token: u32,
    weight: f32,
    policy: PolicyToken,
}

/// Tokens with the weight of predicting each (`weights[i]` for `tokens[i]`), and what a policy's loss compares each
/// with: as many, or none for other losses.
pub(crate) type Supervised<'s> = (&'s [u32], &'s [f32], &'s [PolicyToken]);

/// What is done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Attention(usize),
    Mlp(usize),
    /// From this target on.
    Loss(usize),
    Recompute(usize),
    MlpBack(usize),
    AttentionBack(usize),
    Done,
}

/// Seconds by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PhaseSeconds {
    pub(crate) forward: f64,
    pub(crate) loss: f64,
    pub(crate) backward: f64,
}

/// What a layer's attention leaves for the way back.
struct KeptAttention {
    /// Before their normalisation, where there is one.
    raw: Option<(Tensor, Tensor)>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixed: Tensor,
    log_sums: Option<Tensor>,
    /// Before its normalisation, where there is one.
    update: Option<Tensor>,
    low: Vec<Option<Tensor>>,
    low_out: Option<Tensor>,
}

/// What a layer's feed-forward part leaves for the way back.
struct KeptMlp {
    gate: Tensor,
    up: Option<Tensor>,
    /// Before its normalisation, where there is one.
    update: Option<Tensor>,
    low: Vec<Option<Tensor>>,
    low_down: Option<Tensor>,
}

/// What there is of a layer between its way forth and its way back.
#[derive(Default)]
struct Memory {
    input: Option<Tensor>,
    attention: Option<KeptAttention>,
    middle: Option<Tensor>,
    mlp: Option<KeptMlp>,
}

/// A pass under way.
pub(crate) struct Pass {
    settings: PassSettings,
    sites: Arc<TrainSites>,
    sequences: Vec<Range<usize>>,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    targets: Vec<Target>,
    stage: Stage,
    /// On the way forth the hidden state, on the way back the gradient by it.
    flow: Option<Tensor>,
    layers: Vec<Memory>,
    /// The positions that are in the loss, and their hidden states before the final normalisation.
    chunk: Option<(Tensor, LossChunk)>,
    head_gradients: Vec<Tensor>,
    gradients: Gradients,
    base_gradients: BaseGradients,
    logprobs: Vec<f32>,
    figures: PolicyFigures,
    loss_sum: f64,
    seconds: PhaseSeconds,
}

impl Pass {
    /// Begins a pass over sequences.
    pub(crate) fn begin<'s>(
        model: &Decoder,
        sites: Arc<TrainSites>,
        sequences: impl IntoIterator<Item = Supervised<'s>>,
        settings: PassSettings,
    ) -> Result<Self> {
        let (mut tokens, mut positions, mut ranges, mut targets) = (vec![], vec![], vec![], vec![]);
        for (sequence, weights, policy) in sequences {
            let start = tokens.len();
            for (i, (&token, &weight)) in sequence.iter().zip(weights).enumerate().skip(1) {
                if weight != 0.0 {
                    let policy = policy.get(i).copied().unwrap_or_default();
                    targets.push(Target { row: (start + i - 1) as u32, token, weight, policy });
                }
            }
            tokens.extend_from_slice(sequence);
            positions.extend(0..sequence.len() as u32);
            ranges.push(start..tokens.len());
        }
        let flow = model.embed(&tokens, &positions)?;
        let layers = model.layers.len();
        Ok(Self {
            gradients: sites.iter().map(|_| None).collect(),
            settings,
            sites,
            sequences: ranges,
            tokens,
            positions,
            targets,
            stage: Stage::Attention(0),
            flow: Some(flow),
            layers: (0..layers).map(|_| Memory::default()).collect(),
            chunk: None,
            head_gradients: Vec::new(),
            base_gradients: BaseGradients::new(),
            logprobs: Vec::new(),
            figures: PolicyFigures::default(),
            loss_sum: 0.0,
            seconds: PhaseSeconds::default(),
        })
    }

    /// Does one piece; false when there is none left.
    pub(crate) fn advance(&mut self, model: &Decoder) -> Result<bool> {
        let (stage, began) = (self.stage, Instant::now());
        self.stage = match stage {
            Stage::Attention(layer) => self.attention(model, layer)?,
            Stage::Mlp(layer) => self.mlp(model, layer)?,
            Stage::Loss(from) => self.loss(model, from)?,
            Stage::Recompute(layer) => self.recompute(model, layer)?,
            Stage::MlpBack(layer) => self.mlp_back(model, layer)?,
            Stage::AttentionBack(layer) => self.attention_back(model, layer)?,
            Stage::Done => return Ok(false),
        };
        let phase = match stage {
            Stage::Attention(_) | Stage::Mlp(_) => &mut self.seconds.forward,
            Stage::Loss(_) => &mut self.seconds.loss,
            _ => &mut self.seconds.backward,
        };
        *phase += began.elapsed().as_secs_f64();
        Ok(self.stage != Stage::Done)
    }

    /// Rows of the pass.
    pub(crate) fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Supervised tokens.
    pub(crate) fn supervised(&self) -> usize {
        self.targets.len()
    }

    /// Seconds so far.
    pub(crate) fn seconds(&self) -> PhaseSeconds {
        self.seconds
    }

    /// Σ weight · loss and Σ weight, once all is done.
    pub(crate) fn sums(&self) -> (f64, f64) {
        (self.loss_sum, self.targets.iter().map(|t| t.weight as f64).sum())
    }

    /// What a policy's loss met; `None` for other losses.
    pub(crate) fn figures(&self) -> Option<PolicyFigures> {
        self.settings.loss.is_policy().then_some(self.figures)
    }

    /// ln p of every token of every sequence; 0 where it is not supervised.
    pub(crate) fn logprobs(&self) -> Vec<Vec<f32>> {
        let mut all: Vec<Vec<f32>> = self.sequences.iter().map(|s| vec![0f32; s.len()]).collect();
        let mut sequence = 0;
        for (target, &logprob) in self.targets.iter().zip(&self.logprobs) {
            let row = target.row as usize;
            while row >= self.sequences[sequence].end {
                sequence += 1;
            }
            all[sequence][row + 1 - self.sequences[sequence].start] = logprob;
        }
        all
    }

    /// What the pass gave, by site.
    pub(crate) fn into_gradients(self) -> Gradients {
        self.gradients
    }

    /// What the pass gave for the base.
    pub(crate) fn into_base_gradients(self) -> BaseGradients {
        self.base_gradients
    }

    fn flow(&mut self) -> Tensor {
        self.flow.take().expect("every stage leaves what the next one takes")
    }

    fn kept(&self, layer: usize) -> bool {
        layer + self.settings.kept_layers >= self.layers.len()
    }

    fn attention(&mut self, model: &Decoder, number: usize) -> Result<Stage> {
        let x = self.flow();
        let (kept, middle) = self.attention_forward(model, number, &x)?;
        if self.settings.gradient_scale.is_some() {
            self.layers[number].input = Some(x);
            if self.kept(number) {
                self.layers[number].attention = Some(kept);
                self.layers[number].middle = Some(middle.clone());
            }
        }
        self.flow = Some(middle);
        Ok(Stage::Mlp(number))
    }

    fn mlp(&mut self, model: &Decoder, number: usize) -> Result<Stage> {
        let middle = self.flow();
        let (kept, y) = self.mlp_forward(model, number, &middle)?;
        if self.settings.gradient_scale.is_some() && self.kept(number) {
            self.layers[number].mlp = Some(kept);
        }
        self.flow = Some(y);
        Ok(if number + 1 < self.layers.len() { Stage::Attention(number + 1) } else { Stage::Loss(0) })
    }

    fn loss(&mut self, model: &Decoder, from: usize) -> Result<Stage> {
        let hidden = self.flow();
        let to = (from + self.settings.loss_positions.max(1)).min(self.targets.len());
        let some = &self.targets[from..to];
        let (rows, mut chunk) = match self.chunk.take() {
            Some(chunk) => chunk,
            None => {
                let rows: Vec<u32> = some.iter().map(|t| t.row).collect();
                let rows = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
                let positions = Positions {
                    targets: some.iter().map(|t| t.token).collect(),
                    weights: some.iter().map(|t| t.weight).collect(),
                    policy: some.iter().map(|t| t.policy).collect(),
                    loss: self.settings.loss,
                    logits_divisor: model.spec.logits_divisor * self.settings.temperature,
                    gradient_scale: self.settings.gradient_scale,
                    head_learns: self.settings.base_learns,
                };
                let chunk = LossChunk::new(positions, model.final_norm.forward(&rows)?, &model.head);
                (rows, chunk)
            }
        };
        let Some(outcome) = chunk.advance(&model.head)? else {
            (self.chunk, self.flow) = (Some((rows, chunk)), Some(hidden));
            return Ok(Stage::Loss(from));
        };
        drop(chunk);
        self.loss_sum += outcome.loss_sum;
        for ((target, &logprob), &entropy) in some.iter().zip(&outcome.logprobs).zip(&outcome.entropies) {
            self.figures.note(self.settings.loss, logprob, target.policy, entropy);
        }
        self.logprobs.extend(outcome.logprobs);
        if let Some(by_head) = outcome.by_head {
            self.base_gradient(BaseParameter::Embedding, by_head)?;
        }
        if let Some(gradient) = outcome.gradient {
            self.norm_learns(BaseParameter::FinalNorm, &model.final_norm, &rows, &gradient)?;
            self.head_gradients.push(model.final_norm.backward(&rows, &gradient)?);
        }
        if to < self.targets.len() {
            self.flow = Some(hidden);
            return Ok(Stage::Loss(to));
        }
        if self.settings.gradient_scale.is_none() {
            return Ok(Stage::Done);
        }
        let rows = Tensor::new(self.targets.iter().map(|t| t.row).collect::<Vec<_>>(), hidden.device())?;
        let gradients = Tensor::cat(&std::mem::take(&mut self.head_gradients), 0)?;
        self.flow = Some(hidden.zeros_like()?.index_add(&rows, &gradients, 0)?);
        Ok(self.back_from(self.layers.len()))
    }

    /// Where the way back goes on below a layer.
    fn back_from(&self, layer: usize) -> Stage {
        match layer.checked_sub(1) {
            None => Stage::Done,
            Some(below) if self.layers[below].mlp.is_some() => Stage::MlpBack(below),
            Some(below) => Stage::Recompute(below),
        }
    }

    fn recompute(&mut self, model: &Decoder, number: usize) -> Result<Stage> {
        let x = self.layers[number].input.clone().expect("the way forth kept the input");
        let (kept, middle) = self.attention_forward(model, number, &x)?;
        self.layers[number].attention = Some(kept);
        self.layers[number].middle = Some(middle);
        Ok(Stage::MlpBack(number))
    }

    fn mlp_back(&mut self, model: &Decoder, number: usize) -> Result<Stage> {
        let layer = &model.layers[number];
        let gradient = self.flow();
        let middle = self.layers[number].middle.take().expect("kept or computed again before");
        let kept = match self.layers[number].mlp.take() {
            Some(kept) => kept,
            None => self.mlp_again(model, number, &middle)?,
        };
        let update = scaled(&gradient, model.spec.residual_scale)?;
        let update = norm_back(&layer.after_mlp, kept.update.as_ref(), update)?;
        let activation = model.spec.layer.activation;
        let normed = normed(&layer.before_mlp, &middle)?;
        let (inner, down) = inner(&layer.mlp, activation, &kept)?;
        let by_inner = self.linear_back(down, &inner, kept.low_down.as_ref(), &update)?;
        drop((inner, update));
        let by_normed = match &layer.mlp {
            FeedForward::Gated { gate, up, .. } => {
                let above = kept.up.as_ref().expect("a gated layer keeps both halves");
                let (by_gate, by_up) = activation.gated_backward(&kept.gate, above, &by_inner)?;
                let one = self.linear_back(gate, &normed, kept.low[0].as_ref(), &by_gate)?;
                let two = self.linear_back(up, &normed, kept.low[1].as_ref(), &by_up)?;
                add_scaled(&one, &two, 1.0)?
            }
            FeedForward::FusedGated { gate_up, .. } => {
                let above = kept.up.as_ref().expect("a gated layer keeps both halves");
                let (by_gate, by_up) = activation.gated_backward(&kept.gate, above, &by_inner)?;
                let both = Tensor::cat(&[by_gate, by_up], 1)?;
                self.linear_back(gate_up, &normed, kept.low[0].as_ref(), &both)?
            }
            FeedForward::Plain { up, .. } => {
                let by_up = activation.backward(&kept.gate, &by_inner)?;
                self.linear_back(up, &normed, kept.low[0].as_ref(), &by_up)?
            }
        };
        if let Some(norm) = &layer.before_mlp {
            self.norm_learns(BaseParameter::BeforeMlp(number), norm, &middle, &by_normed)?;
        }
        let by_middle = norm_back(&layer.before_mlp, Some(&middle), by_normed)?;
        self.flow = Some(add_scaled(&gradient, &by_middle, 1.0)?);
        Ok(Stage::AttentionBack(number))
    }

    fn attention_back(&mut self, model: &Decoder, number: usize) -> Result<Stage> {
        let layer = &model.layers[number];
        let gradient = self.flow();
        let x = self.layers[number].input.take().expect("the way forth kept the input");
        let kept = self.layers[number].attention.take().expect("kept or computed again before");
        let update = scaled(&gradient, model.spec.residual_scale)?;
        let update = norm_back(&layer.after_attention, kept.update.as_ref(), update)?;
        let by_mixed = self.linear_back(&layer.attention_out, &kept.mixed, kept.low_out.as_ref(), &update)?;
        let (q, k, v) = attend_rows_backward(
            (&kept.q, &kept.k, &kept.v),
            (&kept.mixed, kept.log_sums.as_ref()),
            &by_mixed,
            &self.sequences,
            &model.attention,
            model.spec.windows[number],
        )?;
        let (q, k) = match model.spec.rope_of_layer[number] {
            Some(table) => {
                let rope = &model.ropes[table];
                (rope.backward(&q, &self.positions)?, rope.backward(&k, &self.positions)?)
            }
            None => (q, k),
        };
        let (q, k) = match (&layer.qk_norm, &kept.raw) {
            (Some((q_norm, k_norm)), Some((raw_q, raw_k))) => {
                (q_norm.backward(raw_q, &q)?, k_norm.backward(raw_k, &k)?)
            }
            _ => (q, k),
        };
        let normed = normed(&layer.before_attention, &x)?;
        let goes_on = number > 0 || self.settings.base_learns;
        let rows = x.dim(0)?;
        let flat = |t: &Tensor| t.reshape((rows, ()));
        let by_normed = match &layer.qkv {
            Projections::Separate(three) => {
                let mut sum: Option<Tensor> = None;
                for ((linear, low), gradient) in three.iter().zip(&kept.low).zip([&q, &k, &v]) {
                    let part =
                        self.linear_back_if(linear, &normed, low.as_ref(), &flat(gradient)?, goes_on)?;
                    sum = match (sum, part) {
                        (Some(sum), Some(part)) => Some(add_scaled(&sum, &part, 1.0)?),
                        (sum, part) => sum.or(part),
                    };
                }
                sum
            }
            Projections::Fused(qkv) => {
                let all = flat(&Tensor::cat(&[q, k, v], 1)?)?;
                self.linear_back_if(qkv, &normed, kept.low[0].as_ref(), &all, goes_on)?
            }
            Projections::InterleavedByHead(qkv) => {
                let all = flat(&Tensor::stack(&[q, k, v], 2)?)?;
                self.linear_back_if(qkv, &normed, kept.low[0].as_ref(), &all, goes_on)?
            }
        };
        // Below the first layer there is only the embedding, which an adapter does not train.
        if let Some(by_normed) = by_normed {
            if let Some(norm) = &layer.before_attention {
                self.norm_learns(BaseParameter::BeforeAttention(number), norm, &x, &by_normed)?;
            }
            let by_x = norm_back(&layer.before_attention, Some(&x), by_normed)?;
            self.flow = Some(add_scaled(&gradient, &by_x, 1.0)?);
        }
        if number == 0 && self.settings.base_learns {
            let by_embedded = self.flow();
            let by_token = model.embedding_gradient(&self.tokens, &by_embedded)?;
            self.base_gradient(BaseParameter::Embedding, by_token)?;
        }
        Ok(self.back_from(number))
    }

    /// Adds to the gradient of a weight of the base.
    fn base_gradient(&mut self, parameter: BaseParameter, part: Tensor) -> Result<()> {
        let sum = match self.base_gradients.remove(&parameter) {
            Some(sum) => add_scaled(&sum, &part, 1.0)?,
            None => part,
        };
        self.base_gradients.insert(parameter, sum);
        Ok(())
    }

    fn norm_learns(&mut self, of: BaseParameter, norm: &Norm, x: &Tensor, gradient: &Tensor) -> Result<()> {
        if !self.settings.base_learns {
            return Ok(());
        }
        self.base_gradient(of, norm.weight_gradient(x, gradient)?)
    }

    fn site(&self, linear: &Linear) -> Option<&TrainSite> {
        self.sites[linear.site()?].as_ref()
    }

    fn dropout(&self, linear: &Linear) -> Option<Dropout> {
        // Without a gradient nothing is learnt, and nothing is left out.
        let wanted = self.settings.dropout > 0.0 && self.settings.gradient_scale.is_some();
        let site = linear.site().filter(|_| wanted)?;
        let key = mix64(self.settings.key ^ mix64(site as u64 + 1));
        Some(Dropout { share: self.settings.dropout as f32, key })
    }

    fn linear(&self, linear: &Linear, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        linear.train_forward(x, self.site(linear), self.dropout(linear))
    }

    fn linear_back(
        &mut self,
        linear: &Linear,
        x: &Tensor,
        low: Option<&Tensor>,
        gradient: &Tensor,
    ) -> Result<Tensor> {
        let dx = self.linear_back_if(linear, x, low, gradient, true)?;
        Ok(dx.expect("it was asked for"))
    }

    /// Goes back through a linear layer and adds up its adapter's gradient; gives the input's where it is needed.
    fn linear_back_if(
        &mut self,
        linear: &Linear,
        x: &Tensor,
        low: Option<&Tensor>,
        gradient: &Tensor,
        input_needed: bool,
    ) -> Result<Option<Tensor>> {
        if let (true, Some(site)) = (self.settings.base_learns, linear.site()) {
            self.base_gradient(BaseParameter::Linear(site), linear.weight_gradient(x, gradient)?)?;
        }
        let (dx, of_site) =
            linear.train_backward(x, low, gradient, self.site(linear), self.dropout(linear), input_needed)?;
        if let (Some(of_site), Some(site)) = (of_site, linear.site()) {
            self.gradients[site] = Some(of_site);
        }
        Ok(dx)
    }
}

/// The input of the down projection, and that projection.
fn inner<'l>(
    mlp: &'l FeedForward,
    activation: crate::nn::Activation,
    kept: &KeptMlp,
) -> Result<(Tensor, &'l Linear)> {
    match mlp {
        FeedForward::Gated { down, .. } | FeedForward::FusedGated { down, .. } => {
            let up = kept.up.as_ref().expect("a gated layer keeps both halves");
            Ok((activation.gated(&kept.gate, up)?, down))
        }
        FeedForward::Plain { down, .. } => Ok((activation.apply(&kept.gate)?, down)),
    }
}

fn normed(norm: &Option<Norm>, x: &Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(x),
        None => Ok(x.clone()),
    }
}

fn norm_back(norm: &Option<Norm>, x: Option<&Tensor>, gradient: Tensor) -> Result<Tensor> {
    match (norm, x) {
        (Some(norm), Some(x)) => norm.backward(x, &gradient),
        _ => Ok(gradient),
    }
}

fn scaled(x: &Tensor, by: f64) -> Result<Tensor> {
    if by == 1.0 { Ok(x.clone()) } else { x * by }
}

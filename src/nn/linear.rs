//! The linear layer: one base weight in whatever format, one optional bias, and what adapters add.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};

use super::add_scaled;
use super::lora::{LoraBatch, SiteGradient, Term, TrainSite};
use super::ops::dropout::Dropout;
use super::ops::gemm::{LowRankTerm, at_b, x_w};
use super::ops::product::{LowRank, thin};
use super::ops::unpack::Rows;
use super::ops::{f32_view, has_kernels};
use super::quant::Weight;

/// y = x·Wᵀ + b, plus the low-rank part of each row's adapter.
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    site: Option<usize>,
}

impl Linear {
    /// A layer; `site` is its number among those that adapters can change.
    pub fn new(weight: Weight, bias: Option<Tensor>, site: Option<usize>) -> Self {
        Self { weight, bias, site }
    }

    /// The base weight.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Its number among the sites of adapters.
    pub fn site(&self) -> Option<usize> {
        self.site
    }

    /// Bytes of weight and bias.
    pub fn bytes(&self) -> u64 {
        let bias = self.bias.as_ref().map_or(0, |b| b.elem_count() * b.dtype().size_in_bytes());
        self.weight.bytes() + bias as u64
    }

    /// `[rows, in]` to `[rows, out]`, all rows in one pass over the base weight.
    pub fn forward(&self, x: &Tensor, lora: &LoraBatch) -> Result<Tensor> {
        let terms = self.site.map(|site| lora.at(site)).unwrap_or_default();
        if !has_kernels(x.device()) {
            return self.composed(x, &terms);
        }
        let views = terms
            .iter()
            .map(|term| {
                let scale = term.site.column_scale.as_ref().map(f32_view).transpose()?;
                Ok((f32_view(&term.site.a)?, f32_view(&term.site.b)?, scale))
            })
            .collect::<Result<Vec<_>>>()?;
        let low_rank: Vec<LowRank<'_>> = terms
            .iter()
            .zip(&views)
            .map(|(term, (a, b, scale))| LowRank {
                rows: term.rows.clone(),
                a,
                b,
                column_scale: scale.as_deref(),
            })
            .collect();
        let bias = self.bias.as_ref().map(f32_view).transpose()?;
        let y = self.weight.kernel_product(&f32_view(x)?, bias.as_deref(), &low_rank)?;
        Tensor::from_vec(y, (x.dim(0)?, self.weight.rows()), x.device())
    }

    /// The forward pass of training: as [`Linear::forward`] with one adapter for all rows, whose inputs `dropout`
    /// thins out. Gives y and, where there is an adapter, scale · x̃·Aᵀ `[rows, r]`, which the way back needs.
    pub(crate) fn train_forward(
        &self,
        x: &Tensor,
        site: Option<&TrainSite>,
        dropout: Option<Dropout>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let low = site.map(|site| self.train_low(x, site, dropout)).transpose()?;
        let y = if has_kernels(x.device()) {
            let bias = self.bias.as_ref().map(f32_view).transpose()?;
            let views = match (&low, site) {
                (Some(low), Some(site)) => Some((f32_view(low)?, f32_view(&site.b)?, site.b.dim(0)?)),
                _ => None,
            };
            let term = views.as_ref().map(|(left, right, rank)| LowRankTerm { left, right, rank: *rank });
            let y = self.weight.train_product(&f32_view(x)?, term, bias.as_deref())?;
            Tensor::from_vec(y, (x.dim(0)?, self.weight.rows()), x.device())?
        } else {
            let mut y = self.weight.composed_product(x)?;
            if let (Some(low), Some(site)) = (&low, site) {
                y = (y + low.matmul(&site.b.to_dtype(x.dtype())?)?)?;
            }
            match &self.bias {
                Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
                None => y,
            }
        };
        Ok((y, low))
    }

    /// scale · x̃·Aᵀ `[rows, r]`, for a way back without a way forth.
    pub(crate) fn train_low(&self, x: &Tensor, site: &TrainSite, dropout: Option<Dropout>) -> Result<Tensor> {
        let thinned = thinned(x, dropout)?;
        if has_kernels(x.device()) {
            let low = thin(&f32_view(&thinned)?, &f32_view(&site.a)?, self.weight.columns());
            return Tensor::from_vec(low, (x.dim(0)?, site.a.dim(0)?), x.device())? * site.scale;
        }
        thinned.matmul(&site.a.to_dtype(x.dtype())?.t()?)? * site.scale
    }

    /// Some columns of x·Wᵀ + b by our kernel: for the rows `band` of W, `[m, band.len()]`.
    pub(crate) fn band_product(&self, x: &[f32], band: Range<usize>) -> Result<Vec<f32>> {
        let bias = self.bias.as_ref().map(f32_view).transpose()?;
        self.weight.band_product(x, band.clone(), bias.as_deref().map(|bias| &bias[band]))
    }

    /// The way back: from the gradient by y, the gradient by x (unless nobody needs it) and by the adapter. The
    /// base weight gets none. `low` is what [`Linear::train_forward`] gave.
    pub(crate) fn train_backward(
        &self,
        x: &Tensor,
        low: Option<&Tensor>,
        gradient: &Tensor,
        site: Option<&TrainSite>,
        dropout: Option<Dropout>,
        input_needed: bool,
    ) -> Result<(Option<Tensor>, Option<SiteGradient>)> {
        let (inputs, outputs) = (self.weight.columns(), self.weight.rows());
        let (Some(low), Some(site)) = (low, site) else {
            let dx = input_needed.then(|| self.back_product(gradient, None)).transpose()?;
            return Ok((dx, None));
        };
        let rank = site.a.dim(0)?;
        let thinned = thinned(x, dropout)?;
        let (d_low, gradients) = if has_kernels(x.device()) {
            let (gradient, low, x) = (f32_view(gradient)?, f32_view(low)?, f32_view(&thinned)?);
            let mut d_low = thin(&gradient, &f32_view(&site.b)?, outputs);
            d_low.iter_mut().for_each(|d| *d *= site.scale as f32);
            let a = at_b(&d_low, &x, rank, inputs);
            let b = at_b(&low, &gradient, rank, outputs);
            let device = thinned.device();
            let gradients = SiteGradient {
                a: Tensor::from_vec(a, (rank, inputs), device)?,
                b: Tensor::from_vec(b, (rank, outputs), device)?,
            };
            (Tensor::from_vec(d_low, (thinned.dim(0)?, rank), device)?, gradients)
        } else {
            let d_low = (gradient.matmul(&site.b.to_dtype(gradient.dtype())?.t()?)? * site.scale)?;
            let a = d_low.t()?.matmul(&thinned)?.to_dtype(DType::F32)?;
            let b = low.t()?.matmul(gradient)?.to_dtype(DType::F32)?;
            (d_low, SiteGradient { a, b })
        };
        if !input_needed {
            return Ok((None, Some(gradients)));
        }
        let dx = match dropout {
            None => self.back_product(gradient, Some((&d_low, site)))?,
            Some(dropout) => {
                let through = if has_kernels(x.device()) {
                    let a = f32_view(&site.a)?;
                    let through = x_w(&f32_view(&d_low)?, Rows::F32(&a), inputs, None);
                    Tensor::from_vec(through, (x.dim(0)?, inputs), x.device())?
                } else {
                    d_low.matmul(&site.a.to_dtype(d_low.dtype())?)?
                };
                add_scaled(&self.back_product(gradient, None)?, &dropout.apply(&through)?, 1.0)?
            }
        };
        Ok((Some(dx), Some(gradients)))
    }

    /// The gradient by the base weight, `[out, in]` in f32: for training a whole model.
    pub(crate) fn weight_gradient(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        if !has_kernels(x.device()) {
            return gradient.t()?.matmul(x)?.to_dtype(DType::F32);
        }
        let (inputs, outputs) = (self.weight.columns(), self.weight.rows());
        let product = at_b(&f32_view(gradient)?, &f32_view(x)?, outputs, inputs);
        Tensor::from_vec(product, (outputs, inputs), x.device())
    }

    /// Puts another base weight in its place, of the same shape.
    pub(crate) fn set_weight(&mut self, weight: Weight) {
        self.weight = weight;
    }

    /// Whether a bias is added.
    pub(crate) fn has_bias(&self) -> bool {
        self.bias.is_some()
    }

    /// gradient·W, plus d_low·A.
    fn back_product(&self, gradient: &Tensor, term: Option<(&Tensor, &TrainSite)>) -> Result<Tensor> {
        if !has_kernels(gradient.device()) {
            let dx = self.weight.composed_back_product(gradient)?;
            return match term {
                Some((d_low, site)) => dx + d_low.matmul(&site.a.to_dtype(d_low.dtype())?)?,
                None => Ok(dx),
            };
        }
        let views = match term {
            Some((d_low, site)) => Some((f32_view(d_low)?, f32_view(&site.a)?, site.a.dim(0)?)),
            None => None,
        };
        let term = views.as_ref().map(|(left, right, rank)| LowRankTerm { left, right, rank: *rank });
        let dx = self.weight.train_back_product(&f32_view(gradient)?, term)?;
        Tensor::from_vec(dx, (gradient.dim(0)?, self.weight.columns()), gradient.device())
    }

    fn composed(&self, x: &Tensor, terms: &[Term<'_>]) -> Result<Tensor> {
        let base = self.weight.composed_product(x)?;
        let mut parts = Vec::new();
        let mut done = 0;
        for term in terms {
            let count = term.rows.len();
            if done < term.rows.start {
                parts.push(base.narrow(0, done, term.rows.start - done)?);
            }
            let low = x.narrow(0, term.rows.start, count)?.matmul(&term.site.a.to_dtype(x.dtype())?.t()?)?;
            let change = low.matmul(&term.site.b.to_dtype(x.dtype())?)?;
            let mut sum = (base.narrow(0, term.rows.start, count)? + change)?;
            if let Some(scale) = &term.site.column_scale {
                sum = sum.broadcast_mul(&scale.to_dtype(x.dtype())?)?;
            }
            parts.push(sum);
            done = term.rows.end;
        }
        let rows = base.dim(0)?;
        if done < rows {
            parts.push(base.narrow(0, done, rows - done)?);
        }
        let y = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0)? };
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }
}

fn thinned(x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    match dropout {
        Some(dropout) => dropout.apply(x),
        None => Ok(x.clone()),
    }
}

//! The linear layer: one base weight in whatever format, one optional bias, and what adapters add.

use candle_core::{Result, Tensor};

use super::lora::{LoraBatch, Term};
use super::ops::product::LowRank;
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

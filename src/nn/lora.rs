//! Low-rank adapters as tensors (Hu et al. 2021, LoRA; Kalajdzievski 2023, rsLoRA; Liu et al. 2024, DoRA): what
//! one linear layer adds for the rows of a batch that name an adapter. Names and files are not known here.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::quant::Weight;

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
    /// Bytes of the f32 tensors, on the host as on the device.
    pub fn bytes(&self) -> u64 {
        let of = |t: &Tensor| 4 * t.elem_count() as u64;
        self.sites.iter().map(|s| of(&s.a) + of(&s.b) + s.magnitude.as_ref().map_or(0, of)).sum()
    }
}

/// An adapter on the device, laid out for the product: nothing is transposed or scaled at a step.
pub struct Adapter {
    sites: Vec<Option<SiteAdapter>>,
}

/// One site of an adapter on the device, f32.
pub(crate) struct SiteAdapter {
    /// `[rank, in]`.
    pub(crate) a: Tensor,
    /// `[rank, out]`: B transposed, times the scale.
    pub(crate) b: Tensor,
    /// DoRA: magnitude over the norm of W + scale·B·A, a value an output, `[out]`.
    pub(crate) column_scale: Option<Tensor>,
}

impl Adapter {
    /// Lays the weights out on `device`. `base` gives a site's base weight and is asked for DoRA alone.
    ///
    /// # Errors
    /// A site number that the model does not have, or shapes that do not fit it.
    pub fn bind<'w>(
        weights: &LoraWeights,
        sites: &[Site],
        base: impl Fn(usize) -> Option<&'w Weight>,
        device: &Device,
    ) -> Result<Self> {
        let mut bound: Vec<Option<SiteAdapter>> = sites.iter().map(|_| None).collect();
        for part in &weights.sites {
            let Some(site) = sites.get(part.site) else {
                candle_core::bail!(
                    "the model has {} sites, the adapter names number {}",
                    sites.len(),
                    part.site
                );
            };
            let rank = part.a.dim(0)?;
            if part.a.dims() != [rank, site.in_features] || part.b.dims() != [site.out_features, rank] {
                candle_core::bail!(
                    "{}: A {:?} and B {:?} do not fit",
                    site.name,
                    part.a.dims(),
                    part.b.dims()
                );
            }
            let on_device = |t: &Tensor| t.to_dtype(DType::F32)?.to_device(device);
            let a = on_device(&part.a)?.contiguous()?;
            let b = (on_device(&part.b)?.t()? * part.scale)?.contiguous()?;
            let column_scale = match (&part.magnitude, base(part.site)) {
                (None, _) => None,
                (Some(_), None) => candle_core::bail!("{}: no base weight to normalise DoRA with", site.name),
                (Some(magnitude), Some(weight)) => {
                    let changed = (weight.to_f32()? + b.t()?.matmul(&a)?)?;
                    let norm = changed.sqr()?.sum(1)?.sqrt()?;
                    Some((on_device(magnitude)?.flatten_all()? / norm)?)
                }
            };
            bound[part.site] = Some(SiteAdapter { a, b, column_scale });
        }
        Ok(Self { sites: bound })
    }
}

/// Which rows of a batch run with which adapter.
#[derive(Default, Clone)]
pub struct LoraBatch {
    spans: Vec<(Range<usize>, Arc<Adapter>)>,
}

/// One adapter's part at one site.
pub(crate) struct Term<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) site: &'a SiteAdapter,
}

impl LoraBatch {
    /// Adds rows that follow all those added before; rows of one adapter that follow each other become one span.
    pub fn push(&mut self, rows: Range<usize>, adapter: Arc<Adapter>) {
        match self.spans.last_mut() {
            Some((last, same)) if last.end == rows.start && Arc::ptr_eq(same, &adapter) => {
                last.end = rows.end
            }
            _ => self.spans.push((rows, adapter)),
        }
    }

    /// The adapters that change this site, in the order of their rows.
    pub(crate) fn at(&self, site: usize) -> Vec<Term<'_>> {
        self.spans
            .iter()
            .filter_map(|(rows, adapter)| {
                adapter.sites[site].as_ref().map(|site| Term { rows: rows.clone(), site })
            })
            .collect()
    }
}

/// One site of an adapter that is being trained, on the device, f32. B lies transposed and unscaled.
#[derive(Debug, Clone)]
pub(crate) struct TrainSite {
    /// `[rank, in]`.
    pub(crate) a: Tensor,
    /// `[rank, out]`.
    pub(crate) b: Tensor,
    /// What B·A is multiplied with.
    pub(crate) scale: f64,
}

/// Gradients of one site in one pass, in the shapes of [`TrainSite`].
pub(crate) struct SiteGradient {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
}

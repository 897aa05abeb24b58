//! The decoder without engine or HTTP: seconds of one step for one row, eight rows, eight rows with eight adapters
//! and a prompt chunk, as medians. `GURUKUL_BENCH_MODEL=DIR cargo bench --bench decoder [-- q8_0|q4_0|bf16 ...]`.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use gurukul::model::decoder::{Batch, Decoder};
use gurukul::model::load::{DtypeChoice, load};
use gurukul::nn::kv_cache::{KvCache, PAGE_TOKENS, SequenceSpan};
use gurukul::nn::lora::{Adapter, LoraBatch, LoraWeights, SiteWeights};
use gurukul::nn::quant::Quantization;

const PAST: usize = 128;

fn main() -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let Some(dir) = std::env::var_os("GURUKUL_BENCH_MODEL").map(PathBuf::from) else {
        writeln!(out, "set GURUKUL_BENCH_MODEL to a model folder")?;
        return Ok(());
    };
    let mut formats: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if formats.is_empty() {
        formats = ["f32", "bf16", "q8_0", "q4_0"].map(String::from).to_vec();
    }
    for format in formats {
        let (dtype, quantize) = match format.as_str() {
            "f32" => (DtypeChoice::F32, Quantization::None),
            "bf16" => (DtypeChoice::Bf16, Quantization::None),
            "f16" => (DtypeChoice::F16, Quantization::None),
            "q8_0" => (DtypeChoice::F32, Quantization::Q8_0),
            "q4_0" => (DtypeChoice::F32, Quantization::Q4_0),
            other => anyhow::bail!("unknown format {other}"),
        };
        let model = load(&dir, &Device::Cpu, dtype, quantize)?.0;
        let adapters = (0..8).map(|_| random_adapter(&model)).collect::<anyhow::Result<Vec<_>>>()?;
        let one = median(&model, 1, 1, &[], 15)?;
        let eight = median(&model, 8, 1, &[], 9)?;
        let mixed = median(&model, 8, 1, &adapters, 9)?;
        let prompt = median(&model, 1, 128, &[], 5)?;
        writeln!(
            out,
            "{format}: 1 row {:.1} tok/s, 8 rows {:.1} tok/s ({:.2}x), 8 rows 8 adapters {:.1} tok/s ({:.2}), \
             128-token chunk {:.1} tok/s",
            1.0 / one,
            8.0 / eight,
            8.0 * one / eight,
            8.0 / mixed,
            eight / mixed,
            128.0 / prompt
        )?;
    }
    Ok(())
}

fn random_adapter(model: &Decoder) -> anyhow::Result<Arc<Adapter>> {
    let sites = model.sites().iter().enumerate().map(|(site, s)| {
        let normal = |shape: (usize, usize)| Tensor::randn(0f32, 0.02, shape, &Device::Cpu);
        Ok(SiteWeights {
            site,
            a: normal((8, s.in_features))?,
            b: normal((s.out_features, 8))?,
            scale: 2.0,
            magnitude: None,
        })
    });
    let weights = LoraWeights { sites: sites.collect::<candle_core::Result<_>>()? };
    Ok(Arc::new(Adapter::bind(&weights, model.sites(), |s| model.site_weight(s), &Device::Cpu)?))
}

/// Median seconds of a step in which each of `sequences` works on `rows` tokens after `PAST` cached ones.
fn median(
    model: &Decoder,
    sequences: usize,
    rows: usize,
    adapters: &[Arc<Adapter>],
    runs: usize,
) -> anyhow::Result<f64> {
    let pages = (PAST + rows).div_ceil(PAGE_TOKENS);
    let mut cache = KvCache::new(model.kv_shape(), sequences * pages, model.activations(), model.device())?;
    let mut seconds = Vec::new();
    for run in 0..=runs {
        let mut lora = LoraBatch::default();
        for (i, adapter) in adapters.iter().enumerate() {
            lora.push(i * rows..(i + 1) * rows, adapter.clone());
        }
        let span = |i: usize| SequenceSpan {
            rows: i * rows..(i + 1) * rows,
            start: PAST,
            pages: (i * pages..(i + 1) * pages).map(|p| p as u32).collect(),
        };
        let batch = Batch {
            tokens: (0..sequences * rows).map(|t| (4 + t * 31 % 500) as u32).collect(),
            spans: (0..sequences).map(span).collect(),
            lora,
            outputs: (0..sequences).map(|i| ((i + 1) * rows - 1) as u32).collect(),
        };
        let begun = Instant::now();
        model.forward(&batch, &mut cache)?;
        if run > 0 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[runs / 2])
}

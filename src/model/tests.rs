//! The decoder against itself: however a text is cut into steps and whoever shares them, the bits are the same; and
//! the operations composed for CUDA agree with the kernels.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};

use super::decoder::{Batch, Decoder};
use super::load::{DtypeChoice, inspect, load};
use crate::nn::kv_cache::{KvCache, PAGE_TOKENS, SequenceSpan};
use crate::nn::lora::{Adapter, LoraBatch, LoraWeights, SiteWeights};
use crate::nn::ops::composed;
use crate::nn::quant::Quantization;

fn families() -> Vec<PathBuf> {
    let root = std::env::var_os("GURUKUL_PARITY_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity"), PathBuf::from);
    let mut found: Vec<PathBuf> = std::fs::read_dir(root)
        .expect("the fixture folder")
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.join("model.safetensors").is_file())
        .collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

fn decoder(dir: &Path, quantize: Quantization) -> Decoder {
    load(dir, &Device::Cpu, DtypeChoice::F32, quantize)
        .unwrap_or_else(|e| panic!("{}: {e:#}", dir.display()))
        .0
}

fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| 4 + ((i * 7919 + seed * 104_729) % 500) as u32).collect()
}

fn random_adapter(model: &Decoder, rank: usize, dora: bool) -> Result<std::sync::Arc<Adapter>> {
    let sites = model.sites().iter().enumerate().map(|(site, s)| {
        let normal = |shape: (usize, usize), std: f32| Tensor::randn(0f32, std, shape, &Device::Cpu);
        Ok(SiteWeights {
            site,
            a: normal((rank, s.in_features), 0.1)?,
            b: normal((s.out_features, rank), 0.1)?,
            scale: 2.0,
            magnitude: dora.then(|| Tensor::rand(0.5f32, 1.5, s.out_features, &Device::Cpu)).transpose()?,
        })
    });
    let weights = LoraWeights { sites: sites.collect::<Result<_>>()? };
    let base = |site| model.site_weight(site);
    Ok(std::sync::Arc::new(Adapter::bind(&weights, model.sites(), base, &Device::Cpu)?))
}

/// One sequence's part in a step: its number, its tokens, where they start.
type Part<'a> = (usize, &'a [u32], usize);

const PAGES_EACH: usize = 6;

/// Runs one step and gives the logits of every row, part by part.
fn step(
    model: &Decoder,
    cache: &mut KvCache,
    parts: &[Part],
    adapters: &[Option<std::sync::Arc<Adapter>>],
) -> Result<Vec<Vec<Vec<f32>>>> {
    let mut batch = Batch { tokens: vec![], spans: vec![], lora: LoraBatch::default(), outputs: vec![] };
    for &(sequence, tokens, start) in parts {
        let rows = batch.tokens.len()..batch.tokens.len() + tokens.len();
        batch.tokens.extend(tokens);
        // Pages out of order and interleaved with those of others.
        let pages = (0..PAGES_EACH).map(|p| ((PAGES_EACH - 1 - p) * 4 + sequence) as u32).collect();
        batch.spans.push(SequenceSpan { rows: rows.clone(), start, pages });
        if let Some(adapter) = &adapters[sequence] {
            batch.lora.push(rows, adapter.clone());
        }
    }
    batch.outputs = (0..batch.tokens.len() as u32).collect();
    let mut rows = model.forward(&batch, cache)?.to_vec2::<f32>()?.into_iter();
    Ok(parts.iter().map(|(_, tokens, _)| rows.by_ref().take(tokens.len()).collect()).collect())
}

fn new_cache(model: &Decoder) -> Result<KvCache> {
    KvCache::new(model.kv_shape(), 4 * PAGES_EACH, DType::F32, &Device::Cpu)
}

#[test]
fn the_bits_do_not_depend_on_chunks_or_company() -> Result<()> {
    for (dir, quantize) in families().into_iter().map(|dir| (dir, Quantization::None)).chain(
        families()
            .into_iter()
            .take(3)
            .flat_map(|d| [(d.clone(), Quantization::Q8_0), (d, Quantization::Q4_0)]),
    ) {
        let model = decoder(&dir, quantize);
        let adapters = [
            None,
            Some(random_adapter(&model, 4, false)?),
            Some(random_adapter(&model, 8, false)?),
            Some(random_adapter(&model, 2, true)?),
        ];
        let lengths = [37, 21, 50, 64.min(PAGES_EACH * PAGE_TOKENS)];
        let texts: Vec<Vec<u32>> = lengths.iter().enumerate().map(|(i, &n)| tokens(n, i)).collect();
        let mut alone: Vec<Vec<Vec<f32>>> = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            let mut cache = new_cache(&model)?;
            let mut rows = Vec::new();
            for (at, token) in text.iter().enumerate() {
                rows.extend(step(&model, &mut cache, &[(i, &[*token], at)], &adapters)?.remove(0));
            }
            alone.push(rows);
        }
        // Everyone together, each in chunks of its own size, until all are through.
        let chunks = [37, 1, 7, 16];
        let mut cache = new_cache(&model)?;
        let mut done = [0usize; 4];
        let mut together: Vec<Vec<Vec<f32>>> = vec![Vec::new(); 4];
        while (0..4).any(|i| done[i] < texts[i].len()) {
            let parts: Vec<Part> = (0..4)
                .filter(|&i| done[i] < texts[i].len())
                .map(|i| (i, &texts[i][done[i]..(done[i] + chunks[i]).min(texts[i].len())], done[i]))
                .collect();
            for (&(i, part, _), rows) in parts.iter().zip(step(&model, &mut cache, &parts, &adapters)?) {
                done[i] += part.len();
                together[i].extend(rows);
            }
        }
        for i in 0..4 {
            assert!(alone[i] == together[i], "{} {quantize:?}: sequence {i}", dir.display());
        }
        assert!(alone[0][0] != alone[1][0], "different texts differ");
    }
    Ok(())
}

#[test]
fn composed_operations_agree_with_the_kernels() -> Result<()> {
    for dir in families() {
        let run = || -> Result<Vec<Vec<Vec<f32>>>> {
            let model = decoder(&dir, Quantization::None);
            let mut sites = Vec::new();
            for (site, s) in model.sites().iter().enumerate() {
                let wave = |rows: usize, columns: usize, step: f32| {
                    let values: Vec<f32> =
                        (0..rows * columns).map(|i| 0.2 * (i as f32 * step).sin()).collect();
                    Tensor::from_vec(values, (rows, columns), &Device::Cpu)
                };
                sites.push(SiteWeights {
                    site,
                    a: wave(3, s.in_features, 0.37)?,
                    b: wave(s.out_features, 3, 0.53)?,
                    scale: 0.5,
                    magnitude: site
                        .is_multiple_of(2)
                        .then(|| Tensor::ones(s.out_features, DType::F32, &Device::Cpu))
                        .transpose()?,
                });
            }
            let base = |site| model.site_weight(site);
            let adapter = Adapter::bind(&LoraWeights { sites }, model.sites(), base, &Device::Cpu)?;
            let adapters = [None, Some(std::sync::Arc::new(adapter)), None, None];
            let (long, short) = (tokens(30, 5), tokens(9, 6));
            let mut cache = new_cache(&model)?;
            let mut rows = step(&model, &mut cache, &[(0, &long, 0), (1, &short[..8], 0)], &adapters)?;
            rows.extend(step(&model, &mut cache, &[(1, &short[8..], 8)], &adapters)?);
            Ok(rows)
        };
        let (kernels, composed) = (run()?, composed(run)?);
        for (a, b) in kernels.iter().flatten().flatten().zip(composed.iter().flatten().flatten()) {
            assert!((a - b).abs() < 1e-4, "{}: {a} and {b}", dir.display());
        }
    }
    Ok(())
}

#[test]
fn what_a_model_will_take_is_known_before_it_is_read() {
    for dir in families() {
        let foreseen =
            inspect(&dir).expect("a folder").held_bytes(DtypeChoice::F32, Quantization::None, &Device::Cpu);
        let taken = decoder(&dir, Quantization::None).weight_bytes();
        assert!(
            taken <= foreseen && foreseen < taken + taken / 20,
            "{}: {taken} of {foreseen}",
            dir.display()
        );
    }
}

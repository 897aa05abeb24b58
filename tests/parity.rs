//! Numbers against references that this project did not write: transformers and PEFT, on every family found under
//! `$GURUKUL_PARITY_DIR` (default: the copy in `tests/fixtures/parity`).

#[path = "support/parity.rs"]
mod parity;

use std::path::Path;

use candle_core::{Device, Tensor};
use gurukul::model::decoder::{Batch, Decoder};
use gurukul::model::load::{DtypeChoice, load};
use gurukul::nn::kv_cache::{KvCache, PAGE_TOKENS, SequenceSpan};
use gurukul::nn::lora::LoraBatch;
use gurukul::nn::quant::Quantization;

fn decoder(dir: &Path) -> Decoder {
    let loaded = load(dir, &Device::Cpu, DtypeChoice::F32, Quantization::None);
    loaded.unwrap_or_else(|e| panic!("{}: {e:#}", dir.display())).0
}

/// Logits of every position of every row, `[rows * length, vocab]`, all rows in one batch.
fn all_logits(model: &Decoder, rows: &[Vec<u32>]) -> Tensor {
    let length = rows[0].len();
    let pages = length.div_ceil(PAGE_TOKENS);
    let mut cache = KvCache::new(model.kv_shape(), rows.len() * pages, model.activations(), model.device())
        .expect("a cache");
    let spans = (0..rows.len())
        .map(|i| SequenceSpan {
            rows: i * length..(i + 1) * length,
            start: 0,
            pages: (i * pages..(i + 1) * pages).map(|p| p as u32).collect(),
        })
        .collect();
    let tokens: Vec<u32> = rows.concat();
    let outputs = (0..tokens.len() as u32).collect();
    model.forward(&Batch { tokens, spans, lora: LoraBatch::default(), outputs }, &mut cache).expect("logits")
}

fn worst_difference(ours: &Tensor, theirs: &Tensor) -> f32 {
    let theirs = theirs.reshape(ours.shape()).expect("the same number of logits");
    (ours - theirs).and_then(|d| d.abs()?.max_all()?.to_scalar()).expect("a difference")
}

#[test]
fn parity_logits_of_every_family_in_both_spellings() {
    for dir in parity::families() {
        let answers = parity::tensors(&dir.join("logits.safetensors"));
        let rows = parity::id_rows(&answers["input_ids"]);
        for config in ["config.json", "config_v5.json"] {
            let copy = parity::with_config(&dir, config);
            let worst = worst_difference(&all_logits(&decoder(copy.path()), &rows), &answers["logits"]);
            assert!(worst < 1e-4, "{} ({config}): {worst}", parity::name(&dir));
        }
    }
}

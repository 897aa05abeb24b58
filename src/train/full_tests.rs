//! Gradients of every kind of weight against finite differences, and steps that can be interrupted.

use std::fs;

use super::*;
use crate::engine::training::TrainSequence;

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    FullTrainer::initialise(folder.path(), 7).unwrap();
    folder
}

fn batch(seed: u32) -> TrainBatch {
    let sequence = |length: u32| {
        let tokens = (0..length).map(|i| (i * 17 + seed * 5 + i * i) % 61);
        let weights = (0..length).map(|i| if i % 3 == 0 { 0.0 } else { 1.0 });
        TrainSequence::new(tokens.collect(), weights.collect())
    };
    TrainBatch::cross_entropy(vec![sequence(9), sequence(14)], 0)
}

fn trainer(folder: &tempfile::TempDir) -> FullTrainer {
    FullTrainer::open(folder.path(), AdamW::default()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_weight_gets_its_gradient() {
    let folder = folder();
    let mut trainer = trainer(&folder);
    // Weights as large as trained ones: at first the gradient by most of them is close to nothing.
    let ids: Vec<BaseParameter> = trainer.parameters.keys().copied().collect();
    for id in &ids {
        if trainer.parameters[id].value.rank() == 2 {
            let larger = (&trainer.parameters[id].value * 10.0).unwrap();
            trainer.model.set_base_parameter(*id, &larger).unwrap();
            trainer.parameters.get_mut(id).unwrap().value = larger;
        }
    }
    let batch = batch(1);
    trainer.forward_backward(std::slice::from_ref(&batch)).unwrap();
    assert_eq!(trainer.gradients.keys().copied().collect::<Vec<_>>(), ids);
    for id in ids {
        let whole = values(&trainer.gradients[&id]);
        let start = trainer.parameters[&id].value.clone();
        // Along the gradient's own direction, where the loss changes most.
        let norm = whole.iter().map(|g| g * g).sum::<f32>().sqrt();
        let along = (&trainer.gradients[&id] / norm as f64).unwrap();
        let mut at = |step: f64| {
            trainer.model.set_base_parameter(id, &(&start + (&along * step).unwrap()).unwrap()).unwrap();
            trainer.evaluate(&batch).unwrap().loss_sum
        };
        let step = 1e-2;
        let slope = (at(step) - at(-step)) / (2.0 * step);
        at(0.0);
        let error = (slope - norm as f64).abs() / norm as f64;
        assert!(error < 0.01, "{id:?}: the loss rises by {slope}, the gradient says {norm}");
    }
}

#[test]
fn passes_side_by_side_are_passes_one_after_the_other() {
    let folder = folder();
    let (mut together, mut one_by_one) = (trainer(&folder), trainer(&folder));
    let batches = [batch(1), batch(2), batch(3)];
    together.forward_backward(&batches).unwrap();
    batches.iter().for_each(|batch| drop(one_by_one.forward_backward(std::slice::from_ref(batch)).unwrap()));
    for (id, gradient) in &together.gradients {
        assert_eq!(values(gradient), values(&one_by_one.gradients[id]), "{id:?}");
    }
}

#[test]
fn it_learns_and_goes_on_after_a_stop_with_the_same_bits() {
    let folder = folder();
    let by = StepParameters { learning_rate: 1e-2, max_grad_norm: 1.0 };
    let steps = |trainer: &mut FullTrainer, count: u32| {
        for number in 0..count {
            trainer.forward_backward(&[batch(number % 2)]).unwrap();
            assert!(!trainer.optim_step(by).unwrap().skipped);
        }
        trainer.evaluate(&batch(0)).unwrap().loss_sum
    };
    let mut uninterrupted = trainer(&folder);
    let before = uninterrupted.evaluate(&batch(0)).unwrap().loss_sum;
    let after = steps(&mut uninterrupted, 40);
    assert!(after < before / 2.0, "loss {before} became {after}");

    let state = folder.path().join("state");
    let mut first = trainer(&folder);
    assert!(first.restore(&state).unwrap().is_none());
    steps(&mut first, 20);
    first.save(&state, b"beside").unwrap();
    let mut second = trainer(&folder);
    assert_eq!(second.restore(&state).unwrap().unwrap(), b"beside");
    assert_eq!(second.steps(), 20);
    steps(&mut second, 20);
    for (id, parameter) in &uninterrupted.parameters {
        assert_eq!(values(&parameter.value), values(&second.parameters[id].value), "{id:?}");
    }
}

#[test]
fn a_step_needs_a_gradient() {
    let folder = folder();
    let by = StepParameters { learning_rate: 1e-2, max_grad_norm: 1.0 };
    assert!(trainer(&folder).optim_step(by).unwrap_err().to_string().contains("make a pass"));
}

#[test]
fn another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), CONFIG.replace("embeddings\": true", "embeddings\": false"))
        .unwrap();
    let error = FullTrainer::initialise(folder.path(), 7).unwrap_err().to_string();
    assert!(error.contains("tied embeddings"), "{error}");
}

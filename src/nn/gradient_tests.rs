//! Every backward pass against finite differences, and every kernel's against the same composed of candle's
//! operations.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::Activation;
use super::attention::{AttentionSpec, alibi_slopes, attend_rows, attend_rows_backward};
use super::linear::Linear;
use super::lora::TrainSite;
use super::loss::{LossChunk, Outcome, PolicyToken, Positions, TokenLoss};
use super::norm::Norm;
use super::ops::composed;
use super::ops::dropout::Dropout;
use super::quant::{Quantization, Role, Weight};
use super::rope::{Rope, RopeScaling};

fn noise(shape: impl Into<candle_core::Shape>, seed: u32) -> Tensor {
    let shape = shape.into();
    let mut state = seed.wrapping_mul(2_654_435_761);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor")
}

fn sum_of(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |t: &Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32 values");
    flat(a).iter().zip(flat(b)).map(|(a, b)| *a as f64 * b as f64).sum()
}

fn close(a: &Tensor, b: &Tensor, allowed: f32, what: &str) {
    let worst = (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>()).expect("the same shape");
    assert!(worst < allowed, "{what}: {worst} apart");
}

/// Σ g·f(x) along a direction: its central difference must be Σ dx·direction.
fn slope_is_right(
    what: &str,
    x: &Tensor,
    dx: &Tensor,
    g: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    for seed in 0..4 {
        let direction = noise(x.shape(), 900 + seed);
        let step = 2e-3;
        let at = |by: f64| -> Result<f64> { Ok(sum_of(g, &f(&(x + (&direction * by)?)?)?)) };
        let measured = (at(step)? - at(-step)?) / (2.0 * step);
        let claimed = sum_of(dx, &direction);
        let size = dx.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt() as f64;
        let apart = (measured - claimed).abs();
        assert!(apart < 4e-3 * (1.0 + size), "{what}: {measured} measured, {claimed} claimed");
    }
    Ok(())
}

#[test]
fn norms() -> Result<()> {
    let (x, g) = (noise((7, 40), 1), noise((7, 40), 2));
    let (weight, bias) = (noise(40, 3), noise(40, 4));
    for norm in [Norm::Rms { weight: weight.clone(), eps: 1e-5 }, Norm::Layer { weight, bias, eps: 1e-5 }] {
        let dx = norm.backward(&x, &g)?;
        slope_is_right("norm", &x, &dx, &g, |x| norm.forward(x))?;
        close(&dx, &composed(|| norm.backward(&x, &g))?, 1e-5, "norm");
    }
    Ok(())
}

#[test]
fn activations() -> Result<()> {
    let (gate, up, g) = ((noise((5, 33), 1) * 3.0)?, noise((5, 33), 2), noise((5, 33), 3));
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let dx = activation.backward(&gate, &g)?;
        slope_is_right("activation", &gate, &dx, &g, |x| activation.apply(x))?;
        close(&dx, &composed(|| activation.backward(&gate, &g))?, 1e-5, "activation");
        let (d_gate, d_up) = activation.gated_backward(&gate, &up, &g)?;
        slope_is_right("gate", &gate, &d_gate, &g, |x| activation.gated(x, &up))?;
        slope_is_right("up", &up, &d_up, &g, |x| activation.gated(&gate, x))?;
        let (c_gate, c_up) = composed(|| activation.gated_backward(&gate, &up, &g))?;
        close(&d_gate, &c_gate, 1e-5, "gate");
        close(&d_up, &c_up, 1e-5, "up");
    }
    Ok(())
}

#[test]
fn rotary() -> Result<()> {
    let rope = Rope::new(10_000.0, 16, 64, &RopeScaling::None, &Device::Cpu)?;
    let (x, g) = (noise((6, 3, 16), 1), noise((6, 3, 16), 2));
    let positions = [0, 1, 2, 0, 9, 63];
    let dx = rope.backward(&g, &positions)?;
    slope_is_right("rotary", &x, &dx, &g, |x| rope.apply(x, &positions))?;
    close(&dx, &composed(|| rope.backward(&g, &positions))?, 1e-6, "rotary");
    Ok(())
}

#[test]
#[expect(clippy::single_range_in_vec_init, reason = "one sequence is a list of one range")]
fn attention() -> Result<()> {
    let grouped = (6, 2, 8);
    /// Heads, key/value heads and head size; ALiBi; window; sequences.
    type Case = ((usize, usize, usize), bool, Option<usize>, Vec<Range<usize>>);
    let cases: [Case; 4] = [
        (grouped, false, None, vec![0..5, 5..6, 6..23]),
        (grouped, true, None, vec![0..9, 9..23]),
        ((4, 4, 16), false, Some(6), vec![0..23]),
        // More than one block of queries.
        ((2, 1, 8), true, Some(70), vec![0..130]),
    ];
    for ((heads, kv_heads, d), alibi, window, sequences) in cases {
        let rows = sequences.last().map_or(0, |s| s.end);
        let spec = AttentionSpec {
            heads,
            scale: 1.0 / (d as f64).sqrt(),
            alibi_slopes: alibi.then(|| alibi_slopes(heads)),
        };
        let q = (noise((rows, heads, d), 1) * 2.0)?;
        let (k, v) = ((noise((rows, kv_heads, d), 2) * 2.0)?, noise((rows, kv_heads, d), 3));
        let g = noise((rows, heads * d), 4);
        let forward = |q: &Tensor, k: &Tensor, v: &Tensor| attend_rows((q, k, v), &sequences, &spec, window);
        let (mixed, sums) = forward(&q, &k, &v)?;
        let back = |mixed: &Tensor, sums: Option<&Tensor>| {
            attend_rows_backward((&q, &k, &v), (mixed, sums), &g, &sequences, &spec, window)
        };
        let (dq, dk, dv) = back(&mixed, sums.as_ref())?;
        slope_is_right("queries", &q, &dq, &g, |x| Ok(forward(x, &k, &v)?.0))?;
        slope_is_right("keys", &k, &dk, &g, |x| Ok(forward(&q, x, &v)?.0))?;
        slope_is_right("values", &v, &dv, &g, |x| Ok(forward(&q, &k, x)?.0))?;
        let (c_mixed, none) = composed(|| forward(&q, &k, &v))?;
        close(&mixed, &c_mixed, 1e-5, "mixed");
        assert!(none.is_none());
        let (cq, ck, cv) = composed(|| back(&c_mixed, None))?;
        close(&dq, &cq, 2e-5, "queries");
        close(&dk, &ck, 2e-5, "keys");
        close(&dv, &cv, 2e-5, "values");
    }
    Ok(())
}

#[test]
fn linear_layers_with_adapters_and_dropout() -> Result<()> {
    let (inputs, outputs, rank, rows) = (64, 40, 3, 11);
    let dense = (noise((outputs, inputs), 1) * 0.2)?;
    let bias = noise(outputs, 2);
    let (x, g) = (noise((rows, inputs), 3), noise((rows, outputs), 4));
    let site = TrainSite { a: noise((rank, inputs), 5), b: noise((rank, outputs), 6), scale: 0.7 };
    for quantize in [Quantization::None, Quantization::Q8_0, Quantization::Q4_0] {
        let weight = match quantize.format(Role::Layer, inputs) {
            None => Weight::dense(dense.clone())?,
            Some(format) => Weight::blocks(&dense, format, &Device::Cpu)?,
        };
        let linear = Linear::new(weight, Some(bias.clone()), Some(0));
        for dropout in [None, Some(Dropout { share: 0.25, key: 9 })] {
            let forward = |x: &Tensor, site: &TrainSite| linear.train_forward(x, Some(site), dropout);
            let (y, low) = forward(&x, &site)?;
            let (dx, by_site) = linear.train_backward(&x, low.as_ref(), &g, Some(&site), dropout, true)?;
            let (dx, by_site) = (dx.expect("asked for"), by_site.expect("there is an adapter"));
            slope_is_right("input", &x, &dx, &g, |x| Ok(forward(x, &site)?.0))?;
            slope_is_right("A", &site.a, &by_site.a, &g, |a| {
                Ok(forward(&x, &TrainSite { a: a.clone(), ..site.clone() })?.0)
            })?;
            slope_is_right("B", &site.b, &by_site.b, &g, |b| {
                Ok(forward(&x, &TrainSite { b: b.clone(), ..site.clone() })?.0)
            })?;
            // candle multiplies quantized weights with activations rounded to 8 bits.
            if quantize == Quantization::None {
                let (c_y, c_low) = composed(|| forward(&x, &site))?;
                close(&y, &c_y, 1e-4, "output");
                let (c_dx, c_site) =
                    composed(|| linear.train_backward(&x, c_low.as_ref(), &g, Some(&site), dropout, true))?;
                close(&dx, &c_dx.expect("asked for"), 1e-4, "input");
                let c_site = c_site.expect("there is an adapter");
                close(&by_site.a, &c_site.a, 1e-4, "A");
                close(&by_site.b, &c_site.b, 1e-4, "B");
            }
        }
        // Nobody below wants a gradient, and the adapter gets the same.
        let (_, low) = linear.train_forward(&x, Some(&site), None)?;
        let (dx, by_site) = linear.train_backward(&x, low.as_ref(), &g, Some(&site), None, false)?;
        assert!(dx.is_none() && by_site.is_some());
    }
    Ok(())
}

#[test]
fn the_loss_of_some_positions() -> Result<()> {
    // More words than one band holds.
    let (hidden_size, vocabulary, count) = (24, 301, 9);
    let head = Linear::new(Weight::dense(noise((vocabulary, hidden_size), 1))?, None, None);
    let hidden = noise((count, hidden_size), 2);
    let targets: Vec<u32> = (0..count as u32).map(|i| i * 33).collect();
    let weights: Vec<f32> = (0..count).map(|i| 0.25 * i as f32).collect();
    let positions = Positions {
        targets: targets.clone(),
        weights: weights.clone(),
        policy: Vec::new(),
        loss: TokenLoss::CrossEntropy,
        logits_divisor: 1.5,
        gradient_scale: Some(1.0),
        head_learns: false,
    };
    let through = |positions: &Positions, hidden: &Tensor| -> Result<Outcome> {
        let mut chunk = LossChunk::new(positions.clone(), hidden.clone(), &head);
        let mut pieces = 0;
        loop {
            pieces += 1;
            assert!(pieces < 100, "it ends");
            if let Some(outcome) = chunk.advance(&head)? {
                return Ok(outcome);
            }
        }
    };
    let outcome = through(&positions, &hidden)?;
    let one = Tensor::ones(1, DType::F32, &Device::Cpu)?;
    let gradient = outcome.gradient.clone().expect("asked for");
    slope_is_right("loss", &hidden, &gradient, &one, |x| {
        Tensor::from_vec(vec![through(&positions, x)?.loss_sum as f32], 1, &Device::Cpu)
    })?;
    let exact = candle_nn::ops::log_softmax(&(hidden.matmul(&head.weight().to_f32()?.t()?)? / 1.5)?, 1)?;
    let exact = exact.to_vec2::<f32>()?;
    let mut sum = 0f64;
    for (i, (&target, &weight)) in targets.iter().zip(&weights).enumerate() {
        assert!((exact[i][target as usize] - outcome.logprobs[i]).abs() < 1e-5);
        sum -= weight as f64 * exact[i][target as usize] as f64;
    }
    assert!((sum - outcome.loss_sum).abs() < 1e-4, "{sum} and {}", outcome.loss_sum);
    let other = composed(|| through(&positions, &hidden))?;
    close(&gradient, &other.gradient.expect("asked for"), 1e-5, "loss");
    assert!(outcome.logprobs.iter().zip(&other.logprobs).all(|(a, b)| (a - b).abs() < 1e-5));
    let alone = through(&Positions { gradient_scale: None, ..positions.clone() }, &hidden)?;
    assert!(alone.gradient.is_none() && alone.logprobs == outcome.logprobs);
    assert!(outcome.entropies.is_empty() && other.entropies.is_empty());

    // Ratios on both sides of 1, most outside of the bounds.
    let token = |i: usize| PolicyToken {
        old: outcome.logprobs[i] + 0.15 * (i as f32 - 4.0),
        advantage: if i.is_multiple_of(3) { -1.2 } else { 0.8 },
        reference: outcome.logprobs[i] + 0.2,
    };
    for loss in [
        TokenLoss::ImportanceSampling { kl: 0.0 },
        TokenLoss::ImportanceSampling { kl: 0.5 },
        TokenLoss::PpoClip { low: 0.2, high: 0.3, kl: 0.0 },
        TokenLoss::PpoClip { low: 0.2, high: 0.3, kl: 0.5 },
    ] {
        let positions = Positions { loss, policy: (0..count).map(token).collect(), ..positions.clone() };
        let outcome = through(&positions, &hidden)?;
        let gradient = outcome.gradient.clone().expect("asked for");
        slope_is_right(&format!("{loss:?}"), &hidden, &gradient, &one, |x| {
            Tensor::from_vec(vec![through(&positions, x)?.loss_sum as f32], 1, &Device::Cpu)
        })?;
        let other = composed(|| through(&positions, &hidden))?;
        close(&gradient, &other.gradient.expect("asked for"), 1e-5, "loss");
        for (i, row) in exact.iter().enumerate() {
            let entropy: f32 = row.iter().map(|l| -l * l.exp()).sum();
            assert!((entropy - outcome.entropies[i]).abs() < 1e-4, "{entropy} {}", outcome.entropies[i]);
            assert!((entropy - other.entropies[i]).abs() < 1e-4);
        }
    }
    Ok(())
}

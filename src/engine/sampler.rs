//! From one row of logits to one token. Pure: a row, what was seen, the request's own random stream.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::command::{PositionLogprobs, Sampling, TokenLogprob};

/// The sampling side of one request.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens of prompt and answer, each once; kept where the repetition penalty needs it.
    seen: Vec<u32>,
    is_seen: Vec<bool>,
}

/// A token and its logit, ordered by logit, then by lower id.
#[derive(Clone, Copy, PartialEq)]
struct Candidate {
    logit: f32,
    token: u32,
}

impl Eq for Candidate {}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.logit.total_cmp(&other.logit).then(other.token.cmp(&self.token))
    }
}

impl Sampler {
    /// For an answer to `prompt`.
    pub fn new(sampling: Sampling, prompt: &[u32], vocab_size: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
        random.set_stream(sampling.stream);
        let mut sampler = Self { sampling, random, seen: Vec::new(), is_seen: Vec::new() };
        if sampler.sampling.repetition_penalty != 1.0 {
            sampler.is_seen = vec![false; vocab_size];
            for &token in prompt {
                sampler.note(token);
            }
        }
        sampler
    }

    /// What the tokens are drawn with; 0 when greedy.
    pub fn temperature(&self) -> f32 {
        self.sampling.temperature
    }

    /// Chooses the next token; `logits` is used up. `None` when the row holds no finite maximum.
    pub fn next(&mut self, logits: &mut [f32]) -> Option<u32> {
        let penalty = self.sampling.repetition_penalty;
        for &token in &self.seen {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        let best = most_likely(logits)?;
        let token = if self.sampling.temperature == 0.0 { best.token } else { self.draw(logits, best.logit) };
        if self.sampling.repetition_penalty != 1.0 {
            self.note(token);
        }
        Some(token)
    }

    fn note(&mut self, token: u32) {
        if let Some(seen @ false) = self.is_seen.get_mut(token as usize) {
            *seen = true;
            self.seen.push(token);
        }
    }

    fn draw(&mut self, logits: &[f32], best: f32) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let weight = |logit: f32| ((logit - best) as f64 / temperature as f64).exp();
        // 53 bits: every f64 in [0, 1) of that grid is equally likely.
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let keep_all = top_k == 0 || top_k >= logits.len();
        if keep_all && top_p >= 1.0 && min_p <= 0.0 {
            let weights = || logits.iter().map(|&l| weight(l));
            return walk(weights().enumerate().map(|(i, w)| (i as u32, w)), uniform * weights().sum::<f64>());
        }
        let mut kept: Vec<Candidate> =
            if keep_all { plausible(logits, top_p, &weight) } else { largest(logits, top_k) };
        kept.sort_unstable_by(|a, b| b.cmp(a));
        let mut weights: Vec<f64> = kept.iter().map(|c| weight(c.logit)).collect();
        if top_p < 1.0 {
            let total: f64 =
                if keep_all { logits.iter().map(|&l| weight(l)).sum() } else { weights.iter().sum() };
            let mut reached = 0.0;
            let enough = weights.iter().position(|w| {
                reached += w;
                reached >= top_p as f64 * total
            });
            weights.truncate(enough.map_or(weights.len(), |at| at + 1));
        }
        // The most likely token has weight 1, so its share is the bound itself.
        let likely = weights.iter().take_while(|&&w| w >= min_p as f64).count().max(1);
        weights.truncate(likely);
        let total: f64 = weights.iter().sum();
        walk(kept.iter().map(|c| c.token).zip(weights), uniform * total)
    }
}

/// The first token at which the running sum passes `target`; the last one with weight where rounding leaves a rest.
fn walk(tokens: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = 0;
    for (token, weight) in tokens {
        if weight > 0.0 {
            last = token;
            sum += weight;
            if sum > target {
                return token;
            }
        }
    }
    last
}

/// The most likely token, ties to the lowest id; `None` when a logit is NaN or none is finite.
fn most_likely(logits: &[f32]) -> Option<Candidate> {
    let mut best = Candidate { logit: f32::NEG_INFINITY, token: 0 };
    let mut any_nan = false;
    for (token, &logit) in logits.iter().enumerate() {
        any_nan |= logit.is_nan();
        if logit > best.logit {
            best = Candidate { logit, token: token as u32 };
        }
    }
    (best.logit.is_finite() && !any_nan).then_some(best)
}

/// The `k` largest, in no order.
fn largest(logits: &[f32], k: usize) -> Vec<Candidate> {
    let mut heap: BinaryHeap<std::cmp::Reverse<Candidate>> = BinaryHeap::with_capacity(k + 1);
    for (token, &logit) in logits.iter().enumerate() {
        let candidate = Candidate { logit, token: token as u32 };
        if heap.len() < k {
            heap.push(std::cmp::Reverse(candidate));
        } else if let Some(mut least) = heap.peek_mut()
            && candidate > least.0
        {
            least.0 = candidate;
        }
    }
    heap.into_iter().map(|c| c.0).collect()
}

/// All tokens that top-p could keep: those whose probability is above (1 - p) / vocabulary, since all others
/// together stay below 1 - p.
fn plausible(logits: &[f32], top_p: f32, weight: &impl Fn(f32) -> f64) -> Vec<Candidate> {
    let total: f64 = logits.iter().map(|&l| weight(l)).sum();
    let least = (1.0 - top_p as f64) * total / logits.len() as f64;
    let candidates = logits.iter().enumerate().map(|(i, &logit)| Candidate { logit, token: i as u32 });
    candidates.filter(|c| weight(c.logit) >= least).collect()
}

/// Log-probabilities of the model's own distribution: of `chosen`, and of the `top` most likely tokens; and that of
/// `chosen` at the temperature that it was drawn with.
pub fn logprobs(logits: &[f32], chosen: u32, top: usize, temperature: f32) -> PositionLogprobs {
    let normalizer = log_sum_exp(logits, 1.0);
    let of = |logit: f32| (logit as f64 - normalizer) as f32;
    let mut best = if top == 0 { Vec::new() } else { largest(logits, top) };
    best.sort_unstable_by(|a, b| b.cmp(a));
    let logit = logits[chosen as usize];
    let sampled = match f64::from(temperature) {
        0.0 => 0.0,
        1.0 => of(logit),
        temperature => (logit as f64 / temperature - log_sum_exp(logits, temperature)) as f32,
    };
    PositionLogprobs {
        chosen: of(logit),
        sampled,
        top: best.iter().map(|c| TokenLogprob { token: c.token, logprob: of(c.logit) }).collect(),
    }
}

/// ln Σ exp(logit / temperature), in f64.
fn log_sum_exp(logits: &[f32], temperature: f64) -> f64 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    best / temperature + logits.iter().map(|&l| ((l as f64 - best) / temperature).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampler(sampling: Sampling) -> Sampler {
        Sampler::new(sampling, &[], 8)
    }

    /// How often each token comes in `n` draws.
    fn frequencies(sampling: &Sampling, logits: &[f32], n: usize) -> Vec<f64> {
        let mut counts = vec![0usize; logits.len()];
        let mut sampler = Sampler::new(sampling.clone(), &[], logits.len());
        for _ in 0..n {
            counts[sampler.next(&mut logits.to_vec()).expect("finite") as usize] += 1;
        }
        counts.into_iter().map(|c| c as f64 / n as f64).collect()
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_id_on_a_tie() {
        let mut s = sampler(Sampling::default());
        assert_eq!(s.next(&mut [0.0, 3.0, 3.0, -1.0]), Some(1));
        assert_eq!(s.next(&mut [f32::NAN, 1.0]), None);
        assert_eq!(s.next(&mut [f32::NEG_INFINITY; 3]), None);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let all = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let near = |found: Vec<f64>, wanted: [f64; 4]| {
            assert!(found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 0.02), "{found:?} for {wanted:?}");
        };
        near(frequencies(&all, &logits, 20_000), [0.5, 0.25, 0.125, 0.125]);
        near(frequencies(&Sampling { top_k: 2, ..all.clone() }, &logits, 20_000), [0.667, 0.333, 0.0, 0.0]);
        near(frequencies(&Sampling { top_p: 0.7, ..all.clone() }, &logits, 20_000), [0.667, 0.333, 0.0, 0.0]);
        near(frequencies(&Sampling { min_p: 0.4, ..all.clone() }, &logits, 20_000), [0.667, 0.333, 0.0, 0.0]);
        near(
            frequencies(&Sampling { temperature: 0.5, ..all }, &logits, 20_000),
            [0.727, 0.182, 0.0455, 0.0455],
        );
    }

    #[test]
    fn the_penalty_is_that_of_transformers() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let mut s = Sampler::new(sampling, &[0, 0], 4);
        // Once for each seen token however often it stands in the prompt: 4 / 2 = 2 < 3.
        assert_eq!(s.next(&mut [4.0, 3.0, -2.0, -3.0]), Some(1));
        assert_eq!(s.next(&mut [4.0, 3.0, -2.0, -3.0]), Some(0), "4 / 2 against 3 / 2");
        let mut s = Sampler::new(Sampling { repetition_penalty: 2.0, ..Sampling::default() }, &[0], 2);
        assert_eq!(s.next(&mut [-1.0, -1.5]), Some(1), "a negative logit is multiplied");
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.25].iter().map(|p| p.ln() + 3.0).collect();
        let found = logprobs(&logits, 1, 2, 0.5);
        assert!((found.chosen - 0.25f32.ln()).abs() < 1e-6);
        // At temperature 1/2 probabilities are squared: 1/16 of 1/4 + 1/16 + 1/16.
        assert!((found.sampled - (1.0f32 / 6.0).ln()).abs() < 1e-6);
        assert_eq!(logprobs(&logits, 1, 0, 1.0).sampled, found.chosen);
        assert_eq!(logprobs(&logits, 0, 0, 0.0).sampled, 0.0);
        assert_eq!(found.top.iter().map(|t| t.token).collect::<Vec<_>>(), vec![0, 1]);
        assert!((found.top[0].logprob - 0.5f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn streams_of_one_seed_differ_and_repeat() {
        let draw = |seed, stream| {
            let mut s = sampler(Sampling { temperature: 1.0, seed, stream, ..Sampling::default() });
            (0..20).map(|_| s.next(&mut [0.0; 8]).expect("finite")).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_ne!(draw(1, 0), draw(2, 0));
    }

    proptest! {
        #[test]
        fn a_token_is_always_chosen_from_what_the_filters_keep(
            logits in prop::collection::vec(-50f32..50.0, 2..300),
            temperature in 0.01f32..5.0, top_k in 0usize..400, top_p in 0.01f32..1.0, min_p in 0f32..0.99, seed: u64,
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
            let mut s = Sampler::new(sampling, &[], logits.len());
            let token = s.next(&mut logits.clone()).expect("finite") as usize;
            let larger = logits.iter().filter(|&&l| l > logits[token]).count();
            prop_assert!(top_k == 0 || larger < top_k);
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert!(((logits[token] - best) as f64 / temperature as f64).exp() >= min_p as f64);
        }
    }
}

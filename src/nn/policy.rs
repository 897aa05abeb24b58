//! Losses of a policy, a token each: value and derivative as functions of the token's log-probability and of what it
//! is compared with. Pure numbers; the kernel that takes them through a model is in `loss`.

/// What a policy's token is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct PolicyToken {
    /// ln p under the policy that sampled it, of the distribution that it was drawn from.
    pub old: f32,
    /// How much better than expected its answer was.
    pub advantage: f32,
    /// ln p under the reference policy, at the same temperature; unused where the loss has no KL penalty.
    pub reference: f32,
}

/// A loss a token. Each gives its value and its derivative by ln p, which is all that the kernel needs: another
/// loss is another variant with what it compares with. In the formulas A is the advantage, r = p / p_old the
/// importance ratio, and k3 the estimator of the KL divergence to the reference, d = ln p_ref - ln p,
/// k3 = exp(d) - d - 1 (Schulman 2020, "Approximating KL divergence").
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TokenLoss {
    /// -ln p.
    CrossEntropy,
    /// -A·r + kl·k3: the policy gradient, corrected for the policy that sampled.
    ImportanceSampling {
        /// Weight of the KL penalty; 0 is none.
        kl: f32,
    },
    /// -min(A·r, A·clip(r, 1 - low, 1 + high)) + kl·k3 (PPO, Schulman et al. 2017; with high above low as in DAPO,
    /// Yu et al. 2025).
    PpoClip {
        /// How far r may fall below 1 before a token stops pushing it down.
        low: f32,
        /// How far r may rise above 1 before a token stops pushing it up.
        high: f32,
        /// Weight of the KL penalty; 0 is none.
        kl: f32,
    },
}

impl TokenLoss {
    /// Whether it compares with a [`PolicyToken`].
    pub fn is_policy(self) -> bool {
        !matches!(self, Self::CrossEntropy)
    }

    /// The loss at this log-probability, and its derivative by it.
    pub fn at(self, logprob: f32, token: PolicyToken) -> (f32, f32) {
        let PolicyToken { old, advantage, reference } = token;
        let (loss, slope, kl) = match self {
            Self::CrossEntropy => return (-logprob, -1.0),
            Self::ImportanceSampling { kl } => {
                let pushed = advantage * (logprob - old).exp();
                (-pushed, -pushed, kl)
            }
            Self::PpoClip { low, high, kl } => {
                let ratio = (logprob - old).exp();
                let (free, bounded) = (advantage * ratio, advantage * ratio.clamp(1.0 - low, 1.0 + high));
                // Inside the bounds both are the same; a ratio that is not a number must not be passed over.
                if bounded < free { (-bounded, 0.0, kl) } else { (-free, -free, kl) }
            }
        };
        if kl == 0.0 {
            return (loss, slope);
        }
        (loss + kl * k3(reference, logprob), slope + kl * (1.0 - (reference - logprob).exp()))
    }

    /// Whether the bounds keep this token from changing anything.
    pub fn is_clipped(self, logprob: f32, token: PolicyToken) -> bool {
        let Self::PpoClip { low, high, .. } = self else { return false };
        let ratio = (logprob - token.old).exp();
        (token.advantage > 0.0 && ratio > 1.0 + high) || (token.advantage < 0.0 && ratio < 1.0 - low)
    }
}

/// What some tokens of a policy came to, as the loss met them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyFigures {
    /// Tokens.
    pub tokens: u64,
    /// Those that [`TokenLoss::is_clipped`] keeps from changing anything.
    pub clipped: u64,
    /// Σ k3 to the reference; 0 where the loss has no KL penalty.
    pub kl_sum: f64,
    /// Σ entropy of the distribution at each token, in nats.
    pub entropy_sum: f64,
    /// Σ p / p_old.
    pub ratio_sum: f64,
    /// The smallest ratio.
    pub ratio_min: f32,
    /// The largest.
    pub ratio_max: f32,
}

impl Default for PolicyFigures {
    fn default() -> Self {
        Self {
            tokens: 0,
            clipped: 0,
            kl_sum: 0.0,
            entropy_sum: 0.0,
            ratio_sum: 0.0,
            ratio_min: f32::INFINITY,
            ratio_max: f32::NEG_INFINITY,
        }
    }
}

impl PolicyFigures {
    /// Takes a token into account.
    pub(crate) fn note(&mut self, loss: TokenLoss, logprob: f32, token: PolicyToken, entropy: f32) {
        let ratio = (logprob - token.old).exp();
        self.tokens += 1;
        self.clipped += u64::from(loss.is_clipped(logprob, token));
        if let TokenLoss::ImportanceSampling { kl } | TokenLoss::PpoClip { kl, .. } = loss
            && kl != 0.0
        {
            self.kl_sum += f64::from(k3(token.reference, logprob));
        }
        self.entropy_sum += f64::from(entropy);
        self.ratio_sum += f64::from(ratio);
        self.ratio_min = self.ratio_min.min(ratio);
        self.ratio_max = self.ratio_max.max(ratio);
    }

    /// Adds those of other tokens.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.clipped += other.clipped;
        self.kl_sum += other.kl_sum;
        self.entropy_sum += other.entropy_sum;
        self.ratio_sum += other.ratio_sum;
        self.ratio_min = self.ratio_min.min(other.ratio_min);
        self.ratio_max = self.ratio_max.max(other.ratio_max);
    }

    /// A sum over the tokens as their mean; 0 without any.
    pub fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }

    /// How far the ratio that is farthest from 1 is away from it; 0 without any.
    pub fn ratio_error(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { f64::from((1.0 - self.ratio_min).max(self.ratio_max - 1.0)) }
    }
}

/// The estimator k3 of the KL divergence to a reference, from one token: never negative.
pub fn k3(reference: f32, logprob: f32) -> f32 {
    let d = reference - logprob;
    d.exp() - d - 1.0
}

/// Direct preference optimisation (Rafailov et al. 2023), a pair of answers: the loss -ln σ(z) with
/// z = beta · ((ln p_w - ln ref_w) - (ln p_l - ln ref_l)), sums over all tokens of the better (w) and of the worse
/// answer (l). Second is the weight with which cross-entropy over the better answer's tokens, and its negative over
/// the worse one's, has the same gradient: beta · σ(-z).
pub fn dpo(beta: f64, better: (f64, f64), worse: (f64, f64)) -> (f64, f64) {
    let z = beta * ((better.0 - better.1) - (worse.0 - worse.1));
    // ln(1 + exp(-z)) without overflow.
    let loss = (-z).max(0.0) + (-z.abs()).exp().ln_1p();
    (loss, beta / (1.0 + z.exp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOSSES: [TokenLoss; 5] = [
        TokenLoss::CrossEntropy,
        TokenLoss::ImportanceSampling { kl: 0.0 },
        TokenLoss::ImportanceSampling { kl: 0.3 },
        TokenLoss::PpoClip { low: 0.2, high: 0.4, kl: 0.0 },
        TokenLoss::PpoClip { low: 0.2, high: 0.4, kl: 0.3 },
    ];

    #[test]
    fn slopes_are_the_derivatives() {
        for loss in LOSSES {
            for advantage in [-1.5, 0.0, 0.7] {
                // Ratios on both sides of both bounds, none on one.
                for logprob in [-3.0, -2.1, -2.0, -1.9, -1.0] {
                    let token = PolicyToken { old: -2.0, advantage, reference: -1.7 };
                    let (step, slope) = (1e-2, loss.at(logprob, token).1);
                    let measured =
                        (loss.at(logprob + step, token).0 - loss.at(logprob - step, token).0) / (2.0 * step);
                    assert!(
                        (slope - measured).abs() < 1e-3 * (1.0 + slope.abs()),
                        "{loss:?} {token:?} {logprob}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_clipped_token_changes_nothing_and_only_that_one() {
        let loss = TokenLoss::PpoClip { low: 0.2, high: 0.4, kl: 0.0 };
        let clipped = |ratio: f32, advantage: f32| {
            let token = PolicyToken { old: -2.0, advantage, reference: 0.0 };
            let logprob = -2.0 + ratio.ln();
            let is = loss.is_clipped(logprob, token);
            assert_eq!(is, advantage != 0.0 && loss.at(logprob, token).1 == 0.0, "{ratio} {advantage}");
            is
        };
        assert!(clipped(1.5, 1.0) && clipped(0.7, -1.0));
        assert!(!clipped(1.3, 1.0) && !clipped(0.7, 1.0) && !clipped(1.5, -1.0) && !clipped(0.9, -1.0));
        assert!(!clipped(2.0, 0.0) && !TokenLoss::CrossEntropy.is_clipped(0.0, PolicyToken::default()));
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let token = PolicyToken { old: f32::NAN, advantage: 1.0, reference: -1.0 };
        for loss in &LOSSES[1..] {
            assert!(loss.at(-1.0, token).1.is_nan(), "{loss:?}");
        }
    }

    #[test]
    fn the_divergence_is_0_at_the_reference_and_above_it_elsewhere() {
        assert_eq!(k3(-1.0, -1.0), 0.0);
        assert!(k3(-1.0, -2.0) > 0.0 && k3(-2.0, -1.0) > 0.0);
    }

    #[test]
    fn preferences_push_apart_and_less_where_they_are_apart() {
        let (loss, weight) = dpo(0.5, (-3.0, -3.0), (-4.0, -4.0));
        assert!((loss - std::f64::consts::LN_2).abs() < 1e-12 && (weight - 0.25).abs() < 1e-12);
        let (step, at) = (1e-6, |w: f64| dpo(0.5, (w, -3.0), (-5.0, -4.0)));
        let measured = (at(-2.0 + step).0 - at(-2.0 - step).0) / (2.0 * step);
        assert!((measured + at(-2.0).1).abs() < 1e-8, "{measured}");
        for z in [1e4, -1e4] {
            let (loss, weight) = dpo(1.0, (z, 0.0), (0.0, 0.0));
            assert!(loss.is_finite() && weight.is_finite() && loss >= 0.0, "{z}");
        }
    }
}

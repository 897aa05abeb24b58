//! How much better than its group an answer was, and how much each of its tokens counts. Pure numbers.

/// Rewards closer to each other than this tell nothing.
const SAME: f64 = 1e-9;

/// Added to the spread, so that a group of nearly equal rewards does not blow up (as TRL has it).
const EPS: f64 = 1e-4;

/// Advantages of a group of answers to one prompt; `None` when their rewards are equal or fewer than two, so that
/// nothing can be learnt from them.
///
/// A = (reward - mean) / (std + 1e-4), std with n - 1 (GRPO, Shao et al. 2024); `unbiased` leaves out the division,
/// which would weigh prompts by how hard they are (Dr. GRPO, Liu et al. 2025).
pub(super) fn of_group(rewards: &[f64], unbiased: bool) -> Option<Vec<f64>> {
    let count = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / count;
    if rewards.len() < 2 || rewards.iter().all(|reward| (reward - mean).abs() < SAME) {
        return None;
    }
    let spread = match unbiased {
        true => 1.0,
        false => spread(rewards) + EPS,
    };
    Some(rewards.iter().map(|reward| (reward - mean) / spread).collect())
}

/// The standard deviation with n - 1; 0 for fewer than two.
pub(super) fn spread(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0)).sqrt()
}

/// What each token of an answer counts, where each answer counts 1: one over its length, or with `unbiased` one over
/// the longest that it could have been, which does not favour short good and long bad answers (Dr. GRPO).
pub(super) fn token_weight(tokens: usize, max_new_tokens: usize, unbiased: bool) -> f32 {
    1.0 / if unbiased { max_new_tokens } else { tokens }.max(1) as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn they_are_those_of_the_papers() {
        let close = |found: Option<Vec<f64>>, wanted: &[f64]| {
            let found = found.expect("there is a signal");
            assert!(found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 1e-9), "{found:?} {wanted:?}");
        };
        // std of 0, 0, 1 with n - 1 is sqrt(1/3).
        let std = (1.0f64 / 3.0).sqrt() + 1e-4;
        close(of_group(&[0.0, 0.0, 1.0], false), &[-1.0 / 3.0 / std, -1.0 / 3.0 / std, 2.0 / 3.0 / std]);
        close(of_group(&[0.0, 0.0, 1.0], true), &[-1.0 / 3.0, -1.0 / 3.0, 2.0 / 3.0]);
    }

    #[test]
    fn equal_rewards_tell_nothing() {
        for rewards in [&[0.3, 0.3, 0.3][..], &[1.0], &[]] {
            assert_eq!(of_group(rewards, false), None);
            assert_eq!(of_group(rewards, true), None);
        }
    }

    #[test]
    fn tokens_count_by_their_answers_length_or_all_alike() {
        assert_eq!(token_weight(4, 64, false), 0.25);
        assert_eq!(token_weight(4, 64, true), 1.0 / 64.0);
    }

    proptest! {
        #[test]
        fn they_sum_to_0_and_keep_the_order(rewards in prop::collection::vec(0.0f64..1.0, 2..20), unbiased: bool) {
            if let Some(advantages) = of_group(&rewards, unbiased) {
                prop_assert!(advantages.iter().all(|a| a.is_finite()));
                prop_assert!(advantages.iter().sum::<f64>().abs() < 1e-6);
                for i in 1..rewards.len() {
                    prop_assert_eq!(rewards[i] > rewards[i - 1], advantages[i] > advantages[i - 1]);
                }
            }
        }
    }
}

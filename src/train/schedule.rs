//! The learning rate of a step, by the formulas of transformers' `get_*_schedule_with_warmup`. Pure numbers.

use crate::config::adapter::Scheduler;

/// How the learning rate moves over a job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// What it does after the warm-up.
    pub kind: Scheduler,
    /// Its highest value.
    pub peak: f64,
    /// Share of all steps that warm up, 0 to 1.
    pub warmup_ratio: f64,
}

impl Schedule {
    /// The rate of the step that follows `taken` steps, of `total` in all. As in transformers the first step of
    /// a warm-up has the rate 0.
    pub fn at(&self, taken: u64, total: u64) -> f64 {
        let warmup = (total as f64 * self.warmup_ratio).ceil() as u64;
        if taken < warmup {
            return self.peak * taken as f64 / warmup as f64;
        }
        let progress = (taken - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        let share = match self.kind {
            Scheduler::Constant => 1.0,
            Scheduler::Linear => 1.0 - progress,
            Scheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.peak * share.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: Scheduler, warmup_ratio: f64) -> Vec<f64> {
        let schedule = Schedule { kind, peak: 10.0, warmup_ratio };
        (0..10).map(|taken| schedule.at(taken, 10)).collect()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-12, "{found:?} is not {expected:?}");
        }
    }

    // The lists are what transformers 5.23 gives for a rate of 10 and 10 steps.

    #[test]
    fn linear() {
        let expected = [0.0, 5.0, 10.0, 8.75, 7.5, 6.25, 5.0, 3.75, 2.5, 1.25];
        assert_close(&rates(Scheduler::Linear, 0.2), &expected);
        assert_close(&rates(Scheduler::Linear, 0.0), &[10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]);
    }

    #[test]
    fn cosine() {
        let expected = [
            0.0,
            5.0,
            10.0,
            9.619397662556434,
            8.535533905932738,
            6.91341716182545,
            5.0,
            3.086582838174551,
            1.4644660940672627,
            0.3806023374435663,
        ];
        assert_close(&rates(Scheduler::Cosine, 0.2), &expected);
    }

    #[test]
    fn constant() {
        assert_close(&rates(Scheduler::Constant, 0.0), &[10.0; 10]);
        let expected = [0.0, 10.0 / 3.0, 20.0 / 3.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0];
        // A share is rounded up to whole steps: 2.5 of 10 are 3.
        assert_close(&rates(Scheduler::Constant, 0.25), &expected);
    }

    #[test]
    fn lengths_at_the_edge_give_finite_rates() {
        for kind in [Scheduler::Linear, Scheduler::Cosine, Scheduler::Constant] {
            for warmup_ratio in [0.0, 0.5, 1.0] {
                let schedule = Schedule { kind, peak: 1.0, warmup_ratio };
                for (taken, total) in [(0, 0), (5, 0), (0, 1), (1, 1), (9, 3), (u64::MAX, 3)] {
                    let rate = schedule.at(taken, total);
                    assert!((0.0..=1.0).contains(&rate), "{kind:?} {warmup_ratio} {taken}/{total}: {rate}");
                }
            }
        }
    }
}

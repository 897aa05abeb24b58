//! Tests of [`super`]'s reckoning. Whole jobs run in `tests/train.rs`.

use super::*;

fn config() -> AdapterConfig {
    AdapterConfig { batch_size: 4, gradient_accumulation_steps: 2, epochs: 3, ..AdapterConfig::default() }
}

#[test]
fn steps_are_counted_epoch_by_epoch() {
    let steps = |examples| total_steps(&config(), Planned { examples, exact: true });
    // The last step of an epoch takes what is left of it.
    assert_eq!([1, 8, 9, 16, 17].map(steps), [3, 3, 6, 6, 9]);
    let limited = AdapterConfig { max_steps: Some(5), ..config() };
    assert_eq!(total_steps(&limited, Planned { examples: 1000, exact: false }), 5);
    let endless = AdapterConfig { epochs: u64::MAX, ..config() };
    assert_eq!(total_steps(&endless, Planned { examples: 1000, exact: false }), u64::MAX);
}

#[test]
fn things_are_due_after_every_so_many_steps() {
    let after = |every| (0..=6).filter(|&step| due(every, step)).collect::<Vec<_>>();
    assert_eq!(after(0), [0; 0]);
    assert_eq!(after(1), [1, 2, 3, 4, 5, 6]);
    assert_eq!(after(3), [3, 6]);
}

#[test]
fn speed_is_that_of_the_latest_steps() {
    let mut pace = Pace::new();
    let mut progress = Progress { step: 1, total_steps: 11, ..Progress::default() };
    for _ in 0..WINDOW + 5 {
        pace.begun = Instant::now() - Duration::from_secs(2);
        pace.end(100, &mut progress);
    }
    assert_eq!(pace.steps.len(), WINDOW);
    assert!((progress.tokens_per_s - 50.0).abs() < 1.0, "{}", progress.tokens_per_s);
    assert!((progress.eta_s - 20.0).abs() < 1.0, "{}", progress.eta_s);
}

#[test]
fn a_skipped_step_says_so() {
    let progress = Progress { step: 3, total_steps: 9, ..Progress::default() };
    let line = step_line(&progress, f64::NAN, true);
    assert!(line.contains("3/9") && line.contains("skipped") && line.contains("NaN"), "{line}");
    assert!(step_line(&progress, 0.5, false).contains("loss 0.5000"));
}

//! What running jobs tell of themselves.

use super::{TRAINING_LOSS, TRAINING_RATE, TRAINING_STEP, TRAINING_STEPS};

/// A job that runs; what is not known yet is not shown.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningJob {
    /// Name of the adapter that it makes.
    pub adapter: String,
    /// Tokens a second over its latest steps.
    pub tokens_per_s: Option<f64>,
    /// Steps taken.
    pub step: Option<f64>,
    /// Steps in all.
    pub total_steps: Option<f64>,
    /// Mean loss a supervised token in the latest step.
    pub loss: Option<f64>,
}

/// Prometheus text about the jobs that run. It does not go through the recorder, which never forgets a label: every
/// adapter that was ever trained would stay.
pub fn running_jobs(jobs: &[RunningJob]) -> String {
    let mut text = String::new();
    let mut show = |name: &str, help: &str, figure: fn(&RunningJob) -> Option<f64>| {
        let known: Vec<_> = jobs.iter().filter_map(|job| Some((job, figure(job)?))).collect();
        if known.is_empty() {
            return;
        }
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        for (job, value) in known {
            // The rule of adapters' names leaves nothing to escape.
            text.push_str(&format!("{name}{{adapter=\"{}\"}} {value}\n", job.adapter));
        }
        text.push('\n');
    };
    show(TRAINING_RATE, "Tokens a second over the latest steps of a running job", |job| job.tokens_per_s);
    show(TRAINING_STEP, "Steps that a running job has taken", |job| job.step);
    show(TRAINING_STEPS, "Steps that a running job will take", |job| job.total_steps);
    show(TRAINING_LOSS, "Mean loss a supervised token in the latest step of a running job", |job| job.loss);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_jobs_are_shown_while_they_run() {
        let running = RunningJob {
            adapter: "hindi-v2".into(),
            tokens_per_s: Some(119.5),
            step: Some(7.0),
            total_steps: Some(100.0),
            loss: None,
        };
        let text =
            running_jobs(&[running.clone(), RunningJob { adapter: "b".into(), step: None, ..running }]);
        assert!(text.contains("# TYPE gurukul_training_tokens_per_second gauge\n"), "{text}");
        assert!(
            text.contains("\ngurukul_training_tokens_per_second{adapter=\"hindi-v2\"} 119.5\n"),
            "{text}"
        );
        assert!(text.contains("\ngurukul_training_step{adapter=\"hindi-v2\"} 7\n"), "{text}");
        assert!(!text.contains("step{adapter=\"b\"}") && !text.contains("loss"), "{text}");
        assert_eq!(running_jobs(&[]), "");
    }
}

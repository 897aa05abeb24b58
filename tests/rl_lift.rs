//! The example `rl_lift`, shorter: rewards alone lift the demo model on a task that it does badly.

#[path = "../examples/rl_lift/task.rs"]
mod task;

use gurukul::config::rl::RlTrainConfig;

#[tokio::test]
async fn rewards_lift_the_demo_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = RlTrainConfig { steps: 16, max_eval_prompts: 24, eval_steps: 0, ..task::settings() };
    let curve = task::lift(&task::assets(), folder.path(), config, |_| ()).await.unwrap();
    assert_eq!((curve.held_out.len(), curve.sampled.len()), (2, 16), "{curve:?}");
    // Sums may differ in their last digits from machine to machine, and so may the answers; the lift is larger.
    assert!(curve.lift() > 0.25, "{curve:?}");
    assert!(curve.ratio_error < 1e-3, "what samples is what learns: {}", curve.ratio_error);
    assert!(folder.path().join("adapters/devanagari/adapter_model.safetensors").is_file());
}

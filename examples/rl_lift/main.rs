//! Lifts the demo model by reinforcement learning on a task that it does badly, prints the curve and draws it to
//! `docs/rl_lift.svg`: `cargo run --release --example rl_lift`.
#![expect(clippy::print_stdout, reason = "the example's own output")]

mod draw;
mod task;

use anyhow::{Result, ensure};

/// The least lift that counts.
const LIFT: f64 = 0.25;

#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let began = std::time::Instant::now();
    let curve =
        task::lift(&task::assets(), folder.path(), task::settings(), |line| println!("{line}")).await?;
    println!("\nstep   held-out reward");
    for (step, reward) in &curve.held_out {
        println!("{step:>4}   {reward:.4} {}", "#".repeat((reward * 60.0) as usize));
    }
    println!(
        "\nlift {:.4} in {:.0} s; farthest importance ratio before an update {:.1e} from 1",
        curve.lift(),
        began.elapsed().as_secs_f64(),
        curve.ratio_error
    );
    let target = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/rl_lift.svg");
    std::fs::write(&target, draw::svg(&curve.sampled, &curve.held_out))?;
    println!("drawn to {}", target.display());
    ensure!(curve.lift() >= LIFT, "the held-out reward rose by {:.4}, less than {LIFT}", curve.lift());
    Ok(())
}

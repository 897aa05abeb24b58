//! `gurukul serve`: runs the application until a signal ends it.

use std::time::Duration;

use crate::app;
use crate::config::Settings;

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let runtime = super::runtime()?;
    let app = runtime.block_on(app::App::build(settings))?;
    let engine = app.engine();
    let outcome = runtime.block_on(async { app.run(app::stop_signal()?).await });
    // Connections that outlived the grace period end here, and with them their requests: the engine then has
    // nothing left to wait for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    engine.shutdown();
    outcome
}

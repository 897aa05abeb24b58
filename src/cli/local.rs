//! A server in this process for a sub-command that measures one: on a free loopback port, with a data folder of its
//! own, gone when the work is done. Knows nothing of the work.

use std::future::Future;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;

use crate::app::{App, CannotStart};
use crate::config::Settings;

/// Builds the server, does the work with it, and takes it down. The adapters are those of the settings.
///
/// # Errors
/// What [`App::build`] refuses, no temporary folder, and what the work reports.
pub(super) fn with_app<T>(
    runtime: tokio::runtime::Runtime,
    mut settings: Settings,
    work: impl AsyncFnOnce(App) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    // A free port: the work must not meet a server that runs already.
    (settings.host, settings.port) = (Ipv4Addr::LOCALHOST.into(), 0);
    // And a folder of its own: that server's jobs are not to run in here, and it holds its folder alone.
    let folder = std::env::temp_dir().join(format!("gurukul-{}", uuid::Uuid::new_v4()));
    std::fs::create_dir(&folder).context("no temporary folder for the server").context(CannotStart)?;
    settings.data_dir = folder.clone();
    let outcome = runtime.block_on(App::build(&settings)).and_then(|app| {
        let engine = app.engine();
        let outcome = runtime.block_on(work(app));
        runtime.shutdown_timeout(Duration::from_secs(1));
        engine.shutdown();
        outcome
    });
    // What stays behind is for the system to clear.
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

/// Answers requests until `work` is through.
///
/// # Errors
/// What the work or the server reports.
pub(super) async fn serve_meanwhile<T>(
    app: App,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    // A dropped sender stops the server as well; it is never asked twice.
    let server = tokio::spawn(app.run(stopped.map(|_| std::future::pending::<()>())));
    let outcome = work.await;
    drop(stop);
    server.await.context("the server panicked")??;
    outcome
}

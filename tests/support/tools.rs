//! Where the repository is, and which programs are on this machine. It must not know what any test runs.

use std::path::Path;
use std::process::{Command, Stdio};

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether all of these tools are on this machine. Where the tests of other languages' clients run, they must be.
#[expect(clippy::print_stderr, reason = "a test that skips says so")]
pub(crate) fn has_tools(tools: &[&str]) -> bool {
    tools.iter().all(|tool| {
        let found = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err() {
            assert!(std::env::var_os("GURUKUL_TEST_PYTHON").is_none(), "{tool} must be there in CI");
            eprintln!("skipped: {tool} is not installed");
        }
        found.is_ok()
    })
}

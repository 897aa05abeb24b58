//! The binary as `gurukul serve` in a scratch copy of the repository: `configs/` and `assets/` as they are shipped, a
//! data folder and a port of its own, the demo model. It must not know what any test asks it.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use super::program::gurukul;
use super::tools::root;

/// A running server, killed when the test ends.
pub(crate) struct Served {
    /// `http://127.0.0.1:PORT`
    pub(crate) url: String,
    child: Child,
    place: tempfile::TempDir,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    /// Starts a server and waits until it listens.
    pub(crate) fn start() -> Self {
        let place = tempfile::tempdir().unwrap();
        for folder in ["assets", "configs", "docs", "scripts", "test_prompts"] {
            std::os::unix::fs::symlink(root().join(folder), place.path().join(folder)).unwrap();
        }
        let mut command = gurukul(place.path());
        command.args(["serve", "--port", "0"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = String::new();
        let url = loop {
            let line = lines.next().unwrap_or_else(|| panic!("the server ended: {seen}")).unwrap();
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split_whitespace().next().unwrap().to_owned();
            }
            seen += &line;
        };
        // Somebody has to read on, or the pipe fills.
        std::thread::spawn(move || lines.for_each(drop));
        Self { url, child, place }
    }

    /// The folder that it runs in, which is its data folder too.
    pub(crate) fn place(&self) -> PathBuf {
        self.place.path().to_owned()
    }
}

//! The outbox on real files, with folders as sinks: what is kept, what goes, what a restart and a refusal change.

use super::*;
use crate::config::rl::RlConfig;
use crate::jobs::{self, Jobs};

const SOON: Duration = Duration::from_secs(20);
const QUICK: Patience =
    Patience { first: Duration::from_millis(5), longest: Duration::from_millis(40), at_once: 4 };

/// An outbox with its store, as an application has them.
struct Open {
    jobs: Jobs,
    outbox: Outbox,
}

impl Open {
    /// The sinks `nas` and `other` are the folders of these names in `dir`.
    async fn in_folder(dir: &Path) -> Self {
        let sinks = format!(
            "default_sink: nas\nsinks:\n  nas: {{type: folder, path: {0}/nas, key: '{{run_id}}/{{sha256}}'}}\n  other: \
             {{type: folder, path: {0}/other}}\n",
            dir.display()
        );
        Self::with(dir, &sinks).await
    }

    async fn with(dir: &Path, yaml: &str) -> Self {
        let configs = dir.join("configs");
        fs::create_dir_all(&configs).unwrap();
        fs::write(configs.join("rl_config.yaml"), yaml).unwrap();
        let sinks = RlConfig::load(&configs, None).unwrap().sinks;
        let settings = jobs::Settings { data_dir: dir.to_owned(), max_parallel: 1, keep_ended: 1 };
        // Tasks that were cut let go of the folder when the runtime gets to them.
        let open = async {
            loop {
                match Jobs::open(settings.clone()).await {
                    Ok(jobs) => return jobs,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let jobs = tokio::time::timeout(SOON, open).await.expect("the store can be opened");
        let outbox = Outbox::open(dir, jobs.promises(), sinks, QUICK).await.unwrap();
        Self { jobs, outbox }
    }

    async fn promise(&self, sink: Option<&str>, lines: &str) -> String {
        let to = self.outbox.destination(sink).unwrap();
        self.outbox.promise(&to, "run-1", Content::Lines(lines.into())).await.unwrap()
    }

    async fn reach(&self, id: &str, state: PromiseState) -> Promise {
        let wait = async {
            loop {
                let promise = self.outbox.get(id).await.unwrap();
                if promise.state == state {
                    return promise;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{id} does not become {state:?}"))
    }

    /// Waits until an attempt did not succeed.
    async fn stumble(&self, id: &str) -> Promise {
        let wait = async {
            loop {
                let promise = self.outbox.get(id).await.unwrap();
                if promise.attempts > 0 {
                    return promise;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(SOON, wait).await.expect("it is tried")
    }

    async fn close(self) {
        self.outbox.shutdown(SOON).await;
        self.jobs.close().await;
    }
}

fn sealed(dir: &Path) -> usize {
    entries(&dir.join("rl_runs/outbox")).unwrap().len()
}

fn make(dir: &Path, name: &str) {
    fs::create_dir(dir.join(name)).unwrap();
}

fn delivered(dir: &Path, sink: &str) -> Vec<String> {
    let folder = dir.join(sink).join("run-1");
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut contents: Vec<String> =
        entries.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap()).collect();
    contents.sort();
    contents
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promise_is_on_disk_before_it_is_given_and_goes_when_it_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "nas");
    let open = Open::in_folder(dir.path()).await;
    let id = open.promise(None, "{\"a\":1}\n").await;
    let promise = open.outbox.get(&id).await.unwrap();
    assert_eq!((promise.state, promise.sink.as_str(), promise.bytes), (PromiseState::Pending, "nas", 8));
    assert_eq!(promise.key, format!("run-1/{}", promise.sha256));
    let file = dir.path().join("rl_runs/outbox").join(format!("{}.jsonl", promise.sha256));
    assert_eq!(fs::read_to_string(file).unwrap(), "{\"a\":1}\n");
    assert!(delivered(dir.path(), "nas").is_empty(), "nothing is delivered before the start");
    open.outbox.start();
    let done = open.reach(&id, PromiseState::Done).await;
    assert!(done.ended_ms.is_some() && done.error.is_none());
    assert_eq!(delivered(dir.path(), "nas"), ["{\"a\":1}\n"]);
    assert_eq!(open.outbox.settle(SOON).await.unwrap().done, 1);
    open.close().await;
    assert_eq!(sealed(dir.path()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_is_down_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "other");
    let open = Open::in_folder(dir.path()).await;
    open.outbox.start();
    let mut waiting = Vec::new();
    for i in 0..30 {
        waiting.push(open.promise(Some("nas"), &format!("{i}\n")).await);
    }
    // The same content for a sink that is well: its file stays for the other one.
    let well = open.promise(Some("other"), "0\n").await;
    open.reach(&well, PromiseState::Done).await;
    let stumbled = open.stumble(&waiting[0]).await;
    assert!(stumbled.error.is_some_and(|error| error.contains("mount or make it")));
    let counts = open.outbox.settle(Duration::from_millis(50)).await.unwrap();
    assert_eq!((counts.pending, counts.done, counts.failed), (30, 1, 0), "waiting has its end");
    assert!(counts.oldest_pending_ms.is_some());
    assert_eq!(sealed(dir.path()), 30);
    make(dir.path(), "nas");
    let counts = open.outbox.settle(SOON).await.unwrap();
    assert_eq!((counts.pending, counts.done), (0, 31));
    assert_eq!(delivered(dir.path(), "nas").len(), 30);
    open.close().await;
    assert_eq!(sealed(dir.path()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_promised_outlives_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let open = Open::in_folder(dir.path()).await;
    open.outbox.start();
    let ids = [open.promise(None, "1\n").await, open.promise(None, "2\n").await];
    open.stumble(&ids[1]).await;
    // The lock of the folder goes with the handles; no end is told.
    open.outbox.shutdown(Duration::ZERO).await;
    drop(open);
    // What crashes leave beside, and what is not ours.
    let folder = dir.path().join("rl_runs/outbox");
    let orphan = folder.join(format!("{}.jsonl", "ab".repeat(32)));
    for left in [&orphan, &folder.join(".writing-x"), &folder.join("notes.txt")] {
        fs::write(left, "x").unwrap();
    }
    make(dir.path(), "nas");
    let open = Open::in_folder(dir.path()).await;
    assert!(!orphan.exists() && !folder.join(".writing-x").exists() && folder.join("notes.txt").exists());
    open.outbox.start();
    for id in &ids {
        open.reach(id, PromiseState::Done).await;
    }
    assert_eq!(delivered(dir.path(), "nas"), ["1\n", "2\n"]);
    open.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_kept_and_tried_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let open = Open::in_folder(dir.path()).await;
    let id = open.promise(None, "1\n").await;
    let key = open.outbox.get(&id).await.unwrap().key;
    let taken = dir.path().join("nas").join(&key);
    fs::create_dir_all(taken.parent().unwrap()).unwrap();
    fs::write(&taken, "another\n").unwrap();
    open.outbox.start();
    let failed = open.reach(&id, PromiseState::Failed).await;
    assert!(failed.error.is_some_and(|error| error.contains("something else")));
    let counts = open.outbox.settle(SOON).await.unwrap();
    assert_eq!((counts.failed, sealed(dir.path())), (1, 1));
    let failed = open.outbox.list(Some(PromiseState::Failed), None, 10).await.unwrap();
    assert_eq!(failed.len(), 1);
    fs::remove_file(&taken).unwrap();
    open.outbox.retry(&id).await.unwrap();
    open.reach(&id, PromiseState::Done).await;
    assert_eq!(fs::read_to_string(&taken).unwrap(), "1\n");
    let error = open.outbox.retry(&id).await.unwrap_err().to_string();
    assert!(error.contains(&id) && error.contains("done"), "{error}");
    assert!(open.outbox.retry("x").await.is_err());
    open.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_is_no_longer_configured_waits_for_its_return() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "nas");
    let open = Open::in_folder(dir.path()).await;
    let named = open.promise(None, "1\n").await;
    // One that is in no file goes on without one.
    let made = Destination { is_ad_hoc: true, ..open.outbox.destination(None).unwrap() };
    let made = Destination { name: "made".into(), ..made };
    let made = open.outbox.promise(&made, "run-1", Content::Lines("2\n".into())).await.unwrap();
    open.close().await;
    let open = Open::with(dir.path(), "").await;
    let error = open.outbox.destination(Some("nas")).unwrap_err();
    assert_eq!(error.field, "sink");
    open.outbox.start();
    let failed = open.reach(&named, PromiseState::Failed).await;
    assert!(failed.error.is_some_and(|error| error.contains("nas") && error.contains("rl_config.yaml")));
    open.reach(&made, PromiseState::Done).await;
    open.close().await;
    let open = Open::in_folder(dir.path()).await;
    open.outbox.start();
    open.reach(&named, PromiseState::Done).await;
    assert_eq!(delivered(dir.path(), "nas"), ["1\n", "2\n"]);
    open.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_promises_at_once_are_all_kept() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "nas");
    let open = Open::in_folder(dir.path()).await;
    open.outbox.start();
    // Every content comes twice, while the first of it is being delivered or removed.
    let lines: Vec<String> = (0..200).map(|i| format!("{}\n", i / 2)).collect();
    let ids = futures::future::join_all(lines.iter().map(|line| open.promise(None, line))).await;
    let counts = open.outbox.settle(SOON).await.unwrap();
    assert_eq!((counts.pending, counts.done, counts.failed), (0, 200, 0));
    assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), 200);
    assert_eq!(delivered(dir.path(), "nas").len(), 100);
    open.close().await;
    assert_eq!(sealed(dir.path()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_promised_as_they_are_now() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "nas");
    let open = Open::in_folder(dir.path()).await;
    let log = dir.path().join("log.jsonl");
    fs::write(&log, "1\n").unwrap();
    let to = open.outbox.destination(None).unwrap();
    open.outbox.promise(&to, "run-1", Content::File(log.clone())).await.unwrap();
    fs::write(&log, "1\n2\n").unwrap();
    open.outbox.start();
    open.outbox.settle(SOON).await.unwrap();
    assert_eq!(delivered(dir.path(), "nas"), ["1\n"]);
    for (content, what) in [
        (Content::Lines(Vec::new()), "nothing to upload"),
        (Content::File(dir.path().join("gone")), "cannot be sealed"),
    ] {
        let error = open.outbox.promise(&to, "run-1", content).await.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    assert_eq!(sealed(dir.path()), 0, "nothing half-written stays");
    open.close().await;
}

/// A file system of 256 KiB, where this user may make one.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_promises_nothing_and_loses_nothing() {
    use std::process::Command;
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "nas");
    let folder = dir.path().join("rl_runs/outbox");
    fs::create_dir_all(&folder).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(&folder).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        let _ = writeln!(io::stderr(), "skipped: this user may not mount a small file system");
        return;
    }
    let test = async {
        let open = Open::in_folder(dir.path()).await;
        let small = open.promise(None, "small\n").await;
        let to = open.outbox.destination(None).unwrap();
        let large = || Content::Lines(vec![b'x'; 300 << 10]);
        let error = open.outbox.promise(&to, "run-1", large()).await.unwrap_err();
        let OutboxError::Seal { source, .. } = error else { panic!("{error}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        assert_eq!((sealed(dir.path()), open.outbox.counts().await.unwrap().pending), (1, 1));
        open.outbox.start();
        open.reach(&small, PromiseState::Done).await;
        // With room again it can be promised.
        let id = open.outbox.promise(&to, "run-1", Content::Lines(vec![b'x'; 100 << 10])).await.unwrap();
        open.reach(&id, PromiseState::Done).await;
        open.close().await;
    };
    let outcome = futures::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(test)).await;
    let unmount = Command::new("umount").arg(&folder).status();
    assert!(unmount.is_ok_and(|status| status.success()));
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

//! Tests of the runner with work that does what the test says, on a real store.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::super::lifecycle::JobState;
use super::*;

const SOON: Duration = Duration::from_secs(20);

fn settings(dir: &Path) -> Settings {
    Settings { data_dir: dir.to_owned(), max_parallel: 1, keep_ended: 100 }
}

fn new(name: &str) -> NewJob {
    let file = None;
    NewJob {
        kind: "test",
        name: name.into(),
        spec: json!({"name": name}),
        meta: Value::Null,
        plan: Value::Null,
        file,
    }
}

/// Work that is an asynchronous function of the handle.
fn work<F: Future<Output = Outcome> + Send + 'static>(
    work: impl Fn(JobHandle) -> F + Send + Sync + 'static,
) -> BTreeMap<&'static str, Work> {
    let work: Work = Arc::new(move |handle| work(handle).boxed());
    BTreeMap::from([("test", work)])
}

fn completed() -> Outcome {
    Outcome::Completed { result: json!(1), message: "done".into() }
}

/// Waits to be stopped, and says how.
async fn until_stopped(handle: JobHandle) -> Outcome {
    let mut stop = handle.stop();
    match *stop.wait_for(|stop| *stop != Stop::No).await.unwrap() {
        Stop::Cancel => Outcome::Cancelled("as asked".into()),
        _ => Outcome::Paused,
    }
}

async fn open(settings: Settings, kinds: BTreeMap<&'static str, Work>) -> Jobs {
    let jobs = Jobs::open(settings).await.unwrap();
    jobs.start(kinds).await.unwrap();
    jobs
}

async fn reach(jobs: &Jobs, id: &str, state: JobState) -> Job {
    let mut watch = jobs.watch(id);
    let wait = async {
        loop {
            let job = jobs.get(id).await.unwrap();
            if job.status == state {
                return job;
            }
            assert!(!job.status.has_ended(), "{id} is {:?} and not {state:?}: {:?}", job.status, job.error);
            watch.changed().await;
        }
    };
    tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{id} does not become {state:?}"))
}

#[tokio::test]
async fn jobs_run_in_order_and_leave_what_they_said() {
    let dir = tempfile::tempdir().unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let seen = order.clone();
    let kinds = work(move |handle| {
        seen.lock().unwrap().push(handle.spec()["name"].as_str().unwrap().to_owned());
        async move {
            for step in 1..=3 {
                handle.progress(step, step as f64 / 3.0, json!({"step": step}));
            }
            handle.log(Level::Warn, "almost".into());
            handle.checkpointed(3);
            completed()
        }
    });
    let jobs = open(settings(dir.path()), kinds).await;
    let mut ids = Vec::new();
    for name in ["c", "a", "b"] {
        ids.push(jobs.submit(new(name)).await.unwrap().id);
    }
    for id in &ids {
        let job = reach(&jobs, id, JobState::Completed).await;
        assert_eq!((job.result, job.checkpoint_step, job.fraction), (json!(1), Some(3), 1.0));
        assert_eq!(job.progress, json!({"step": 3}));
        // All that was said is there once the end is.
        assert_eq!(jobs.points(id, None, 10).await.unwrap().len(), 3);
        let (_, log) = jobs.log(id, 0, 10).await.unwrap();
        assert_eq!((log.lines[0].line.as_str(), log.lines[0].level), ("almost", Level::Warn));
    }
    assert_eq!(*order.lock().unwrap(), ["c", "a", "b"]);
}

#[tokio::test]
async fn no_more_run_at_once_than_may() {
    let dir = tempfile::tempdir().unwrap();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (n, m) = (now.clone(), most.clone());
    let kinds = work(move |_| {
        let (now, most) = (n.clone(), m.clone());
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(30)).await;
            now.fetch_sub(1, Ordering::SeqCst);
            completed()
        }
    });
    let jobs = open(Settings { max_parallel: 3, ..settings(dir.path()) }, kinds).await;
    let mut ids = Vec::new();
    for i in 0..9 {
        ids.push(jobs.submit(new(&format!("{i}"))).await.unwrap().id);
    }
    for id in &ids {
        reach(&jobs, id, JobState::Completed).await;
    }
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_panic_fails_its_job_alone() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = work(|handle| async move {
        assert!(handle.spec()["name"] != "bad", "the number {} is odd", 7);
        completed()
    });
    let jobs = open(settings(dir.path()), kinds).await;
    let bad = jobs.submit(new("bad")).await.unwrap().id;
    let good = jobs.submit(new("good")).await.unwrap().id;
    let job = reach(&jobs, &bad, JobState::Failed).await;
    assert!(job.error.as_deref().unwrap().contains("panicked: the number 7 is odd"), "{:?}", job.error);
    reach(&jobs, &good, JobState::Completed).await;
    jobs.resume(&bad).await.unwrap();
    reach(&jobs, &bad, JobState::Failed).await;
}

#[tokio::test]
async fn a_kind_that_is_not_known_fails_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), BTreeMap::new()).await;
    let id = jobs.submit(new("a")).await.unwrap().id;
    let job = reach(&jobs, &id, JobState::Failed).await;
    assert!(job.error.as_deref().unwrap().contains("\"test\""), "{:?}", job.error);
}

#[tokio::test]
async fn cancelling_ends_what_runs_and_what_waits() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), work(until_stopped)).await;
    let runs = jobs.submit(new("runs")).await.unwrap().id;
    let waits = jobs.submit(new("waits")).await.unwrap().id;
    reach(&jobs, &runs, JobState::Running).await;
    assert_eq!(jobs.cancel(&waits).await.unwrap().status, JobState::Cancelled);
    let asked = jobs.cancel(&runs).await.unwrap();
    assert!(asked.cancel_requested);
    assert_eq!(reach(&jobs, &runs, JobState::Cancelled).await.message, "as asked");
    for id in [&runs, &waits] {
        assert!(matches!(jobs.cancel(id).await, Err(JobsError::WrongState { .. })));
    }
    // Cancelled before its turn, it never ran; resumed, it does.
    jobs.resume(&waits).await.unwrap();
    reach(&jobs, &waits, JobState::Running).await;
    for strange in ["", "..", "0190a000-0000-7000-8000-000000000000", "x' OR 1=1 --"] {
        assert!(matches!(jobs.cancel(strange).await, Err(JobsError::NotFound { .. })), "{strange}");
    }
}

#[tokio::test]
async fn a_shutdown_pauses_and_the_next_start_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = work(|handle| async move {
        handle.progress(1, 0.5, json!({"step": 1}));
        handle.checkpointed(1);
        until_stopped(handle).await
    });
    let jobs = open(settings(dir.path()), kinds).await;
    let runs = jobs.submit(new("runs")).await.unwrap().id;
    let waits = jobs.submit(new("waits")).await.unwrap().id;
    reach(&jobs, &runs, JobState::Running).await;
    let mut watch = jobs.watch(&waits);
    tokio::time::timeout(SOON, jobs.shutdown(SOON)).await.expect("ends as soon as the job paused");
    assert!(!watch.changed().await, "whoever follows a job learns that the process ends");
    assert!(matches!(jobs.submit(new("late")).await, Err(JobsError::Stopping)));
    let job = jobs.get(&runs).await.unwrap();
    assert_eq!(
        (job.status, job.checkpoint_step),
        (JobState::Running, Some(1)),
        "what it said last is stored"
    );
    jobs.close().await;
    assert!(matches!(jobs.get(&runs).await, Err(JobsError::Store(_))));
    drop(jobs);

    let jobs = open(settings(dir.path()), work(|_| async { completed() })).await;
    reach(&jobs, &runs, JobState::Completed).await;
    reach(&jobs, &waits, JobState::Completed).await;
}

#[tokio::test]
async fn a_job_that_does_not_pause_is_cut_and_goes_on_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), work(|_| std::future::pending())).await;
    let id = jobs.submit(new("deaf")).await.unwrap().id;
    reach(&jobs, &id, JobState::Running).await;
    tokio::time::timeout(SOON, jobs.shutdown(Duration::from_millis(50)))
        .await
        .expect("does not wait for ever");
    jobs.close().await;
    drop(jobs);
    let jobs = open(settings(dir.path()), work(|_| async { completed() })).await;
    reach(&jobs, &id, JobState::Completed).await;
}

#[tokio::test]
async fn a_cancel_that_a_crash_interrupted_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), work(|_| std::future::pending())).await;
    let id = jobs.submit(new("deaf")).await.unwrap().id;
    reach(&jobs, &id, JobState::Running).await;
    jobs.cancel(&id).await.unwrap();
    jobs.shutdown(Duration::from_millis(50)).await;
    jobs.close().await;
    drop(jobs);
    let jobs = open(settings(dir.path()), work(|_| async { completed() })).await;
    assert_eq!(jobs.get(&id).await.unwrap().status, JobState::Cancelled);
}

#[tokio::test]
async fn work_that_pauses_unasked_fails_instead_of_hanging() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), work(|_| async { Outcome::Paused })).await;
    let id = jobs.submit(new("a")).await.unwrap().id;
    let job = reach(&jobs, &id, JobState::Failed).await;
    assert!(job.error.unwrap().contains("resume"));
}

#[tokio::test]
async fn a_client_that_leaves_cuts_no_change_in_half() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), work(|_| async { completed() })).await;
    for i in 0..20 {
        let submit = jobs.submit(new(&format!("{i}")));
        // Dropped at one point or another of its way.
        let _ = tokio::time::timeout(Duration::from_micros(i * 50), submit).await;
    }
    let all_end = async {
        loop {
            let counts = jobs.counts().await.unwrap();
            if counts.pending + counts.running == 0 && counts.completed >= 19 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, all_end).await.expect("each that was accepted also runs");
}

#[tokio::test]
async fn old_jobs_are_forgotten_with_their_folders() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_owned();
    let kinds = work(move |handle| {
        let folder = jobs_dir(&at).join(handle.id());
        async move {
            tokio::fs::create_dir_all(&folder).await.unwrap();
            tokio::fs::write(folder.join("checkpoint"), "x").await.unwrap();
            completed()
        }
    });
    let jobs = open(Settings { keep_ended: 2, ..settings(dir.path()) }, kinds).await;
    let mut ids = Vec::new();
    for i in 0..5 {
        let id = jobs.submit(new(&format!("{i}"))).await.unwrap().id;
        reach(&jobs, &id, JobState::Completed).await;
        ids.push(id);
    }
    let settled = async {
        while jobs.get(&ids[2]).await.is_ok() || jobs.dir().join(&ids[2]).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, settled).await.unwrap();
    assert_eq!(jobs.list(JobFilter::default(), 10).await.unwrap().len(), 2);
    assert_eq!(std::fs::read_dir(jobs_dir(dir.path())).unwrap().count(), 2);
}

#[tokio::test]
async fn uploads_are_complete_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open(settings(dir.path())).await.unwrap();
    let mut upload = jobs.files().begin().await.unwrap();
    upload.write(b"{}\n").await.unwrap();
    let file = upload.finish("../../etc/passwd".into(), "fine-tune".into(), 1).await.unwrap();
    assert_eq!((file.bytes, file.records, file.filename.as_str()), (3, 1, "../../etc/passwd"));
    let folder = dir.path().join("files");
    let path = jobs.files().path_of(&file);
    assert_eq!(path.parent().unwrap(), folder);
    assert_eq!(std::fs::read(&path).unwrap(), b"{}\n");
    let mut half = jobs.files().begin().await.unwrap();
    half.write(b"{").await.unwrap();
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2);
    drop(half);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    for strange in ["", "file-", "../x", "file-..%2f", &file.id.to_uppercase(), &format!("{}/", file.id)] {
        assert!(matches!(jobs.files().get(strange).await, Err(JobsError::FileNotFound { .. })), "{strange}");
    }

    // What a crash leaves: a part, a file whose row was not written, and something that is not ours.
    let orphan = format!("file-{}", uuid::Uuid::new_v4().simple());
    for name in [format!("{orphan}.part"), format!("{orphan}.jsonl"), "notes.txt".to_owned()] {
        std::fs::write(folder.join(name), "x").unwrap();
    }
    jobs.close().await;
    drop(jobs);
    let jobs = Jobs::open(settings(dir.path())).await.unwrap();
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [format!("{}.jsonl", file.id), "notes.txt".to_owned()]);
    assert_eq!(jobs.files().list(None, 10).await.unwrap(), [file]);
}

#[tokio::test]
async fn a_file_stays_while_a_job_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), work(until_stopped)).await;
    let upload = jobs.files().begin().await.unwrap();
    let file = upload.finish("a.jsonl".into(), "fine-tune".into(), 0).await.unwrap();
    let reading = NewJob { file: Some(file.id.clone()), ..new("a") };
    let id = jobs.submit(reading.clone()).await.unwrap().id;
    reach(&jobs, &id, JobState::Running).await;
    match jobs.delete_file(&file.id).await {
        Err(JobsError::FileInUse { job, .. }) => assert_eq!(job, id),
        other => panic!("{other:?}"),
    }
    jobs.cancel(&id).await.unwrap();
    reach(&jobs, &id, JobState::Cancelled).await;
    jobs.delete_file(&file.id).await.unwrap();
    assert!(!jobs.files().path_of(&file).exists());
    assert!(matches!(jobs.delete_file(&file.id).await, Err(JobsError::FileNotFound { .. })));
    assert!(matches!(jobs.submit(reading).await, Err(JobsError::FileNotFound { .. })));
    match jobs.resume(&id).await {
        Err(JobsError::WrongState { message, .. }) => assert!(message.contains("deleted"), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_store_that_fails_is_an_error_and_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(settings(dir.path()), work(|_| async { completed() })).await;
    sqlx::raw_sql("ALTER TABLE jobs RENAME TO lost").execute(&jobs.shared.store.pool).await.unwrap();
    assert!(matches!(jobs.submit(new("a")).await, Err(JobsError::Store(_))));
    assert!(matches!(jobs.counts().await, Err(JobsError::Store(_))));
    sqlx::raw_sql("ALTER TABLE lost RENAME TO jobs").execute(&jobs.shared.store.pool).await.unwrap();
    let id = jobs.submit(new("a")).await.expect("it goes on once the store does").id;
    reach(&jobs, &id, JobState::Completed).await;
}

#[tokio::test]
async fn an_end_is_recorded_once_the_store_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = work(|handle| async move {
        let mut stop = handle.stop();
        let _ = stop.wait_for(|stop| *stop == Stop::Cancel).await;
        handle.log(Level::Info, "the last words".into());
        completed()
    });
    let jobs = open(settings(dir.path()), kinds).await;
    let id = jobs.submit(new("a")).await.unwrap().id;
    reach(&jobs, &id, JobState::Running).await;
    jobs.cancel(&id).await.unwrap();
    sqlx::raw_sql("ALTER TABLE logs RENAME TO lost").execute(&jobs.shared.store.pool).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    sqlx::raw_sql("ALTER TABLE lost RENAME TO logs").execute(&jobs.shared.store.pool).await.unwrap();
    reach(&jobs, &id, JobState::Completed).await;
    let said = async {
        while jobs.log(&id, 0, 5).await.unwrap().1.lines.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, said).await.expect("what the store refused is written later");
}

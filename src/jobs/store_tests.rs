//! Tests of the store on real files: what it refuses to open, what survives, states, pages, retention.

use serde_json::{Value, json};

use super::super::history::{Entry, EventCursor, LOG_LINES};
use super::super::lifecycle::{Cancelled, Job, JobFilter, JobState, NewJob};
use super::super::{JobsError, Level, Outcome};
use super::*;

fn new(name: &str) -> NewJob {
    NewJob {
        kind: "test",
        name: name.into(),
        spec: json!({"name": name}),
        meta: Value::Null,
        plan: json!({"bytes": 5}),
        file: None,
    }
}

fn completed() -> Outcome {
    Outcome::Completed { result: json!({"generation": 3}), message: "done".into() }
}

fn log(job: &Job, line: &str) -> Entry {
    Entry::Log { job: job.id.clone(), at_ms: 5, level: Level::Info, line: line.into() }
}

fn point(job: &Job, step: u64, loss: f64) -> Entry {
    let metrics = json!({"step": step, "loss": loss});
    Entry::Point { job: job.id.clone(), at_ms: 10 + step as i64, step, fraction: step as f64 / 10.0, metrics }
}

async fn refused(dir: &Path) -> String {
    let opened =
        tokio::time::timeout(Duration::from_secs(60), Store::open(dir)).await.expect("does not hang");
    opened.err().expect("must be refused").to_string()
}

#[tokio::test]
async fn files_that_are_no_database_are_refused_by_name_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(DATABASE), "this is no database, but long enough to look at ".repeat(100))
        .unwrap();
    let message = refused(dir.path()).await;
    assert!(message.contains(DATABASE) && message.contains("backup"), "{message}");
    // Nothing was done to it.
    let text = std::fs::read_to_string(dir.path().join(DATABASE)).unwrap();
    assert!(text.starts_with("this is no database"));
}

#[tokio::test]
async fn damaged_pages_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    for i in 0..50 {
        store.accept(&new(&format!("{i}-{}", "x".repeat(500)))).await.unwrap();
    }
    store.close().await;
    drop(store);
    let path = dir.path().join(DATABASE);
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[8192..end].fill(0x5a);
    std::fs::write(&path, bytes).unwrap();
    let message = refused(dir.path()).await;
    assert!(message.contains(DATABASE) && message.contains("backup"), "{message}");
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(DATABASE)).unwrap();
    let message = refused(dir.path()).await;
    assert!(message.contains(DATABASE) && message.contains("--data-dir"), "{message}");
    let message = refused(&dir.path().join("nowhere")).await;
    assert!(message.contains("nowhere") && message.contains("--data-dir"), "{message}");
}

#[tokio::test]
async fn a_newer_schema_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    sqlx::raw_sql("PRAGMA user_version = 99").execute(&store.pool).await.unwrap();
    store.close().await;
    drop(store);
    let message = refused(dir.path()).await;
    assert!(message.contains("schema 99") && message.contains("newer version"), "{message}");
}

#[tokio::test]
async fn one_process_has_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let message = refused(dir.path()).await;
    assert!(message.contains("another gurukul") && message.contains(LOCK), "{message}");
    assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
    drop(store);
    Store::open(dir.path()).await.unwrap();
}

#[tokio::test]
async fn the_connection_keeps_its_promises() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let pragma = async |text: &'static str| -> String {
        let row = sqlx::query(text).fetch_one(&store.pool).await.unwrap();
        sqlx::Row::try_get_unchecked::<String, _>(&row, 0).unwrap()
    };
    assert_eq!(pragma("PRAGMA journal_mode").await, "wal");
    assert_eq!(pragma("PRAGMA synchronous").await, "2", "full");
    assert_eq!(pragma("PRAGMA foreign_keys").await, "1");
}

#[tokio::test]
async fn once_there_is_room_again_every_connection_writes_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let large = "INSERT INTO jobs (id, kind, name, spec, status, message, created_ms)
        VALUES ('', '', '', '', 'pending', hex(zeroblob(1 << 20)), 0)";
    for _ in 0..2 * CONNECTIONS {
        let mut transaction = store.write().await.unwrap();
        // This connection's file may not grow.
        sqlx::raw_sql("PRAGMA max_page_count = 1").execute(&mut *transaction).await.unwrap();
        let error = JobsError::from(sqlx::query(large).execute(&mut *transaction).await.unwrap_err());
        assert!(matches!(error, JobsError::Full(_)), "{error}");
    }
    store.accept(&new("a")).await.unwrap();
}

#[tokio::test]
async fn an_accepted_job_is_there_after_a_reopening_without_a_close() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let job = store.accept(&new("a")).await.unwrap();
    assert_eq!((job.status, job.fraction, job.started_ms), (JobState::Pending, 0.0, None));
    drop(store);
    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(store.job(&job.id).await.unwrap(), job);
    assert_eq!((job.spec, job.plan, job.meta), (json!({"name": "a"}), json!({"bytes": 5}), Value::Null));
}

#[tokio::test]
async fn active_names_are_unique_and_the_error_names_the_other_job() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let first = store.accept(&new("a")).await.unwrap();
    store.accept(&new("b")).await.unwrap();
    let taken = |error: JobsError| match error {
        JobsError::NameTaken { name, job } => (name, job),
        other => panic!("{other}"),
    };
    let error = store.accept(&new("a")).await.unwrap_err();
    assert!(error.to_string().contains(&first.id), "{error}");
    assert_eq!(taken(error), ("a".into(), first.id.clone()));
    store.cancel(&first.id).await.unwrap();
    let second = store.accept(&new("a")).await.expect("the name is free again");
    assert_eq!(taken(store.resume(&first.id).await.unwrap_err()), ("a".into(), second.id));
    // The index holds it also against whoever does not ask first.
    let update = sqlx::query("UPDATE jobs SET status = 'running' WHERE id = ?").bind(&first.id);
    assert!(update.execute(&store.pool).await.is_err());
}

#[tokio::test]
async fn jobs_are_taken_in_the_order_of_their_acceptance() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let mut ids = Vec::new();
    for i in 0..20 {
        ids.push(store.accept(&new(&format!("{i}"))).await.unwrap().id);
    }
    for id in &ids {
        let job = store.take().await.unwrap().unwrap();
        assert_eq!((&job.id, job.status), (id, JobState::Running));
        assert!(job.started_ms.is_some());
    }
    assert_eq!(store.take().await.unwrap(), None);
    let newest: Vec<String> =
        store.jobs(JobFilter::default(), 3).await.unwrap().into_iter().map(|job| job.id).collect();
    assert_eq!(newest, [ids[19].clone(), ids[18].clone(), ids[17].clone()]);
    let filter = JobFilter { before: Some(&ids[2]), status: Some(JobState::Running), kind: Some("test") };
    assert_eq!(store.jobs(filter, 100).await.unwrap().len(), 2);
    let filter = JobFilter { kind: Some("other"), ..JobFilter::default() };
    assert_eq!(store.jobs(filter, 100).await.unwrap().len(), 0);
}

#[tokio::test]
async fn cancelling_depends_on_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let waits = store.accept(&new("a")).await.unwrap();
    let Cancelled::AtOnce(job) = store.cancel(&waits.id).await.unwrap() else { panic!("it had not begun") };
    assert_eq!(job.status, JobState::Cancelled);
    assert!(job.finished_ms.is_some());
    assert!(matches!(store.cancel(&waits.id).await, Err(JobsError::WrongState { .. })));

    let runs = store.accept(&new("b")).await.unwrap();
    store.take().await.unwrap();
    let Cancelled::Requested(job) = store.cancel(&runs.id).await.unwrap() else { panic!("it runs") };
    assert!(job.cancel_requested && job.status == JobState::Running);
    assert!(matches!(store.cancel(&runs.id).await, Ok(Cancelled::Requested(_))), "asking twice is no error");
    store.end(&runs.id, &Outcome::Cancelled("at step 4".into())).await.unwrap();
    let job = store.job(&runs.id).await.unwrap();
    assert_eq!(
        (job.status, job.message.as_str(), job.cancel_requested),
        (JobState::Cancelled, "at step 4", false)
    );
    let missing = store.cancel("0190a000-0000-7000-8000-000000000000").await;
    assert!(matches!(missing, Err(JobsError::NotFound { .. })));
}

#[tokio::test]
async fn a_crash_queues_what_ran_but_for_what_was_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let ran = store.accept(&new("ran")).await.unwrap();
    let to_end = store.accept(&new("to-end")).await.unwrap();
    let waited = store.accept(&new("waited")).await.unwrap();
    store.take().await.unwrap();
    store.take().await.unwrap();
    store.cancel(&to_end.id).await.unwrap();
    store.put(&[Entry::Checkpoint { job: ran.id.clone(), step: 7 }]).await.unwrap();
    drop(store);
    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(store.recover().await.unwrap(), 1);
    let state = async |job: &Job| store.job(&job.id).await.unwrap().status;
    assert_eq!(state(&ran).await, JobState::Pending);
    assert_eq!(state(&to_end).await, JobState::Cancelled);
    assert_eq!(state(&waited).await, JobState::Pending);
    let again = store.take().await.unwrap().unwrap();
    assert_eq!((again.id, again.checkpoint_step), (ran.id, Some(7)), "the oldest first");
    assert_eq!(store.recover().await.unwrap(), 1);
}

#[tokio::test]
async fn ends_are_recorded_once_and_resuming_takes_them_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let job = store.accept(&new("a")).await.unwrap();
    assert!(matches!(store.resume(&job.id).await, Err(JobsError::WrongState { .. })), "it waits already");
    store.take().await.unwrap();
    store.end(&job.id, &Outcome::Paused).await.unwrap();
    assert_eq!(store.job(&job.id).await.unwrap().status, JobState::Running);
    store.end(&job.id, &Outcome::Failed("the disk is full".into())).await.unwrap();
    store.end(&job.id, &completed()).await.unwrap();
    let failed = store.job(&job.id).await.unwrap();
    assert_eq!((failed.status, failed.error.as_deref()), (JobState::Failed, Some("the disk is full")));
    let resumed = store.resume(&job.id).await.unwrap();
    assert_eq!((resumed.status, resumed.error, resumed.finished_ms), (JobState::Pending, None, None));
    assert!(resumed.message.contains("no checkpoint"), "{}", resumed.message);
    store.take().await.unwrap();
    store.end(&job.id, &completed()).await.unwrap();
    let through = store.job(&job.id).await.unwrap();
    assert_eq!((through.status, through.fraction), (JobState::Completed, 1.0));
    assert_eq!((through.result, through.message.as_str()), (json!({"generation": 3}), "done"));
    assert!(matches!(store.resume(&job.id).await, Err(JobsError::WrongState { .. })), "it is through");
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.completed, counts.failed, counts.pending), (1, 0, 0));
}

#[tokio::test]
async fn logs_are_paged_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let job = store.accept(&new("a")).await.unwrap();
    let other = store.accept(&new("b")).await.unwrap();
    let empty = store.log(&job.id, 0, 10).await.unwrap();
    assert_eq!((empty.lines.len(), empty.total, empty.dropped), (0, 0, 0));
    let all: Vec<Entry> = (0..LOG_LINES + 25).map(|i| log(&job, &format!("line {i}"))).collect();
    for batch in all.chunks(1000) {
        store.put(batch).await.unwrap();
    }
    store.put(&[log(&other, "of the other")]).await.unwrap();
    let page = store.log(&job.id, 0, 3).await.unwrap();
    assert_eq!((page.total, page.dropped), (LOG_LINES + 25, 25));
    let texts = |page: &super::super::LogPage| -> Vec<String> {
        page.lines.iter().map(|line| format!("{} {}", line.number, line.line)).collect()
    };
    assert_eq!(texts(&page), ["25 line 25", "26 line 26", "27 line 27"]);
    let page = store.log(&job.id, LOG_LINES + 23, 100).await.unwrap();
    assert_eq!(texts(&page), ["10023 line 10023", "10024 line 10024"]);
    assert_eq!(texts(&store.log_tail(&job.id, 1).await.unwrap()), ["10024 line 10024"]);
    assert_eq!(store.log_tail(&job.id, 100_000).await.unwrap().lines.len() as u64, LOG_LINES);
    assert_eq!(store.log(&job.id, u64::MAX, 5).await.unwrap().lines.len(), 0);
    assert_eq!(texts(&store.log(&other.id, 0, 5).await.unwrap()), ["0 of the other"]);
    store.put(&[log(&job, &"ह".repeat(100_000))]).await.unwrap();
    assert_eq!(store.log_tail(&job.id, 1).await.unwrap().lines[0].line.chars().count(), 4000);
}

#[tokio::test]
async fn points_are_one_a_step_and_follow_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let job = store.accept(&new("a")).await.unwrap();
    store.take().await.unwrap();
    store.put(&(1..=10).map(|step| point(&job, step, 2.0)).collect::<Vec<_>>()).await.unwrap();
    // Reported again after an evaluation, and after a crash.
    store.put(&[point(&job, 10, 1.5), point(&job, 4, 2.0)]).await.unwrap();
    let points = store.points(&job.id, None, 100).await.unwrap();
    assert_eq!(points.iter().map(|p| p.step).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
    assert_eq!(points[9].metrics["loss"], 1.5);
    let rest = store.points(&job.id, Some(7), 2).await.unwrap();
    assert_eq!(rest.iter().map(|p| p.step).collect::<Vec<_>>(), [8, 9]);
    let job = store.job(&job.id).await.unwrap();
    assert_eq!((job.fraction, &job.progress["step"]), (0.4, &json!(4)), "the latest report");
}

#[tokio::test]
async fn events_are_lines_and_points_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let job = store.accept(&new("a")).await.unwrap();
    store
        .put(&[log(&job, "begins"), log(&job, "goes on"), point(&job, 1, 2.0), point(&job, 2, 1.0)])
        .await
        .unwrap();
    let mut seen = Vec::new();
    let mut before: Option<EventCursor> = None;
    loop {
        let page = store.events(&job.id, before, 1).await.unwrap();
        let Some(event) = page.first() else { break };
        before = Some(event.cursor);
        seen.push((event.cursor.is_point, event.cursor.number));
    }
    assert_eq!(seen, [(true, 2), (true, 1), (false, 1), (false, 0)]);
}

#[tokio::test]
async fn the_oldest_ended_jobs_go_with_all_they_left() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let mut jobs = Vec::new();
    for i in 0..4 {
        let job = store.accept(&new(&format!("{i}"))).await.unwrap();
        store.take().await.unwrap();
        store.put(&[log(&job, "line"), point(&job, 1, 1.0)]).await.unwrap();
        if i < 3 {
            store.end(&job.id, &completed()).await.unwrap();
        }
        jobs.push(job);
    }
    assert_eq!(store.beyond(2).await.unwrap(), [jobs[0].id.clone()]);
    assert!(store.forget(&jobs[0].id).await.unwrap());
    assert!(!store.forget(&jobs[3].id).await.unwrap(), "one that runs stays");
    assert!(matches!(store.job(&jobs[0].id).await, Err(JobsError::NotFound { .. })));
    let left: i64 = sqlx::query_scalar("SELECT (SELECT COUNT(*) FROM logs) + (SELECT COUNT(*) FROM points)")
        .fetch_one(&store.pool)
        .await
        .unwrap();
    assert_eq!(left, 6);
    // What still comes of it is left out, and the rest of the batch is kept.
    store.put(&[log(&jobs[0], "late"), point(&jobs[0], 2, 1.0), log(&jobs[1], "kept")]).await.unwrap();
    assert_eq!(store.log(&jobs[0].id, 0, 9).await.unwrap().lines.len(), 0);
    assert_eq!(store.log(&jobs[1].id, 0, 9).await.unwrap().lines.len(), 2);
}

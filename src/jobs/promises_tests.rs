//! Tests of promises in a real store: order, states, pages, retention, the step from the schema before.

use super::super::{JobsError, Settings};
use super::*;
use crate::jobs::{Jobs, NewJob};

fn new(sink: &str, n: u64) -> NewPromise {
    NewPromise {
        sink: sink.into(),
        target: (n % 2 == 1).then(|| serde_json::json!({"type": "folder", "n": n})),
        run: "run-1".into(),
        key: format!("key-{n}"),
        sha256: format!("{:064x}", n / 2),
        bytes: n,
        created_ms: now_ms(),
    }
}

async fn open(dir: &std::path::Path) -> Jobs {
    Jobs::open(Settings { data_dir: dir.to_owned(), max_parallel: 1, keep_ended: 9 }).await.unwrap()
}

#[tokio::test]
async fn promises_come_in_turn_and_end() {
    let dir = tempfile::tempdir().unwrap();
    let promises = open(dir.path()).await.promises();
    let mut ids = Vec::new();
    for n in 0..4 {
        ids.push(promises.give(&new("a", n)).await.unwrap());
    }
    promises.give(&new("b", 9)).await.unwrap();
    let mut sinks = promises.waiting_sinks().await.unwrap();
    sinks.sort();
    assert_eq!(sinks, ["a", "b"]);
    promises.deferred(&ids[0], "down", 60_000).await.unwrap();
    let next = async |limit| -> Vec<String> {
        promises.next("a", limit).await.unwrap().into_iter().map(|promise| promise.id).collect()
    };
    assert_eq!(next(2).await, ids[1..3], "one that waits comes last");
    assert_eq!(next(9).await, [&ids[1..], &ids[..1]].concat());
    let stored = promises.get(&ids[0]).await.unwrap();
    assert_eq!((stored.attempts, stored.error.as_deref()), (1, Some("down")));
    assert!(stored.next_ms >= stored.created_ms + 60_000);
    assert!(promises.get(&ids[1]).await.unwrap().target.is_some() && stored.target.is_none());
    // 0 and 1 have the same content.
    promises.delivered(&ids[1]).await.unwrap();
    assert!(promises.needs(&stored.sha256).await.unwrap());
    promises.refused(&ids[0], "no such bucket").await.unwrap();
    assert!(promises.needs(&stored.sha256).await.unwrap(), "it can be tried again");
    let counts = promises.counts().await.unwrap();
    assert_eq!((counts.pending, counts.done, counts.failed), (3, 1, 1));
    let by_sink = promises.pending_by_sink().await.unwrap();
    assert_eq!(by_sink, [("a".to_owned(), 2), ("b".to_owned(), 1)]);
    // What has ended does not change by what comes late.
    promises.deferred(&ids[1], "late", 1).await.unwrap();
    assert_eq!(promises.get(&ids[1]).await.unwrap().state, PromiseState::Done);
    let error = promises.retry(&ids[1]).await.unwrap_err();
    assert!(matches!(error, JobsError::NotRefused { state: "done", .. }), "{error}");
    assert_eq!(promises.retry(&ids[0]).await.unwrap().state, PromiseState::Pending);
    promises.delivered(&ids[0]).await.unwrap();
    assert!(!promises.needs(&stored.sha256).await.unwrap());
}

#[tokio::test]
async fn promises_are_listed_page_by_page() {
    let dir = tempfile::tempdir().unwrap();
    let promises = open(dir.path()).await.promises();
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.insert(0, promises.give(&new("a", n)).await.unwrap());
    }
    let listed = async |state, before: Option<&str>, limit| -> Vec<String> {
        let page = promises.list(state, before, limit).await.unwrap();
        page.into_iter().map(|promise| promise.id).collect()
    };
    assert_eq!(listed(None, None, 2).await, ids[..2]);
    assert_eq!(listed(None, Some(&ids[1]), 9).await, ids[2..]);
    promises.delivered(&ids[3]).await.unwrap();
    assert_eq!(listed(Some(PromiseState::Done), None, 9).await, ids[3..4]);
    for unknown in ["x", "../../etc", &new_id()] {
        let error = promises.list(None, Some(unknown), 9).await.unwrap_err();
        assert!(matches!(error, JobsError::PromiseNotFound { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_start_tries_what_was_refused_and_forgets_what_is_long_done() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(dir.path()).await;
    let promises = jobs.promises();
    let mut ids = Vec::new();
    for n in 0..3 {
        ids.push(promises.give(&new("a", n)).await.unwrap());
    }
    promises.refused(&ids[0], "no").await.unwrap();
    promises.deferred(&ids[1], "down", 3_600_000).await.unwrap();
    promises.delivered(&ids[2]).await.unwrap();
    assert_eq!(promises.recover().await.unwrap(), 2);
    let next = promises.next("a", 9).await.unwrap();
    assert!(next.len() == 2 && next.iter().all(|promise| promise.next_ms <= now_ms()), "{next:?}");
    let copy = "INSERT INTO uploads (id, sink, run, key, sha256, bytes, state, created_ms, next_ms)
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
        SELECT 'id-' || i, 'a', 'r', 'k', 'h', 1, 'done', 0, 0 FROM n";
    sqlx::query(copy).bind(KEPT_DONE + 5).execute(&promises.store.pool).await.unwrap();
    promises.recover().await.unwrap();
    let counts = promises.counts().await.unwrap();
    assert_eq!((counts.done, counts.pending), (u64::from(KEPT_DONE), 2));
}

#[tokio::test]
async fn a_store_of_the_schema_before_is_brought_up() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = open(dir.path()).await;
    let job = NewJob {
        kind: "test",
        name: "a".into(),
        spec: Value::Null,
        meta: Value::Null,
        plan: Value::Null,
        file: None,
    };
    let job = jobs.submit(job).await.unwrap();
    sqlx::raw_sql("DROP TABLE uploads; PRAGMA user_version = 1")
        .execute(&jobs.promises().store.pool)
        .await
        .unwrap();
    jobs.close().await;
    drop(jobs);
    let jobs = open(dir.path()).await;
    assert_eq!(jobs.get(&job.id).await.unwrap().name, "a");
    jobs.promises().give(&new("a", 1)).await.unwrap();
}

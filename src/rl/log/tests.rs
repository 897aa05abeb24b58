//! Tests of the log: order and numbers, many writers, rotation, repair, files that somebody takes away.

use std::collections::BTreeSet;

use super::*;
use crate::rl::episode::{EpisodeMeta, EpisodeSource, SCHEMA};

fn episode(id: &str) -> Episode {
    Episode {
        schema: SCHEMA,
        episode_id: id.into(),
        run_id: String::new(),
        episode_index: 0,
        timestamp: "2026-01-01T00:00:00.000Z".into(),
        env_name: "test".into(),
        prompt: "नदी\n?".into(),
        output: "river".into(),
        reward: Some(0.5),
        latency_s: None,
        meta: EpisodeMeta::new(EpisodeSource::Given),
    }
}

pub(super) fn entry(episodes: usize) -> Entry {
    let (reply, _) = oneshot::channel();
    Entry { episodes: (0..episodes).map(|n| episode(&format!("e{n}"))).collect(), reply }
}

fn read(dir: &Path, run: &str) -> Vec<Episode> {
    episodes(dir, run).unwrap().map(Result::unwrap).collect()
}

#[tokio::test]
async fn episodes_are_numbered_in_their_order_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let log = EpisodeLog::open(dir.path(), 1 << 20).unwrap();
    let first = log.append("r", vec![episode("a"), episode("b")]).await.unwrap();
    assert_eq!(first.path, log.dir().join("r.jsonl"));
    assert_eq!(first.episodes, read(dir.path(), "r"));
    assert_eq!(log.append("r", vec![episode("c")]).await.unwrap().episodes[0].episode_index, 2);
    drop(log);
    let log = EpisodeLog::open(dir.path(), 1 << 20).unwrap();
    assert_eq!(log.append("r", vec![episode("d")]).await.unwrap().episodes[0].episode_index, 3);
    let all = read(dir.path(), "r");
    assert_eq!(all.iter().map(|e| e.episode_index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(all.iter().all(|e| e.run_id == "r" && e.prompt == "नदी\n?"));
    assert_eq!(runs(dir.path()).unwrap(), ["r"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writers_of_two_runs_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = EpisodeLog::open(dir.path(), 20 << 10).unwrap();
    let tasks: Vec<_> = (0..200)
        .map(|n| {
            let log = log.clone();
            tokio::spawn(async move {
                let run = if n % 2 == 0 { "even" } else { "odd" };
                log.append(run, vec![episode(&format!("{n}-a")), episode(&format!("{n}-b"))]).await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    for run in ["even", "odd"] {
        let all = read(dir.path(), run);
        assert_eq!(all.iter().map(|e| e.episode_index).collect::<Vec<_>>(), (0..200).collect::<Vec<_>>());
        assert_eq!(all.iter().map(|e| &e.episode_id).collect::<BTreeSet<_>>().len(), 200);
        let pairs = all.chunks(2).all(|pair| {
            pair[0].episode_id.trim_end_matches("-a") == pair[1].episode_id.trim_end_matches("-b")
        });
        assert!(pairs, "what is handed over together stays together");
    }
}

#[tokio::test]
async fn a_full_file_is_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    let log = EpisodeLog::open(dir.path(), 1024).unwrap();
    for n in 0..30 {
        log.append("r", vec![episode(&n.to_string())]).await.unwrap();
    }
    let parts = parts(log.dir(), "r").unwrap();
    assert!(parts.len() > 3, "{parts:?}");
    assert_eq!(parts[0], log.dir().join("r~1.jsonl"));
    assert_eq!(parts[parts.len() - 1], log.dir().join("r.jsonl"));
    let line = serde_json::to_string(&episode("0")).unwrap().len() as u64;
    for part in &parts {
        assert!(std::fs::metadata(part).unwrap().len() < 1024 + line + 10);
    }
    assert_eq!(
        read(dir.path(), "r").iter().map(|e| e.episode_id.clone()).collect::<Vec<_>>(),
        (0..30).map(|n| n.to_string()).collect::<Vec<_>>()
    );
    // The number goes on where only a part that was put aside is left.
    std::fs::remove_file(&parts[parts.len() - 1]).unwrap();
    let kept = read(dir.path(), "r").len() as u64;
    assert_eq!(log.append("r", vec![episode("x")]).await.unwrap().episodes[0].episode_index, kept);
}

#[tokio::test]
async fn a_torn_line_is_repaired_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let log = EpisodeLog::open(dir.path(), 1 << 20).unwrap();
    log.append("r", vec![episode("a"), episode("b")]).await.unwrap();
    drop(log);
    let path = dir.path().join("r.jsonl");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let log = EpisodeLog::open(dir.path(), 1 << 20).unwrap();
    assert_eq!(read(dir.path(), "r").len(), 1);
    assert!(std::fs::read_to_string(dir.path().join("r.torn")).unwrap().contains("\"b\""));
    assert_eq!(log.append("r", vec![episode("c")]).await.unwrap().episodes[0].episode_index, 1);
    assert_eq!(read(dir.path(), "r").len(), 2);
}

#[tokio::test]
async fn a_file_that_is_taken_away_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let log = EpisodeLog::open(dir.path(), 1 << 20).unwrap();
    log.append("r", vec![episode("a")]).await.unwrap();
    std::fs::remove_file(dir.path().join("r.jsonl")).unwrap();
    log.append("r", vec![episode("b")]).await.unwrap();
    assert_eq!(read(dir.path(), "r")[0].episode_id, "b");
    std::fs::remove_dir_all(dir.path()).unwrap();
    let error = log.append("r", vec![episode("c")]).await.unwrap_err();
    assert!(matches!(error, LogError::Io(_)), "{error}");
    std::fs::create_dir(dir.path()).unwrap();
    log.append("r", vec![episode("d")]).await.unwrap();
}

#[tokio::test]
async fn names_are_no_paths() {
    let dir = tempfile::tempdir().unwrap();
    let log = EpisodeLog::open(&dir.path().join("log"), 1 << 20).unwrap();
    for run in ["../x", "", "/etc/x", "a/b", "A", "a~1"] {
        let error = log.append(run, vec![episode("a")]).await.unwrap_err();
        assert!(error.to_string().starts_with("run_id is"), "{error}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn lines_that_are_no_episodes_are_told_and_passed() {
    let dir = tempfile::tempdir().unwrap();
    let good = serde_json::to_string(&episode("a")).unwrap();
    std::fs::write(dir.path().join("r.jsonl"), format!("{good}\n{{}}\n{good}\n{{\"torn")).unwrap();
    let read: Vec<_> = episodes(dir.path(), "r").unwrap().collect();
    assert_eq!(read.len(), 3);
    let message = read[1].as_ref().unwrap_err().to_string();
    assert!(message.contains("r.jsonl, line 2") && read[2].is_ok(), "{message}");
    assert_eq!(episodes(dir.path(), "other").unwrap().count(), 0);
}

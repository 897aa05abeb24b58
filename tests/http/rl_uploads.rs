//! `/rl/uploads`: the list and its pages, one upload, retries, metrics, and what is refused.

use std::time::Duration;

use gurukul::config::rl_sinks::{Destination, FolderSink, KeyTemplate, SinkConfig};
use gurukul::rl::outbox::Content;
use serde_json::{Value, json};

use crate::support::{Limits, Server};

const SOON: Duration = Duration::from_secs(30);

fn destination(server: &Server, folder: &str) -> Destination {
    let path = server.data.path().join(folder).to_str().expect("is UTF-8").to_owned();
    let sink = SinkConfig::Folder(FolderSink { path, key: KeyTemplate::default() });
    Destination { name: folder.into(), sink, is_ad_hoc: true }
}

async fn promise(server: &Server, folder: &str, lines: &str) -> String {
    let content = Content::Lines(lines.into());
    server.state.uploads.promise(&destination(server, folder), "run-1", content).await.expect("is promised")
}

async fn reach(server: &Server, id: &str, state: &str) -> Value {
    let wait = async {
        loop {
            let (_, upload) = server.get(&format!("/rl/uploads/{id}")).await;
            if upload["state"] == state {
                return upload;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{id} does not become {state}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_shown_from_their_promise_to_their_end() {
    let server = Server::start(Limits::default()).await;
    let (status, none) = server.get("/rl/uploads").await;
    assert_eq!((status, &none["uploads"], &none["next"]), (200, &json!([]), &Value::Null));
    let id = promise(&server, "nas", "1\n").await;
    let wait = async {
        while server.get(&format!("/rl/uploads/{id}")).await.1["attempts"].as_u64() < Some(1) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("it is tried");
    let (_, upload) = server.get(&format!("/rl/uploads/{id}")).await;
    assert_eq!((&upload["state"], &upload["sink"]), (&json!("pending"), &json!("nas")));
    assert_eq!((&upload["run_id"], &upload["bytes"]), (&json!("run-1"), &json!(2)));
    assert!(upload["error"].as_str().is_some_and(|error| error.contains("mount or make it")), "{upload}");
    assert!(upload["next_attempt_at"].is_string() && upload["completed_at"].is_null());
    std::fs::create_dir(server.data.path().join("nas")).expect("can be made");
    let done = reach(&server, &id, "done").await;
    assert!(done["completed_at"].is_string() && done["next_attempt_at"].is_null() && done["error"].is_null());
    let key = done["key"].as_str().expect("has a key");
    assert_eq!(std::fs::read_to_string(server.data.path().join("nas").join(key)).expect("is there"), "1\n");
    let response = server.client.get(format!("{}/metrics", server.base)).send().await.expect("answers");
    let text = response.text().await.expect("is text");
    for name in [
        "gurukul_uploads{state=\"done\"}",
        "gurukul_uploads{state=\"pending\"}",
        "gurukul_uploads{state=\"failed\"}",
        "gurukul_upload_retries_total ",
        "gurukul_upload_oldest_pending_seconds",
    ] {
        assert!(text.contains(name), "{name} is missing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_listed_by_state_and_page() {
    let server = Server::start(Limits::default()).await;
    std::fs::create_dir(server.data.path().join("nas")).expect("can be made");
    let mut ids = Vec::new();
    for i in 0..5 {
        ids.insert(0, promise(&server, "nas", &format!("{i}\n")).await);
    }
    for id in &ids {
        reach(&server, id, "done").await;
    }
    let waiting = promise(&server, "nowhere", "x\n").await;
    let names = |body: &Value| -> Vec<String> {
        let uploads = body["uploads"].as_array().expect("is a list").iter();
        uploads.map(|upload| upload["upload_id"].as_str().expect("has an id").to_owned()).collect()
    };
    let (_, first) = server.get("/rl/uploads?state=done&limit=3").await;
    assert_eq!(names(&first), ids[..3]);
    assert_eq!(first["counts"], json!({"pending": 1, "done": 5, "failed": 0}));
    let next = first["next"].as_str().expect("there are more");
    let (_, second) = server.get(&format!("/rl/uploads?state=done&limit=3&before={next}")).await;
    assert_eq!((names(&second), &second["next"]), (ids[3..].to_vec(), &Value::Null));
    let (_, pending) = server.get("/rl/uploads?state=pending").await;
    assert_eq!(names(&pending), [waiting]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_upload_is_tried_again_when_asked() {
    let server = Server::start(Limits::default()).await;
    let to = destination(&server, "nas");
    let content = Content::Lines("1\n".into());
    let id = server.state.uploads.promise(&to, "run-1", content).await.expect("is promised");
    let key = server.get(&format!("/rl/uploads/{id}")).await.1["key"].as_str().expect("has a key").to_owned();
    let taken = server.data.path().join("nas").join(key);
    // The place is taken before the sink's folder can be seen.
    let beside = server.data.path().join("beside");
    let inside = beside.join(taken.strip_prefix(server.data.path().join("nas")).expect("is below"));
    std::fs::create_dir_all(inside.parent().expect("has one")).expect("can be made");
    std::fs::write(&inside, "another\n").expect("can be written");
    std::fs::rename(&beside, server.data.path().join("nas")).expect("can be renamed");
    let failed = reach(&server, &id, "failed").await;
    assert!(failed["error"].as_str().is_some_and(|error| error.contains("something else")), "{failed}");
    std::fs::remove_file(&taken).expect("is there");
    let (status, again) = server.post(&format!("/rl/uploads/{id}/retry"), &json!({})).await;
    assert_eq!((status, &again["state"]), (202, &json!("pending")));
    reach(&server, &id, "done").await;
    let (status, refused) = server.post(&format!("/rl/uploads/{id}/retry"), &json!({})).await;
    assert_eq!((status, &refused["error"]["code"]), (409, &json!("upload_state")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_upload_is_refused() {
    let server = Server::start(Limits::default()).await;
    for (path, status, code, param) in [
        ("/rl/uploads?state=lost", 400, "invalid_value", "state"),
        ("/rl/uploads?limit=0", 400, "invalid_value", "limit"),
        ("/rl/uploads?limit=1001", 400, "invalid_value", "limit"),
        ("/rl/uploads?color=red", 400, "unknown_parameter", "color"),
        ("/rl/uploads?before=x", 404, "upload_not_found", "upload_id"),
        ("/rl/uploads/..%2f..%2fetc", 404, "upload_not_found", "upload_id"),
        ("/rl/uploads/0192d0c0-0000-7000-8000-000000000000", 404, "upload_not_found", "upload_id"),
    ] {
        let (found, body) = server.get(path).await;
        assert_eq!((found, &body["error"]["code"]), (status, &json!(code)), "{path}: {body}");
        assert_eq!(body["error"]["param"], param, "{path}");
    }
    let (status, _) = server.post("/rl/uploads/x/retry", &json!({})).await;
    assert_eq!(status, 404);
}

//! `/v1/files`: what is kept is complete, what is wrong is refused with its line, and the server goes on.

use serde_json::{Value, json};

use crate::support::{Limits, MAX_UPLOAD, Server};

const BOUNDARY: &str = "a-boundary-of-the-tests";
const PAIR: &str = "{\"prompt\":\"water\",\"completion\":\"पानी\"}\n";

/// A form of fields and, where there is a file's name, files.
fn form(parts: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, filename, content) in parts {
        body.extend_from_slice(
            format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"").as_bytes(),
        );
        if let Some(filename) = filename {
            body.extend_from_slice(
                format!("; filename=\"{filename}\"\r\ncontent-type: application/octet-stream").as_bytes(),
            );
        }
        body.extend_from_slice(b"\r\n\r\n");
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

async fn send(server: &Server, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let request = server.client.post(format!("{}/v1/files", server.base)).body(body);
    let request = request.header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"));
    let response = request.send().await.expect("the server answers");
    (response.status().as_u16(), response.json().await.expect("is JSON"))
}

async fn upload(server: &Server, name: &str, content: &[u8]) -> (u16, Value) {
    send(server, form(&[("purpose", None, b"fine-tune"), ("file", Some(name), content)])).await
}

fn kept(server: &Server) -> usize {
    std::fs::read_dir(server.data.path().join("files")).expect("the folder is there").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_comes_in_is_shown_read_and_deleted() {
    let server = Server::start(Limits::default()).await;
    let content = PAIR.repeat(1000);
    let (status, file) = upload(&server, "../../etc/phrases.jsonl", content.as_bytes()).await;
    assert_eq!(status, 200, "{file}");
    let id = file["id"].as_str().expect("has an id").to_owned();
    assert!(id.starts_with("file-"), "{id}");
    assert_eq!(
        (&file["object"], &file["purpose"], &file["status"]),
        (&json!("file"), &json!("fine-tune"), &json!("processed"))
    );
    assert_eq!(file["bytes"], content.len());
    assert_eq!(server.get(&format!("/v1/files/{id}")).await, (200, file.clone()));
    let response =
        server.client.get(format!("{}/v1/files/{id}/content", server.base)).send().await.expect("answers");
    assert_eq!(response.headers()["content-type"], "application/jsonl");
    assert_eq!(response.text().await.expect("is text"), content);
    // The file may also come before its purpose.
    let parts = form(&[("file", Some("b.jsonl"), PAIR.as_bytes()), ("purpose", None, b"fine-tune")]);
    let (status, second) = send(&server, parts).await;
    assert_eq!(status, 200, "{second}");
    let (_, list) = server.get("/v1/files").await;
    assert_eq!(list["data"], json!([second, file]));
    let (_, list) = server.get("/v1/files?limit=1").await;
    assert_eq!(
        (&list["data"], &list["has_more"], &list["last_id"]),
        (&json!([second]), &json!(true), &second["id"])
    );
    let (_, list) = server.get(&format!("/v1/files?after={}", second["id"].as_str().expect("is text"))).await;
    assert_eq!((&list["data"], &list["has_more"]), (&json!([file]), &json!(false)));
    let (_, list) = server.get("/v1/files?purpose=assistants").await;
    assert_eq!(list["data"], json!([]));
    let delete =
        server.client.delete(format!("{}/v1/files/{id}", server.base)).send().await.expect("answers");
    let deleted: Value = delete.json().await.expect("is JSON");
    assert_eq!(deleted, json!({"id": id, "object": "file", "deleted": true}));
    assert_eq!(server.get(&format!("/v1/files/{id}")).await.0, 404);
    assert_eq!(kept(&server), 1);
    for id in ["x", "..%2f..%2fgurukul.db", "file-", &id] {
        for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content")] {
            let (status, body) = server.get(&path).await;
            assert_eq!((status, &body["error"]["code"]), (404, &json!("file_not_found")), "{path}");
        }
    }
    for query in ["limit=0", "order=asc", "x=1"] {
        assert_eq!(server.get(&format!("/v1/files?{query}")).await.0, 400, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_trained_on_is_refused_and_leaves_nothing() {
    let server = Server::start(Limits::default()).await;
    for (content, part) in [
        (format!("{PAIR}{PAIR}{{\"prompt\": 5}}\n{PAIR}"), "line 3: prompt must be a text"),
        (format!("{PAIR}not JSON"), "line 2: is not valid JSON"),
        (String::new(), "no example"),
        (
            format!("{PAIR}{{\"messages\":[{{\"role\":\"assistant\",\"content\":\"a\"}}]}}"),
            "line 2: all lines",
        ),
    ] {
        let (status, body) = upload(&server, "a.jsonl", content.as_bytes()).await;
        assert_eq!(
            (status, &body["error"]["code"], &body["error"]["param"]),
            (400, &json!("invalid_file"), &json!("file"))
        );
        let message = body["error"]["message"].as_str().expect("is text");
        assert!(message.contains(part), "{message}");
    }
    // An early error in a long file: the client still hears it.
    let long = "x\n".to_owned() + &PAIR.repeat(15_000);
    let (status, body) = upload(&server, "a.jsonl", long.as_bytes()).await;
    assert!(
        status == 400 && body["error"]["message"].as_str().is_some_and(|m| m.contains("line 1")),
        "{body}"
    );
    let file = ("file", Some("a.jsonl"), PAIR.as_bytes());
    for (parts, code, param) in [
        (vec![file], "missing_parameter", "purpose"),
        (vec![("purpose", None, &b"fine-tune"[..])], "missing_parameter", "file"),
        (vec![("purpose", None, &b"assistants"[..]), file], "unsupported_parameter", "purpose"),
        (vec![("purpose", None, &b"fine-tune"[..]), file, file], "duplicate_parameter", "file"),
        (vec![("porpoise", None, &b"fine-tune"[..]), file], "unknown_parameter", "porpoise"),
        (vec![("purpose", None, &b"\xff"[..]), file], "invalid_value", "purpose"),
    ] {
        let (status, body) = send(&server, form(&parts)).await;
        assert_eq!(
            (status, &body["error"]["code"], &body["error"]["param"]),
            (400, &json!(code), &json!(param)),
            "{body}"
        );
    }
    let whole = form(&[("purpose", None, b"fine-tune"), file]);
    let (status, body) = send(&server, whole[..whole.len() - 40].to_vec()).await;
    assert_eq!((status, &body["error"]["code"]), (400, &json!("invalid_form")), "{body}");
    let (status, body) = server.post("/v1/files", &json!({"purpose": "fine-tune"})).await;
    assert_eq!((status, &body["error"]["code"]), (415, &json!("unsupported_media_type")));
    assert_eq!(kept(&server), 0);
    assert_eq!(upload(&server, "a.jsonl", PAIR.as_bytes()).await.0, 200, "the server goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_too_large_is_refused_however_it_comes() {
    let server = Server::start(Limits::default()).await;
    let fits = PAIR.repeat(MAX_UPLOAD / PAIR.len());
    assert_eq!(upload(&server, "a.jsonl", fits.as_bytes()).await.0, 200);
    for copies in [1, 8] {
        let large = PAIR.repeat(copies * MAX_UPLOAD / PAIR.len() + 1);
        let (status, body) = upload(&server, "a.jsonl", large.as_bytes()).await;
        assert_eq!((status, &body["error"]["code"]), (413, &json!("file_too_large")), "{copies}: {body}");
        // Without a length that tells it beforehand.
        let whole = form(&[("purpose", None, b"fine-tune"), ("file", Some("a.jsonl"), large.as_bytes())]);
        let pieces: Vec<_> =
            whole.chunks(64 << 10).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
        let (status, body) = send(&server, reqwest::Body::wrap_stream(futures::stream::iter(pieces))).await;
        assert_eq!((status, &body["error"]["code"]), (413, &json!("file_too_large")), "{copies}: {body}");
    }
    assert_eq!(kept(&server), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_middle_leaves_nothing() {
    use tokio::io::AsyncWriteExt as _;

    let server = Server::start(Limits::default()).await;
    let address = server.base.trim_start_matches("http://");
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("the server listens");
    let whole =
        form(&[("purpose", None, b"fine-tune"), ("file", Some("a.jsonl"), PAIR.repeat(2000).as_bytes())]);
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nhost: {address}\r\ncontent-type: multipart/form-data; boundary={BOUNDARY}\r\n\
         content-length: {}\r\n\r\n",
        whole.len()
    );
    stream.write_all(head.as_bytes()).await.expect("is open");
    stream.write_all(&whole[..whole.len() / 2]).await.expect("is open");
    let until = async |files: usize| {
        for _ in 0..1000 {
            if kept(&server) == files {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("there are {} files and not {files}", kept(&server));
    };
    until(1).await;
    drop(stream);
    until(0).await;
    assert_eq!(server.get("/v1/files").await.1["data"], json!([]));
}

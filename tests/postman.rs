//! `docs/postman_collection.json` against the OpenAPI document as it is pinned: each endpoint is in it, nothing else
//! is, and each request tests its answer. `scripts/check_api.sh` runs it against a server.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Method and path of each endpoint of the document, with a parameter of whatever name as `{}`.
fn documented() -> BTreeSet<(String, String)> {
    let snapshot = read("tests/snapshots/openapi.snap");
    let json = snapshot.splitn(3, "---\n").nth(2).expect("a snapshot has a head between two lines");
    let document: Value = serde_json::from_str(json).unwrap();
    let mut found = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let parts = path.split('/').map(|part| if part.starts_with('{') { "{}" } else { part });
        let path = parts.collect::<Vec<_>>().join("/");
        for method in item.as_object().unwrap().keys() {
            found.insert((method.to_uppercase(), path.clone()));
        }
    }
    found
}

/// The requests of the collection, folders or not, in their order.
fn requests(item: &Value) -> Vec<&Value> {
    match item["item"].as_array() {
        Some(items) => items.iter().flat_map(requests).collect(),
        None => vec![item],
    }
}

/// Method and path of a request, with a path's variable as `{}`.
fn asked(item: &Value) -> (String, String) {
    let request = &item["request"];
    assert_eq!(request["url"]["host"][0], "{{baseUrl}}", "{}", item["name"]);
    let parts = request["url"]["path"].as_array().unwrap().iter().map(|part| part.as_str().unwrap());
    let parts = parts.map(|part| if part.starts_with("{{") || part == "no-such-job" { "{}" } else { part });
    (request["method"].as_str().unwrap().to_owned(), format!("/{}", parts.collect::<Vec<_>>().join("/")))
}

#[test]
fn the_collection_has_every_endpoint_and_tests_each_answer() {
    let collection: Value = serde_json::from_str(&read("docs/postman_collection.json")).unwrap();
    assert_eq!(
        collection["info"]["schema"],
        "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
    );
    let requests = requests(&collection);
    let asked: BTreeSet<_> = requests.iter().map(|item| asked(item)).collect();
    let documented = documented();
    assert!(documented.len() >= 36, "{documented:?}");
    let missing: Vec<_> = documented.difference(&asked).collect();
    assert!(missing.is_empty(), "docs/postman_collection.json lacks {missing:?}");
    let own = BTreeSet::from([("GET".to_owned(), "/openapi.json".to_owned())]);
    let unknown: Vec<_> = asked.difference(&documented).filter(|one| !own.contains(*one)).collect();
    assert!(unknown.is_empty(), "docs/postman_collection.json asks for what is not there: {unknown:?}");

    let mut names = BTreeSet::new();
    for item in requests {
        let name = item["name"].as_str().unwrap();
        assert!(names.insert(name), "{name}: polling goes by names, so no two may be the same");
        let scripts = item["event"].as_array().unwrap().iter().filter(|event| event["listen"] == "test");
        let tests = scripts.map(|event| event["script"]["exec"].to_string()).collect::<String>();
        assert!(tests.contains("pm.test("), "{name} tests nothing");
    }
}

#[test]
fn the_environment_sets_variables_that_the_collection_has() {
    let collection: Value = serde_json::from_str(&read("docs/postman_collection.json")).unwrap();
    let environment: Value = serde_json::from_str(&read("docs/postman_environment.json")).unwrap();
    let keys = |list: &Value| -> BTreeSet<String> {
        list.as_array().unwrap().iter().map(|entry| entry["key"].as_str().unwrap().to_owned()).collect()
    };
    let (known, set) = (keys(&collection["variable"]), keys(&environment["values"]));
    assert!(set.contains("baseUrl") && set.contains("apiKey"), "{set:?}");
    assert!(set.is_subset(&known), "{set:?} are not all in {known:?}");
    let all = collection.to_string();
    let used = all.split("{{").skip(1).filter_map(|rest| Some(rest.split_once("}}")?.0));
    let unknown: BTreeSet<_> = used.filter(|name| !known.contains(*name)).collect();
    assert!(unknown.is_empty(), "no variable is called {unknown:?}");
}

//! Where a source's data lies, in one line for people: without queries, keys, or arguments that may hold a secret.

use reqwest::Url;

use super::hub::HuggingFaceConfig;
use super::web::bare;
use super::{HttpConfig, Location, McpConfig, QdrantConfig, S3Config, SourceConfig};

impl SourceConfig {
    /// Where the data lies, in one line without secrets.
    pub fn description(&self) -> String {
        match &self.location {
            Location::Local(local) => local.path.clone(),
            Location::Http(http) => http.describe(),
            Location::HuggingFace(set) => set.describe(),
            Location::S3(s3) => s3.describe(),
            Location::Qdrant(qdrant) => qdrant.describe(),
            Location::Mcp(mcp) => mcp.describe(),
            Location::Mix(mix) => {
                let parts = mix.sources.iter().map(|part| format!("{} × {}", part.source, part.weight));
                parts.collect::<Vec<_>>().join(", ")
            }
            Location::Fallback(list) => list.sources.join(", else "),
        }
    }
}

/// The first of some, and how many more there are.
fn first_of(all: &[String]) -> String {
    match all {
        [] => "nothing".into(),
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}

/// An address as messages may say it.
fn address(text: &str) -> String {
    match Url::parse(text) {
        Ok(url) => bare(url.as_str()),
        Err(_) => bare(text),
    }
}

impl HttpConfig {
    fn describe(&self) -> String {
        let urls: Vec<String> = self.url.iter().chain(&self.urls).map(|url| address(url)).collect();
        first_of(&urls)
    }
}

impl HuggingFaceConfig {
    fn describe(&self) -> String {
        let config = self.config.as_ref().map_or(String::new(), |config| format!(" {config}"));
        let revision = self.revision.as_ref().map_or(String::new(), |revision| format!("@{revision}"));
        format!("{}{revision}{config}, {}", self.repo, self.split)
    }
}

impl S3Config {
    fn describe(&self) -> String {
        let keys = match (&self.prefix, self.keys.is_empty()) {
            (Some(prefix), _) => format!("{prefix}*"),
            (None, true) => "*".into(),
            (None, false) => first_of(&self.keys),
        };
        let endpoint =
            self.endpoint_url.as_ref().map_or(String::new(), |url| format!(" at {}", address(url)));
        format!("s3://{}/{keys}{endpoint}", self.bucket)
    }
}

impl QdrantConfig {
    fn describe(&self) -> String {
        format!("collection {} at {}", self.collection, address(&self.url).trim_end_matches('/'))
    }
}

impl McpConfig {
    fn describe(&self) -> String {
        let server = self.server_name();
        match &self.tool {
            Some(tool) => format!("tool {} of {server}", tool.name),
            None => {
                let uris: Vec<String> = self.resources.iter().map(|choice| choice.uri().to_owned()).collect();
                format!("resources {} of {server}", first_of(&uris))
            }
        }
    }

    /// The server, as messages name it: its address, or its program and what that is told to run. Further arguments
    /// may hold what is not for messages.
    pub(super) fn server_name(&self) -> String {
        if let Some(url) = &self.url {
            return address(url);
        }
        let mut words = self.command.iter();
        let program = words.next().map_or("", String::as_str);
        let mut words = words.skip_while(|word| ["-y", "--yes", "-m"].contains(&word.as_str()));
        match words.next() {
            Some(word) if !word.starts_with('-') => format!("{program} {word}"),
            _ => program.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn description(typed: Value) -> String {
        serde_json::from_value::<SourceConfig>(typed).unwrap().description()
    }

    #[test]
    fn a_line_says_where_and_no_secret() {
        for (typed, expected) in [
            (json!({"type": "local", "path": "data/*.jsonl"}), "data/*.jsonl"),
            (
                json!({"type": "huggingface", "repo": "org/set", "config": "hi", "revision": "v1"}),
                "org/set@v1 hi, train",
            ),
            (json!({"type": "s3", "bucket": "b", "prefix": "hi/"}), "s3://b/hi/*"),
            (
                json!({"type": "mix", "sources": [{"source": "a", "weight": 2.5}, {"source": "b"}]}),
                "a × 2.5, b × 1",
            ),
            (json!({"type": "fallback", "sources": ["a", "b"]}), "a, else b"),
            (json!({"type": "http", "url": "https://h/a?token=s3cr3t"}), "https://h/a"),
            (
                json!({"type": "http", "urls": ["http://h/a", "http://h/b", "http://h/c"]}),
                "http://h/a and 2 more",
            ),
            (
                json!({"type": "qdrant", "url": "http://h:6333/", "collection": "c", "api_key_env": "KEY"}),
                "collection c at http://h:6333",
            ),
            (
                json!({"type": "mcp", "command": ["npx", "-y", "notes", "--token", "s3cr3t"], "tool": {"name": "rows"}}),
                "tool rows of npx notes",
            ),
            (
                json!({"type": "mcp", "command": ["notes", "--token", "s3cr3t"], "resources": ["a:b", "c:d"]}),
                "resources a:b and 1 more of notes",
            ),
            (
                json!({"type": "mcp", "url": "http://h/mcp?key=s3cr3t", "resources": [
                    {"template": "a://{b}", "values": {"b": [1]}}]}),
                "resources a://{b} of http://h/mcp",
            ),
        ] {
            assert_eq!(description(typed), expected);
        }
    }
}

//! Resources of an MCP server as files: which ones are meant, and their bytes, which are in memory as a whole once
//! they are read. Knows nothing of rows.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use regex::Regex;
use rmcp::model::{PaginatedRequestParams, ReadResourceRequestParams, ResourceContents};
use tokio_util::bytes::Bytes;

use super::super::Format;
use super::super::object::{Object, Stat};
use super::server::{Server, plain};
use super::{ResourceChoice, Template, Values, Word, parts};

/// Pages of the list of resources; more are a circle.
const MAX_LIST_PAGES: usize = 10_000;

/// Servers differ in whether they pad.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The resources that a source reads, one after another.
pub(super) struct Resources {
    choices: std::vec::IntoIter<ResourceChoice>,
    /// Of the choice that is being gone through.
    uris: Box<dyn Iterator<Item = String> + Send>,
    server: Arc<Mutex<Server>>,
}

impl Resources {
    pub(super) fn new(choices: Vec<ResourceChoice>, server: Server) -> Self {
        let server = Arc::new(Mutex::new(server));
        Self { choices: choices.into_iter(), uris: Box::new(std::iter::empty()), server }
    }
}

impl Iterator for Resources {
    type Item = Result<Box<dyn Object>, String>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(uri) = self.uris.next() {
                return Some(Ok(Box::new(Resource::new(uri, self.server.clone()))));
            }
            self.uris = match self.choices.next()? {
                ResourceChoice::Uri(uri) if uri.contains('*') => match listed(&self.server, &uri) {
                    Ok(uris) => Box::new(uris.into_iter()),
                    Err(reason) => return Some(Err(reason)),
                },
                ResourceChoice::Uri(uri) => Box::new(std::iter::once(uri)),
                ResourceChoice::Template(template) => Box::new(expanded(template)),
            };
        }
    }
}

/// Those of the server's list whose URI fits a pattern, in the order of the list.
fn listed(server: &Mutex<Server>, pattern: &str) -> Result<Vec<String>, String> {
    let fits: Vec<String> = pattern.split('*').map(regex::escape).collect();
    let fits =
        Regex::new(&format!("^{}$", fits.join(".*"))).map_err(|error| format!("resources: {error}"))?;
    let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
    let mut uris = Vec::new();
    let mut known = 0;
    let mut cursor: Option<String> = None;
    for _ in 0..MAX_LIST_PAGES {
        let asked = PaginatedRequestParams::default().with_cursor(cursor.clone());
        let page = server.ask("list of resources", "resources/list", async |peer| {
            peer.list_resources(Some(asked.clone())).await
        })?;
        known += page.resources.len();
        uris.extend(page.resources.into_iter().map(|resource| resource.uri).filter(|uri| fits.is_match(uri)));
        match page.next_cursor.filter(|next| !next.is_empty()) {
            Some(next) if Some(&next) == cursor.as_ref() => break,
            Some(next) => cursor = Some(next),
            None if uris.is_empty() => {
                return Err(format!(
                    "MCP server {}: none of its {known} resources fits {pattern}; correct resources",
                    server.shown()
                ));
            }
            None => return Ok(uris),
        }
    }
    Err(format!("MCP server {}: its list of resources goes in a circle; name URIs without *", server.shown()))
}

/// All URIs that a template stands for; the name that comes last in it changes fastest.
fn expanded(template: Template) -> impl Iterator<Item = String> + Send {
    let names: Vec<String> = {
        let mut names: Vec<String> = Vec::new();
        for (_, name) in parts(&template.template) {
            names.extend(name.filter(|name| !names.iter().any(|known| known == name)).map(str::to_owned));
        }
        names
    };
    let counts: Vec<u64> =
        names.iter().map(|name| template.values.get(name).map_or(0, Values::count)).collect();
    let total = counts.iter().fold(1_u64, |product, count| product.saturating_mul(*count));
    (0..total).map(move |mut at| {
        let mut values = vec![String::new(); names.len()];
        for (i, name) in names.iter().enumerate().rev() {
            values[i] = template.values.get(name).map(|v| v.at(at % counts[i])).unwrap_or_default();
            at /= counts[i];
        }
        let value = |name: &str| names.iter().position(|known| known == name).map_or("", |i| &values[i]);
        let pieces = parts(&template.template);
        pieces.iter().map(|(text, name)| format!("{text}{}", encoded(name.map_or("", value)))).collect()
    })
}

impl Values {
    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        match self {
            Self::List(list) => list.len() as u64,
            Self::Range(range) => {
                let count = i128::from(range.to) - i128::from(range.from) + 1;
                u64::try_from(count.max(0)).unwrap_or(u64::MAX)
            }
        }
    }

    fn at(&self, at: u64) -> String {
        match self {
            Self::List(list) => match &list[at as usize] {
                Word::Number(number) => number.to_string(),
                Word::Text(text) => text.clone(),
            },
            Self::Range(range) => (i128::from(range.from) + i128::from(at)).to_string(),
        }
    }
}

/// As RFC 6570 has it for `{name}`: what is not plain is escaped.
fn encoded(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(byte))
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

/// One resource.
struct Resource {
    uri: String,
    /// The URI without its query.
    shown: String,
    server: Arc<Mutex<Server>>,
    read: Option<Whole>,
}

/// What was read of it.
struct Whole {
    bytes: Bytes,
    format: Option<Format>,
}

impl Resource {
    fn new(uri: String, server: Arc<Mutex<Server>>) -> Self {
        let shown = uri.split(['?', '#']).next().unwrap_or(&uri).to_owned();
        Self { uri, shown, server, read: None }
    }

    fn bytes(&mut self) -> Result<&Bytes, String> {
        if self.read.is_none() {
            let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
            let asked = ReadResourceRequestParams::new(self.uri.clone());
            let what = format!("resource {}", self.shown);
            let result =
                server.ask(&what, "resources/read", async |peer| peer.read_resource(asked.clone()).await)?;
            let read = joined(result.contents)
                .map_err(|why| format!("MCP server {}, {what}: {why}", server.shown()))?;
            self.read = Some(read);
        }
        match &self.read {
            Some(read) => Ok(&read.bytes),
            None => Err("nothing was read".into()),
        }
    }
}

/// The parts of a resource as one file: texts of one kind follow each other, each on a line of its own.
fn joined(contents: Vec<ResourceContents>) -> Result<Whole, String> {
    let mut parts = Vec::new();
    for content in contents {
        parts.push(match content {
            ResourceContents::TextResourceContents { text, mime_type, .. } => (text.into_bytes(), mime_type),
            ResourceContents::BlobResourceContents { blob, mime_type, .. } => {
                let bytes =
                    BASE64.decode(blob.trim()).map_err(|error| format!("its blob is no base64: {error}"))?;
                (bytes, mime_type)
            }
            other => {
                return Err(format!("holds what is neither text nor blob: {}", plain(&format!("{other:?}"))));
            }
        });
    }
    let Some((_, mime_type)) = parts.first() else {
        return Err("is empty: the server sent no contents".into());
    };
    let mime_type = mime_type.clone();
    let format = mime_type.as_deref().and_then(format_of_mime_type);
    if parts.iter().any(|(_, other)| *other != mime_type) {
        return Err("has parts of several kinds; name the URIs of those that are wanted".into());
    }
    let lines = matches!(format, Some(Format::Txt | Format::Jsonl));
    if parts.len() > 1 && !lines {
        return Err("has several parts; name the URIs of those that are wanted".into());
    }
    let mut bytes = Vec::new();
    for (part, _) in parts {
        if !bytes.is_empty() && bytes.last() != Some(&b'\n') {
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(&part);
    }
    Ok(Whole { bytes: bytes.into(), format })
}

/// What a media type says about how rows are written; nothing where it says nothing.
fn format_of_mime_type(text: &str) -> Option<Format> {
    match text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "application/jsonl"
        | "application/x-jsonlines"
        | "application/x-ndjson"
        | "application/jsonlines" => Some(Format::Jsonl),
        "text/csv" => Some(Format::Csv),
        "text/tab-separated-values" => Some(Format::Tsv),
        "text/plain" | "text/markdown" => Some(Format::Txt),
        // Many servers call an object a line by this name as well, so the first character decides.
        _ => None,
    }
}

impl Object for Resource {
    fn shown(&self) -> &str {
        &self.shown
    }

    fn stat(&mut self) -> Result<Stat, String> {
        let length = self.bytes()?.len() as u64;
        Ok(Stat { length: Some(length), version: None })
    }

    fn format(&self) -> Option<Format> {
        self.read.as_ref()?.format
    }

    fn read_from(&mut self, offset: u64) -> Result<Box<dyn Read + Send + '_>, String> {
        let bytes = self.bytes()?;
        let start = usize::try_from(offset).ok().filter(|start| *start <= bytes.len());
        let start = start.ok_or_else(|| format!("ends after {} bytes, before byte {offset}", bytes.len()))?;
        Ok(Box::new(io::Cursor::new(bytes.slice(start..))))
    }

    fn read_range(&mut self, range: Range<u64>) -> Result<Bytes, String> {
        let bytes = self.bytes()?;
        let place = |at: u64| usize::try_from(at).ok().filter(|at| *at <= bytes.len());
        match (place(range.start), place(range.end)) {
            (Some(start), Some(end)) if start <= end => Ok(bytes.slice(start..end)),
            _ => Err(format!("has {} bytes and not those up to {}", bytes.len(), range.end)),
        }
    }
}

//! API keys: who may use the server, what for and how much. Read from a variable and a YAML file, kept as hashes.
//! No message repeats what could be a key. Knows no request.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use ring::digest::{SHA256, digest};
use serde::Deserialize;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::named::is_name;
use super::yaml;

/// The variable with keys; the file is a setting like others.
pub const VARIABLE: &str = "GURUKUL_API_KEYS";

/// Characters that a key must have: fewer can be guessed.
const MIN_KEY_CHARS: usize = 16;
/// Characters that it may have.
const MAX_KEY_CHARS: usize = 256;
/// Bytes that the file may have.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Keys that there may be: each request is compared with all.
const MAX_KEYS: usize = 1000;

/// What a key may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Answers, models and adapters to look at.
    Generate,
    /// Training jobs, their data and sources.
    Train,
    /// Episodes, and learning from them.
    Rl,
    /// Everything.
    Admin,
}

impl Scope {
    /// All, in the order of their rights.
    pub const ALL: [Self; 4] = [Self::Generate, Self::Train, Self::Rl, Self::Admin];

    /// As it is written in files and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Train => "train",
            Self::Rl => "rl",
            Self::Admin => "admin",
        }
    }
}

/// What one key may ask for; `None` is the server's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests a minute on the average; 0 is no bound.
    pub requests_per_minute: Option<u32>,
    /// Requests that may come at once after a pause; as many as a minute brings when not said.
    pub burst: Option<u32>,
    /// Requests that may be under way; 0 is no bound.
    pub max_concurrent: Option<u32>,
}

/// One key.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    name: String,
    sha256: [u8; 32],
    scopes: Vec<Scope>,
    limits: KeyLimits,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ApiKey");
        shown.field("name", &self.name).field("scopes", &self.scopes).field("limits", &self.limits);
        shown.finish_non_exhaustive()
    }
}

impl ApiKey {
    /// What logs and metrics call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it may be used for, as typed.
    pub fn scopes(&self) -> &[Scope] {
        &self.scopes
    }

    /// Its own limits.
    pub fn limits(&self) -> KeyLimits {
        self.limits
    }

    /// Whether it may be used for what needs `scope`.
    pub fn allows(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|s| *s == scope || *s == Scope::Admin)
    }
}

/// All keys; none means that nobody has to identify.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApiKeys {
    keys: Vec<ApiKey>,
}

impl ApiKeys {
    /// The keys, as they were listed.
    pub fn keys(&self) -> &[ApiKey] {
        &self.keys
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The index of the key that `secret` is. Takes as long whichever it is, and if it is none.
    pub fn find(&self, secret: &[u8]) -> Option<usize> {
        let wanted = digest(&SHA256, secret);
        let mut found = Choice::from(0);
        let mut index = 0_u32;
        for (i, key) in self.keys.iter().enumerate() {
            let same = key.sha256[..].ct_eq(wanted.as_ref());
            index.conditional_assign(&u32::try_from(i).expect("more keys than can be is a bug"), same);
            found |= same;
        }
        bool::from(found).then_some(index as usize)
    }
}

/// Where keys come from. The variable is read once, the file whenever it is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeySources {
    from_variable: Vec<ApiKey>,
    file: Option<PathBuf>,
}

impl KeySources {
    /// From the text of [`VARIABLE`] and the path of a file.
    ///
    /// # Errors
    /// An entry of the variable that is no key, by its number.
    pub fn new(variable: Option<&str>, file: Option<PathBuf>) -> anyhow::Result<Self> {
        let entries = variable.unwrap_or_default().split(|c: char| c == ',' || c.is_whitespace());
        let from_variable = entries
            .filter(|entry| !entry.is_empty())
            .enumerate()
            .map(|(i, entry)| of_entry(i + 1, entry).map_err(|e| anyhow!("{VARIABLE}: entry {}: {e}", i + 1)))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { from_variable, file })
    }

    /// Reads the file, and puts all keys together.
    ///
    /// # Errors
    /// A file that cannot be used, with the line where it is not; or two keys that share a name or are the same.
    pub fn load(&self) -> anyhow::Result<ApiKeys> {
        let mut keys = self.from_variable.clone();
        if let Some(file) = &self.file {
            keys.extend(of_file(file).with_context(|| format!("--api-keys-file {}", file.display()))?);
        }
        if keys.len() > MAX_KEYS {
            bail!("there are {} API keys; at most {MAX_KEYS} can be", keys.len());
        }
        for (i, key) in keys.iter().enumerate() {
            for other in &keys[..i] {
                if other.name == key.name {
                    bail!("two API keys are called {}; give each a name of its own", key.name);
                }
                if other.sha256 == key.sha256 {
                    bail!("the API keys {} and {} are the same; make another key", other.name, key.name);
                }
            }
        }
        Ok(ApiKeys { keys })
    }
}

/// `KEY`, `NAME=KEY` or `NAME:SCOPE+SCOPE=KEY`; without scopes it may be used for everything.
fn of_entry(number: usize, entry: &str) -> anyhow::Result<ApiKey> {
    // A key itself has `=` at its end alone.
    let split = entry.split_once('=').filter(|(_, rest)| rest.chars().any(|c| c != '='));
    let Some((head, key)) = split else {
        let name = format!("key-{number}");
        return Ok(ApiKey {
            name,
            sha256: hash(entry)?,
            scopes: vec![Scope::Admin],
            limits: KeyLimits::default(),
        });
    };
    let (name, scopes) = match head.split_once(':') {
        Some((name, scopes)) => (name, scopes.split('+').map(scope).collect::<anyhow::Result<Vec<_>>>()?),
        None => (head, vec![Scope::Admin]),
    };
    if !is_name(name) {
        bail!("what is before its '=' is no name; use NAME=KEY or NAME:generate+train=KEY");
    }
    Ok(ApiKey { name: name.to_owned(), sha256: hash(key)?, scopes, limits: KeyLimits::default() })
}

fn scope(text: &str) -> anyhow::Result<Scope> {
    let known = Scope::ALL.into_iter().find(|scope| scope.as_str() == text);
    known.ok_or_else(|| anyhow!("it has a scope that is not known; use generate, train, rl or admin"))
}

/// The hash of a key, or the one that is written out.
fn hash(key: &str) -> anyhow::Result<[u8; 32]> {
    if let Some(hex) = key.strip_prefix("sha256:") {
        let digits = hex.as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = match digits.iter().all(u8::is_ascii_hexdigit) {
            true => digits.chunks(2).map(byte).collect(),
            false => None,
        };
        return bytes.filter(|_| digits.len() == 64).and_then(|bytes| bytes.try_into().ok()).ok_or_else(
            || {
                anyhow!(
                    "sha256: must be followed by 64 hexadecimal digits, as from: printf %s KEY | sha256sum"
                )
            },
        );
    }
    let body = key.trim_end_matches('=');
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/".contains(&b);
    if body.is_empty() || !body.bytes().all(plain) {
        bail!("the key has characters that no Bearer token can have; use letters, digits and -._~+/");
    }
    if !(MIN_KEY_CHARS..=MAX_KEY_CHARS).contains(&key.len()) {
        bail!(
            "the key must have {MIN_KEY_CHARS} to {MAX_KEY_CHARS} characters; make one with: openssl rand -hex 24"
        );
    }
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(digest(&SHA256, key.as_bytes()).as_ref());
    Ok(sha256)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TypedFile {
    keys: Vec<TypedKey>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TypedKey {
    name: String,
    key: String,
    scopes: Vec<Scope>,
    requests_per_minute: Option<u32>,
    burst: Option<u32>,
    max_concurrent: Option<u32>,
}

/// Words of the file's own that messages may repeat; what else is quoted may be a key in the wrong place.
const OWN_WORDS: [&str; 11] = [
    "keys",
    "name",
    "key",
    "scopes",
    "requests_per_minute",
    "burst",
    "max_concurrent",
    "generate",
    "train",
    "rl",
    "admin",
];

fn of_file(path: &Path) -> anyhow::Result<Vec<ApiKey>> {
    use std::io::Read as _;
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        let read = std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
        match read as u64 > MAX_FILE_BYTES {
            true => Err(std::io::Error::other("it has more than 1 MiB")),
            false => Ok(text),
        }
    };
    let text = read().context("cannot be read; correct the path or its rights")?;
    let typed: TypedFile = yaml::read(&text).map_err(|error| {
        anyhow!("{}; configs/api_keys.example.yaml shows how it is written", hidden(&error.to_string()))
    })?;
    if typed.keys.is_empty() {
        bail!("keys has no entry; give at least one key, or leave --api-keys-file out");
    }
    typed
        .keys
        .into_iter()
        .enumerate()
        .map(|(i, key)| {
            let place = match is_name(&key.name) {
                true => format!("the key {}", key.name),
                false => format!("keys, entry {}", i + 1),
            };
            key.resolve().with_context(|| place)
        })
        .collect()
}

impl TypedKey {
    fn resolve(self) -> anyhow::Result<ApiKey> {
        if !is_name(&self.name) {
            bail!("name must have 1 to 64 letters, digits, '.', '-' and '_'");
        }
        if self.scopes.is_empty() {
            bail!("scopes is empty; list what it may be used for: generate, train, rl or admin");
        }
        if self.burst == Some(0) {
            bail!("burst must be at least 1; leave it out for as many as requests_per_minute");
        }
        if self.burst.is_some() && self.requests_per_minute == Some(0) {
            bail!("burst means nothing while requests_per_minute is 0; leave one of them out");
        }
        let limits = KeyLimits {
            requests_per_minute: self.requests_per_minute,
            burst: self.burst,
            max_concurrent: self.max_concurrent,
        };
        let sha256 = hash(&self.key).context("key")?;
        Ok(ApiKey { name: self.name, sha256, scopes: self.scopes, limits })
    }
}

/// A message with what it quotes hidden, unless it is one of the file's own words.
fn hidden(message: &str) -> String {
    let mut shown = String::new();
    let mut rest = message;
    while let Some(start) = rest.find(['"', '`']) {
        let quote = &rest[start..=start];
        let Some(length) = rest[start + 1..].find(quote) else { break };
        let (before, quoted) = (&rest[..start], &rest[start + 1..start + 1 + length]);
        let word = if OWN_WORDS.contains(&quoted) { quoted } else { "[hidden]" };
        shown += &format!("{before}{quote}{word}{quote}");
        rest = &rest[start + length + 2..];
    }
    // A quote without its end hides all that follows.
    match rest.find(['"', '`']) {
        Some(start) => shown + &rest[..start] + "[hidden]",
        None => shown + rest,
    }
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;

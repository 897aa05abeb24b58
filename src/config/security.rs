//! Who may reach the server and how much each may ask for: the settings of keys, limits, connections, TLS and other
//! origins, resolved together because they depend on each other. Reads the files of keys and certificates and opens
//! no socket.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;

use super::keys::{ApiKeys, KeySources, Scope};
use super::origin::Sourced;
use super::tls::TlsFiles;

/// As typed, one of a kind.
pub(super) struct TypedSecurity<'a> {
    /// Text of the variable with keys.
    pub(super) keys: Option<String>,
    pub(super) api_keys_file: &'a Sourced<Option<PathBuf>>,
    pub(super) rate_limit: &'a Sourced<u32>,
    pub(super) max_concurrent: &'a Sourced<u32>,
    pub(super) max_connections: &'a Sourced<u32>,
    pub(super) request_timeout: &'a Sourced<u64>,
    pub(super) cors_origins: &'a Sourced<String>,
    pub(super) tls_cert: &'a Sourced<Option<PathBuf>>,
    pub(super) tls_key: &'a Sourced<Option<PathBuf>>,
}

/// Resolved.
#[derive(Debug, Clone)]
pub struct Security {
    /// Where keys come from, to read them anew.
    pub key_sources: KeySources,
    /// The keys that there were when the settings were resolved.
    pub keys: ApiKeys,
    /// `--rate-limit`: requests a minute for each key; 0 is no bound.
    pub rate_limit: u32,
    /// `--max-concurrent`: requests under way for each key; 0 is no bound.
    pub max_concurrent: u32,
    /// `--max-connections`.
    pub max_connections: usize,
    /// `--request-timeout`: until an answer begins.
    pub request_timeout: Duration,
    /// `--cors-origins`.
    pub cors_origins: CorsOrigins,
    /// `--tls-cert` and `--tls-key`.
    pub tls: Option<TlsFiles>,
}

/// Pages of which origins a browser lets read answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CorsOrigins {
    /// None but our own.
    #[default]
    None,
    /// These, as browsers send them: `https://example.org`.
    List(Vec<String>),
    /// All.
    Any,
}

impl Security {
    /// # Errors
    /// A value out of its range, or a file that cannot be used, with its place.
    pub(super) fn resolve(typed: TypedSecurity<'_>) -> anyhow::Result<Self> {
        let key_sources = KeySources::new(typed.keys.as_deref(), typed.api_keys_file.value.clone())?;
        let keys = key_sources.load()?;
        let tls = match (&typed.tls_cert.value, &typed.tls_key.value) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert: cert.clone(), key: key.clone() }),
            (None, None) => None,
            (Some(_), None) => {
                return Err(typed.tls_cert.error("needs its key as well; give --tls-key too"));
            }
            (None, Some(_)) => {
                return Err(typed.tls_key.error("needs its certificate as well; give --tls-cert too"));
            }
        };
        if let Some(tls) = &tls {
            tls.load()?;
        }
        Ok(Self {
            key_sources,
            keys,
            rate_limit: typed.rate_limit.within(0, 1_000_000)?,
            max_concurrent: typed.max_concurrent.within(0, 65_536)?,
            max_connections: typed.max_connections.within(1, 1_000_000)? as usize,
            request_timeout: Duration::from_secs(typed.request_timeout.within(1, 86_400)?),
            cors_origins: typed.cors_origins.convert(|text| origins(text))?,
            tls,
        })
    }

    /// That whoever reaches `host` has to identify, or that it is accepted otherwise.
    ///
    /// # Errors
    /// Anyone could use the server.
    pub(super) fn check_host(
        &self,
        host: &Sourced<String>,
        address: IpAddr,
        open: bool,
    ) -> anyhow::Result<()> {
        if address.is_loopback() || open || !self.keys.is_empty() {
            return Ok(());
        }
        Err(host.error(format_args!(
            "{address} can be reached from other machines, and there are no API keys: anyone there could use the \
             server. Set GURUKUL_API_KEYS or --api-keys-file, or use 127.0.0.1, or say --insecure-no-auth to accept \
             that"
        )))
    }

    /// Lines for `check-config`: who may what, and what to think about. Names and no keys.
    pub fn describe(&self) -> String {
        let mut text = match self.keys.is_empty() {
            true => "# No API keys: whoever reaches the server may do everything.".to_owned(),
            false => format!("# API keys: {}", self.keys.keys().len()),
        };
        for key in self.keys.keys() {
            let scopes: Vec<&str> = key.scopes().iter().map(|scope: &Scope| scope.as_str()).collect();
            // Writing to a string does not fail.
            let _ = write!(text, "\n#   {}: {}", key.name(), scopes.join(", "));
        }
        if let Some(tls) = &self.tls {
            let _ = write!(text, "\n# TLS: {} can be used", tls.cert.display());
        }
        if self.cors_origins == CorsOrigins::Any {
            text += "\n# Warning: cors_origins is \"*\": pages of every origin may use the server from a browser that \
                     reaches it.";
        }
        text
    }
}

/// A list with commas. Browsers compare origins letter by letter, so one with a path would never match.
fn origins(text: &str) -> anyhow::Result<CorsOrigins> {
    let list: Vec<&str> = text.split(',').map(str::trim).filter(|origin| !origin.is_empty()).collect();
    match list[..] {
        [] => return Ok(CorsOrigins::None),
        ["*"] => return Ok(CorsOrigins::Any),
        _ => {}
    }
    let check = |origin: &&str| -> anyhow::Result<String> {
        let host = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.:[]".contains(&b);
        match host.is_some_and(|host| !host.is_empty() && host.bytes().all(plain)) {
            true => Ok((*origin).to_owned()),
            false => Err(anyhow!(
                "'{}' is no origin; write it as browsers send it, in small letters and without a path, as in \
                 https://example.org, or * alone for all",
                origin.chars().take(80).collect::<String>().escape_debug()
            )),
        }
    };
    list.iter().map(check).collect::<anyhow::Result<_>>().map(CorsOrigins::List)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_as_browsers_send_them() {
        assert_eq!(origins("").unwrap(), CorsOrigins::None);
        assert_eq!(origins(" * ").unwrap(), CorsOrigins::Any);
        let list = origins("https://a.example, http://localhost:3000,http://[::1]:80").unwrap();
        let expected = ["https://a.example", "http://localhost:3000", "http://[::1]:80"].map(str::to_owned);
        assert_eq!(list, CorsOrigins::List(expected.to_vec()));
        for bad in [
            "a.example",
            "https://",
            "https://a.example/",
            "https://A.example",
            "*, https://a",
            "null",
            "ws://a",
        ] {
            let message = origins(bad).unwrap_err().to_string();
            assert!(message.contains("https://example.org"), "{bad}: {message}");
        }
    }
}

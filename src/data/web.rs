//! What every source behind HTTP shares: clients, the words of failures, the headers that say which bytes an answer
//! holds. Knows neither a hub nor a source.

use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, LAST_MODIFIED, RETRY_AFTER,
};
use reqwest::{Response, Url};

/// A client that follows no redirect: what belongs to a request depends on where it goes, so its caller follows.
///
/// # Errors
/// TLS cannot be set up; the words say what to install.
pub(crate) fn client(url: &Url, connect: Duration, idle: Duration) -> Result<reqwest::Client, String> {
    // Fails when somebody installed a provider before, which then serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut headers = HeaderMap::new();
    // A compressed answer would have another length, and ranges of it another meaning.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("gurukul/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .connect_timeout(connect)
        .read_timeout(idle)
        .redirect(reqwest::redirect::Policy::none());
    if is_loopback(url) {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| {
        format!(
            "cannot set up TLS ({}); install the system's root certificates (Debian: apt-get install \
             ca-certificates) or name a file of them in SSL_CERT_FILE",
            words(error)
        )
    })
}

/// What messages may say of a text that should be an address: without user, password and query, whatever it is.
pub(crate) fn bare(text: &str) -> String {
    let text = text.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), text),
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    format!("{scheme}{host}{path}")
}

/// Whether an address is this machine's own, where no proxy could reach it.
pub(super) fn is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(|host| host == "localhost" || host.starts_with("127.") || host == "[::1]")
}

/// An error with its causes and without the address, whose query may hold what is not for messages.
pub(crate) fn words(error: reqwest::Error) -> String {
    chain(&error.without_url())
}

/// An error with those of its causes that it does not repeat itself.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

/// Where a redirect leads: another http or https address, and never from https to http.
pub(super) fn redirect(response: &Response, url: &Url) -> Result<Url, String> {
    let target = header(response, "location").and_then(|text| url.join(text).ok());
    let target = target
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| format!("answered {} to nowhere", response.status()))?;
    if url.scheme() == "https" && target.scheme() != "https" {
        return Err("leads from https to http; correct the address".into());
    }
    Ok(target)
}

/// A header's text.
pub(super) fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    Some(response.headers().get(name)?.to_str().ok()?.trim())
}

/// Bytes of the answer's body, where it says.
pub(super) fn content_length(response: &Response) -> Option<u64> {
    header(response, CONTENT_LENGTH.as_str())?.parse().ok()
}

/// First byte, byte after the last, and length of the whole, of an answer with a range.
pub(super) fn content_range(response: &Response) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = header(response, CONTENT_RANGE.as_str())?.strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.split_once('-')?;
    Some((start.parse().ok()?, last.parse::<u64>().ok()?.checked_add(1)?, total.parse().ok()))
}

/// How long the server asks to wait, in seconds or until a date; at most `most`.
pub(crate) fn retry_after(response: &Response, most: Duration) -> Option<Duration> {
    wait_of(header(response, RETRY_AFTER.as_str())?, most)
}

/// What a `Retry-After` says.
pub(super) fn wait_of(text: &str, most: Duration) -> Option<Duration> {
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
            let wait = date.duration_since(jiff::Timestamp::now());
            Duration::try_from(wait).unwrap_or_default()
        }
    };
    Some(wait.min(most))
}

/// What tells this version of the bytes from another: a strong entity tag, else the date of the last change. Both
/// serve for `If-Range`; a weak tag says nothing about bytes.
pub(super) fn version(response: &Response) -> Option<&str> {
    header(response, ETAG.as_str())
        .filter(|tag| tag.starts_with('"'))
        .or_else(|| header(response, LAST_MODIFIED.as_str()))
}

#[cfg(test)]
mod tests {
    use super::bare;

    #[test]
    fn messages_say_addresses_without_secrets() {
        for (text, expected) in [
            ("https://h/a?token=s#x", "https://h/a"),
            ("ftp://user:pass@h:1/a@b", "ftp://h:1/a@b"),
            ("user:pass@h", "h"),
            ("nonsense", "nonsense"),
            ("", ""),
        ] {
            assert_eq!(bare(text), expected, "{text}");
        }
    }
}

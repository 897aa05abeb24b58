//! `gurukul health`: asks a server whether it is ready to answer, for a container's health check, where there is no curl.
//! Exit code 0 when it is, 1 when it is not or does not answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::app::CannotStart;
use crate::config::Settings;

/// Whom to ask.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Server to ask, as http://127.0.0.1:8110; the one of these settings when left away
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Seconds to wait for the answer
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout: u64,
}

pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let scheme = if settings.security.tls.is_some() { "https" } else { "http" };
    let own = || format!("{scheme}://{}", reachable(settings.host, settings.port));
    let url = args.url.clone().unwrap_or_else(own);
    let url = reqwest::Url::parse(&url).with_context(|| format!("--url {url}")).context(CannotStart)?;
    // Fails when somebody installed a provider before, which then serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(args.timeout))
        // This machine's own server has a certificate for the name that others know it by. Nothing secret is sent.
        .tls_danger_accept_invalid_certs(args.url.is_none());
    let client = client.build().context("the HTTP client cannot be built").context(CannotStart)?;
    super::runtime()?.block_on(ask(&client, &url))?;
    super::print("ready\n")
}

/// A server that listens everywhere is asked on this machine's own address.
fn reachable(host: IpAddr, port: u16) -> SocketAddr {
    let host = match host {
        IpAddr::V4(any) if any.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(any) if any.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        host => host,
    };
    SocketAddr::new(host, port)
}

async fn ask(client: &reqwest::Client, url: &reqwest::Url) -> anyhow::Result<()> {
    let url = url.join("/health/ready")?;
    let answer = client.get(url.clone()).send().await.with_context(|| format!("no answer from {url}"))?;
    ensure!(answer.status().is_success(), "{url} answered {}: the server is not ready", answer.status());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_listens_everywhere_is_asked_here() {
        let of = |host: &str| reachable(host.parse().expect("is an address"), 8110).to_string();
        assert_eq!(of("0.0.0.0"), "127.0.0.1:8110");
        assert_eq!(of("::"), "[::1]:8110");
        assert_eq!(of("10.1.2.3"), "10.1.2.3:8110");
    }
}

//! A client for S3. Credentials come from the environment and the places that AWS' own programs read, and from
//! nowhere else.

use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::imds;
use aws_config::provider_config::ProviderConfig;
use aws_config::{BehaviorVersion, Region};
use aws_smithy_http_client::{Builder, tls};

/// How long a machine's own credentials are looked for: outside of Amazon's nobody answers there.
const INSTANCE_PATIENCE: Duration = Duration::from_secs(1);
/// The region that servers of one's own call themselves.
const ANY_REGION: &str = "us-east-1";

/// Where a bucket is.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct S3Access {
    /// The region; that of the environment when none is given.
    pub(crate) region: Option<String>,
    /// The server, where it is not Amazon's.
    pub(crate) endpoint_url: Option<String>,
    /// Put the bucket into the path and not into the host's name.
    pub(crate) force_path_style: bool,
}

/// A client. Nothing is asked of the server yet, and credentials are looked for with the first request.
///
/// # Errors
/// No region is known: what to set.
pub(crate) async fn client(access: &S3Access) -> Result<aws_sdk_s3::Client, String> {
    let http = Builder::new()
        .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
        .build_https();
    let providers = ProviderConfig::default().with_http_client(http.clone());
    let instance = imds::Client::builder()
        .configure(&providers)
        .connect_timeout(INSTANCE_PATIENCE)
        .read_timeout(INSTANCE_PATIENCE)
        .max_attempts(1)
        .build();
    let mut region = access.region.clone().map(Region::new);
    if region.is_none() && access.endpoint_url.is_some() {
        region = Some(Region::new(ANY_REGION));
    }
    let chain = DefaultCredentialsChain::builder().configure(providers).imds_client(instance);
    let chain = match region.clone() {
        Some(region) => chain.region(region).build().await,
        None => chain.build().await,
    };
    let mut loader =
        aws_config::defaults(BehaviorVersion::latest()).http_client(http).credentials_provider(chain);
    if let Some(region) = region {
        loader = loader.region(region);
    }
    if let Some(url) = &access.endpoint_url {
        loader = loader.endpoint_url(url);
    }
    let shared = loader.load().await;
    if shared.region().is_none() {
        return Err("no region is known; set region here, or AWS_REGION in the environment".into());
    }
    let config = aws_sdk_s3::config::Builder::from(&shared).force_path_style(access.force_path_style).build();
    Ok(aws_sdk_s3::Client::from_conf(config))
}

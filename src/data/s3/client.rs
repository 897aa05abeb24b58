//! A client for S3 and what speaks like it: credentials, region and timeouts by Amazon's own rules, and its errors
//! in plain words. Knows neither sources nor what is read or written.

use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::environment::region::EnvironmentVariableRegionProvider;
use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::{
    ProvideCredentials as _, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    SharedCredentialsProvider, SharedHttpClient,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};
use aws_smithy_http_client::{Builder, Connector};
use reqwest::Url;
use serde::{Deserialize, Serialize};

use crate::data::web;

/// For a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// For the first byte of an answer.
const READ: Duration = Duration::from_secs(30);
/// For the instance's metadata, which answers at once or is not there.
const METADATA: Duration = Duration::from_secs(1);
/// Attempts of a request, the first one counted; the waits between them grow and are jittered.
const ATTEMPTS: u32 = 5;
/// Before the second attempt, at most.
const BACKOFF: Duration = Duration::from_millis(500);

/// Which store, and how it is spoken to. Credentials are no part of it: they come from the environment, the profile
/// (`~/.aws/config`, `~/.aws/credentials`, `AWS_PROFILE`), a web identity, the container or the instance, in this order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3Access {
    /// Such as `ap-south-1`; else `AWS_REGION`, the profile's, the instance's. With `endpoint_url` alone `us-east-1`,
    /// which other stores take for any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Address of a store that is not Amazon's, such as `http://127.0.0.1:9000`; else `AWS_ENDPOINT_URL_S3` or
    /// `AWS_ENDPOINT_URL`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_url: Option<String>,
    /// Whether the bucket is the first part of the path and not of the host's name, as MinIO and others need it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force_path_style: bool,
}

impl S3Access {
    /// What can be said without asking anybody.
    ///
    /// # Errors
    /// A region or an address that cannot be one; the words name the key.
    pub(crate) fn check(&self) -> Result<(), String> {
        if let Some(region) = &self.region
            && (region.is_empty() || !region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
        {
            return Err(format!("region: '{region}' is no region; write it as in ap-south-1"));
        }
        self.endpoint().map(|_| ())
    }

    fn endpoint(&self) -> Result<Option<Url>, String> {
        let Some(text) = &self.endpoint_url else { return Ok(None) };
        let url =
            Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let url =
            url.ok_or("endpoint_url is no http or https address; write it as in http://127.0.0.1:9000")?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
            return Err(
                "endpoint_url must hold neither a name, a password nor a query; credentials come from the \
                        environment or the AWS profile"
                    .into(),
            );
        }
        Ok(Some(url))
    }
}

/// A client with credentials. Finding them may ask the container or the instance, for a second each at most.
///
/// # Errors
/// Neither a region nor credentials are known, or what was found is no good. The words say what to set.
pub(crate) async fn client(access: &S3Access) -> Result<aws_sdk_s3::Client, String> {
    access.endpoint()?;
    let provider = ProviderConfig::without_region().with_http_client(http_client(ProxyConfig::from_env()));
    // Its address is of this machine's own network, where no proxy gets to.
    let own = ProviderConfig::without_region().with_http_client(http_client(ProxyConfig::disabled()));
    let metadata = aws_config::imds::Client::builder()
        .configure(&own)
        .max_attempts(1)
        .connect_timeout(METADATA)
        .read_timeout(METADATA)
        .build();
    let region = region(access, &provider, &metadata).await?;
    let provider = provider.with_region(Some(region.clone()));
    let chain = DefaultCredentialsChain::builder()
        .configure(provider)
        .region(region.clone())
        .imds_client(metadata)
        .build()
        .await;
    let credentials = SharedCredentialsProvider::new(chain);
    // Asked here, because a failure at the first request would be told as one of the connection.
    credentials.provide_credentials().await.map_err(|error| {
        format!(
            "no AWS credentials ({}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile \
             of ~/.aws/credentials",
            web::chain(&error)
        )
    })?;
    connect(access, region, credentials).await
}

/// A client with these credentials.
///
/// # Errors
/// The address of the store is none.
pub(super) async fn connect(
    access: &S3Access,
    region: Region,
    credentials: SharedCredentialsProvider,
) -> Result<aws_sdk_s3::Client, String> {
    let endpoint = access.endpoint()?;
    let proxy = match &endpoint {
        Some(url) if web::is_loopback(url) => ProxyConfig::disabled(),
        _ => ProxyConfig::from_env(),
    };
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).read_timeout(READ).build();
    let retries = RetryConfig::standard().with_max_attempts(ATTEMPTS).with_initial_backoff(BACKOFF);
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client(proxy))
        .region(region)
        .credentials_provider(credentials)
        .timeout_config(timeouts)
        .retry_config(retries)
        // A body is read as fast as its reader wants it; who reads has a timeout of its own.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        // Stores that are not Amazon's know the newer checksums by chance; what is needed is still sent.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(url) = endpoint {
        loader = loader.endpoint_url(url);
    }
    let config = aws_sdk_s3::config::Builder::from(&loader.load().await)
        .force_path_style(access.force_path_style)
        .build();
    Ok(aws_sdk_s3::Client::from_conf(config))
}

async fn region(
    access: &S3Access,
    provider: &ProviderConfig,
    metadata: &aws_config::imds::Client,
) -> Result<Region, String> {
    if let Some(region) = &access.region {
        return Ok(Region::new(region.clone()));
    }
    let stated = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::builder().configure(provider).build());
    if let Some(region) = stated.region().await {
        return Ok(region);
    }
    if access.endpoint_url.is_some() {
        return Ok(Region::from_static("us-east-1"));
    }
    let instance = ImdsRegionProvider::builder().configure(provider).imds_client(metadata.clone()).build();
    instance
        .region()
        .await
        .ok_or_else(|| "region is missing; set it in the source, or AWS_REGION in the environment".into())
}

/// HTTP with rustls and ring, whatever features of the SDK are on.
fn http_client(proxy: ProxyConfig) -> SharedHttpClient {
    Builder::new().build_with_connector_fn(move |settings, _| {
        let mut connector = Connector::builder()
            .proxy_config(proxy.clone())
            .tls_provider(tls::Provider::Rustls(CryptoMode::Ring));
        if let Some(settings) = settings {
            connector = connector.connector_settings(settings.clone());
        }
        connector.build()
    })
}

/// What a failed request means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct S3Failure {
    /// For the user: what went wrong and what to do.
    pub(crate) message: String,
    /// The store's status, where it answered.
    pub(crate) status: Option<u16>,
    /// The store's own code, such as `NoSuchBucket`.
    pub(crate) code: Option<String>,
}

/// Puts a failure into words. `what` is the bucket or the object as `s3://bucket/key`.
pub(crate) fn explain<E>(error: &SdkError<E, HttpResponse>, what: &str, access: &S3Access) -> S3Failure
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let store = access.endpoint_url.as_deref().unwrap_or("Amazon S3");
    let Some(response) = error.raw_response() else {
        let reason = web::chain(error);
        let message =
            format!("{store} cannot be reached for {what} ({reason}); check endpoint_url and the network");
        return S3Failure { message, status: None, code: None };
    };
    let status = response.status().as_u16();
    let code = error.code().filter(|code| !code.is_empty());
    let bucket_region = response.headers().get("x-amz-bucket-region");
    let said = error.message().map(|said| format!(" It says: {said}")).unwrap_or_default();
    let remedy = match (code.unwrap_or_default(), status) {
        ("NoSuchBucket", _) => "there is no such bucket; correct bucket, region or endpoint_url".to_owned(),
        ("NoSuchKey" | "NotFound", _) | ("", 404) => {
            "there is no such object or bucket; correct bucket and keys".to_owned()
        }
        ("ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired", _) => {
            "the credentials have expired; get new ones (AWS_SESSION_TOKEN is of a limited time) and resume".to_owned()
        }
        ("InvalidAccessKeyId", _) => "the store does not know this access key; correct AWS_ACCESS_KEY_ID, and \
                                      endpoint_url if the key is of another store"
            .to_owned(),
        ("SignatureDoesNotMatch", _) => {
            "the secret does not fit the access key; correct AWS_SECRET_ACCESS_KEY".to_owned()
        }
        ("InvalidToken", _) => "AWS_SESSION_TOKEN is not valid; correct it, or unset it where none is needed".to_owned(),
        ("RequestTimeTooSkewed", _) => "this machine's clock is wrong; set it".to_owned(),
        (
            "PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException"
            | "TemporaryRedirect",
            _,
        )
        | ("", 301 | 307) => match bucket_region {
            Some(region) => format!("the bucket is in another region; set region: {region}"),
            None => "the bucket is in another region, or the store has another address; correct region and \
                     endpoint_url"
                .to_owned(),
        },
        ("AccessDenied", _) | ("", 401 | 403) => {
            "access is denied; the credentials need the rights s3:ListBucket on the bucket and s3:GetObject on its \
             objects"
                .to_owned()
        }
        ("PreconditionFailed", _) | (_, 412) => "the object was changed while it was read; start anew".to_owned(),
        ("SlowDown" | "ServiceUnavailable" | "InternalError", _) | (_, 500..=599) => {
            "the store is failing or too busy; try again later".to_owned()
        }
        _ => "the store refused the request".to_owned(),
    };
    let code_text = code.map_or_else(String::new, |code| format!(" {code}"));
    let message = format!("{what}: {remedy} ({store} answered {status}{code_text}).{said}");
    S3Failure { message, status: Some(status), code: code.map(str::to_owned) }
}

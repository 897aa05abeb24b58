//! Uploads into an S3 bucket: in one request, or in parts where they are large. Never writes over an object.

use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};

use tokio::io::AsyncReadExt as _;

use super::{Parcel, Refusal, unreadable};
use crate::config::rl_sinks::S3Sink;
use crate::data::s3::client::{S3Access, client};

/// Uploads above this size go in parts.
const LARGE_BYTES: u64 = 16 << 20;
/// Size of a part, as long as that makes no more than [`MAX_PARTS`].
const PART_BYTES: u64 = 8 << 20;
/// What S3 takes.
const MAX_PARTS: u64 = 10_000;
/// Where an object says what it holds.
const HASH: &str = "sha256";
const CONTENT_TYPE: &str = "application/x-ndjson";

/// The bucket.
#[derive(Debug)]
pub(in crate::rl) struct S3 {
    client: Client,
    /// The same, which tries nothing again by itself: a small object waits for its next turn in the outbox, where it
    /// holds up no other.
    once: Client,
    bucket: String,
}

/// Why an object was not made.
enum Unmade {
    /// Its key is taken.
    Taken,
    Refused(Refusal),
}

impl From<Refusal> for Unmade {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl S3 {
    pub(super) async fn open(sink: &S3Sink) -> Result<Self, Refusal> {
        let access = S3Access {
            region: sink.region.clone(),
            endpoint_url: sink.endpoint_url.clone(),
            force_path_style: sink.force_path_style,
        };
        let client = client(&access).await.map_err(Refusal::Final)?;
        Ok(Self::with(client, sink.bucket.clone()))
    }

    pub(super) fn with(client: Client, bucket: String) -> Self {
        let once = client.config().to_builder().retry_config(RetryConfig::disabled()).build();
        Self { client, once: Client::from_conf(once), bucket }
    }

    /// As [`super::Sink::put`].
    pub(super) async fn put(&self, parcel: &Parcel) -> Result<(), Refusal> {
        let made = match parcel.bytes {
            0..=LARGE_BYTES => self.put_whole(parcel).await,
            _ => self.put_in_parts(parcel).await,
        };
        match made {
            Ok(()) => Ok(()),
            Err(Unmade::Refused(refusal)) => Err(refusal),
            Err(Unmade::Taken) => self.compare(parcel).await,
        }
    }

    async fn put_whole(&self, parcel: &Parcel) -> Result<(), Unmade> {
        let content = tokio::fs::read(&parcel.file).await.map_err(|error| unreadable(parcel, &error))?;
        let put = self.once.put_object().bucket(&self.bucket).key(&parcel.key).if_none_match("*");
        let put = put
            .content_type(CONTENT_TYPE)
            .metadata(HASH, parcel.sha256())
            .checksum_algorithm(ChecksumAlgorithm::Crc32C)
            .body(ByteStream::from(content));
        put.send().await.map(drop).map_err(|error| self.unmade(error))
    }

    async fn put_in_parts(&self, parcel: &Parcel) -> Result<(), Unmade> {
        let create = self.client.create_multipart_upload().bucket(&self.bucket).key(&parcel.key);
        let create = create
            .content_type(CONTENT_TYPE)
            .metadata(HASH, parcel.sha256())
            .checksum_algorithm(ChecksumAlgorithm::Crc32C);
        let created = create.send().await.map_err(|error| self.unmade(error))?;
        let upload =
            created.upload_id().ok_or_else(|| Refusal::passing("the server began no upload in parts"))?;
        let made = self.put_parts(parcel, upload).await;
        if made.is_err() {
            // What was begun would be kept, and paid for, without an end. Where this fails, the bucket's own rule for
            // incomplete uploads has to.
            let abort = self.client.abort_multipart_upload().bucket(&self.bucket).key(&parcel.key);
            if let Err(error) = abort.upload_id(upload).send().await {
                let reason = DisplayErrorContext(&error).to_string();
                tracing::debug!(
                    key = parcel.key,
                    reason,
                    "the parts of an upload that failed may still be there"
                );
            }
        }
        made
    }

    async fn put_parts(&self, parcel: &Parcel, upload: &str) -> Result<(), Unmade> {
        let file = tokio::fs::File::open(&parcel.file).await.map_err(|error| unreadable(parcel, &error))?;
        let part_bytes = PART_BYTES.max(parcel.bytes.div_ceil(MAX_PARTS));
        let mut file = file.take(parcel.bytes);
        let mut parts = Vec::new();
        for number in 1.. {
            let mut content = Vec::new();
            let mut part = (&mut file).take(part_bytes);
            part.read_to_end(&mut content).await.map_err(|error| unreadable(parcel, &error))?;
            if content.is_empty() {
                break;
            }
            let send = self.client.upload_part().bucket(&self.bucket).key(&parcel.key).upload_id(upload);
            let send = send.part_number(number).checksum_algorithm(ChecksumAlgorithm::Crc32C);
            let sent =
                send.body(ByteStream::from(content)).send().await.map_err(|error| self.unmade(error))?;
            let part = CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag);
            parts.push(part.set_checksum_crc32_c(sent.checksum_crc32_c).build());
        }
        let complete = self.client.complete_multipart_upload().bucket(&self.bucket).key(&parcel.key);
        let complete = complete
            .upload_id(upload)
            .if_none_match("*")
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build());
        complete.send().await.map(drop).map_err(|error| self.unmade(error))
    }

    /// Whether the object that is there is this upload.
    async fn compare(&self, parcel: &Parcel) -> Result<(), Refusal> {
        let is_by_content = parcel.key.contains(parcel.sha256());
        let head = self.client.head_object().bucket(&self.bucket).key(&parcel.key).send().await;
        let there = match head {
            Ok(there) => there,
            // Credentials that may write alone: the key must do.
            Err(error) if status_of(&error) == Some(403) && (is_by_content || parcel.may_be_there) => {
                return Ok(());
            }
            Err(error) if status_of(&error) == Some(404) => {
                return Err(Refusal::passing("the object was there and is gone"));
            }
            Err(error) => {
                return match self.unmade(error) {
                    Unmade::Refused(refusal) => Err(refusal),
                    Unmade::Taken => Err(Refusal::passing("the object cannot be looked at")),
                };
            }
        };
        let hash = there.metadata().and_then(|metadata| metadata.get(HASH));
        let is_same = hash.map_or(is_by_content, |hash| hash == parcel.sha256());
        if is_same && there.content_length() == i64::try_from(parcel.bytes).ok() {
            return Ok(());
        }
        Err(Refusal::Final(format!(
            "the bucket {} has another object under {}, and nothing is written over; move it away, or choose another \
             key",
            self.bucket, parcel.key
        )))
    }

    /// What an error of the client means.
    fn unmade<E: ProvideErrorMetadata + std::error::Error + 'static>(
        &self,
        error: SdkError<E, HttpResponse>,
    ) -> Unmade {
        let code = error.code().unwrap_or_default().to_owned();
        let Some(status) = status_of(&error) else {
            // No answer: no connection, a cut one, a slow server, no credentials. All may change.
            let reason = DisplayErrorContext(&error).to_string();
            let reason = match reason.to_ascii_lowercase().contains("credential") {
                true => {
                    "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or any of \
                         the ways that AWS' own programs know"
                        .into()
                }
                false => format!("no answer: {}", reason.chars().take(400).collect::<String>()),
            };
            return Refusal::passing(reason).into();
        };
        if status == 412 {
            return Unmade::Taken;
        }
        let said: String = error.message().unwrap_or_default().chars().take(200).collect();
        let separator = if said.is_empty() { "" } else { ": " };
        let reason = format!("the server answered {status} {code}{separator}{said}");
        let expired = ["ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"];
        match (status, code.as_str()) {
            (_, code) if expired.contains(&code) => {
                Refusal::passing(format!("{reason}; the credentials have expired, renew them"))
            }
            (_, "RequestTimeTooSkewed") => Refusal::passing(format!("{reason}; set this machine's clock")),
            (408 | 409 | 425 | 429 | 500..=599, _) => Refusal::passing(reason),
            (_, "RequestTimeout" | "SlowDown" | "BadDigest" | "IncompleteBody" | "NoSuchUpload") => {
                Refusal::passing(reason)
            }
            (_, "NoSuchBucket") => {
                let bucket = &self.bucket;
                Refusal::Final(format!("{reason}; make the bucket {bucket}, or correct its name"))
            }
            (301 | 307, _) | (_, "AuthorizationHeaderMalformed") => {
                Refusal::Final(format!("{reason}; correct the region or the endpoint_url"))
            }
            (401 | 403, _) => Refusal::Final(format!(
                "{reason}; the credentials in the environment must be good for writing into the bucket {}",
                self.bucket
            )),
            _ => Refusal::Final(reason),
        }
        .into()
    }
}

/// The status of an answer, where there was one.
fn status_of<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    match error {
        SdkError::ServiceError(answer) => Some(answer.raw().status().as_u16()),
        // An answer that is no answer of S3's: a proxy's, or one that was cut.
        SdkError::ResponseError(answer) if !answer.raw().status().is_success() => {
            Some(answer.raw().status().as_u16())
        }
        _ => None,
    }
}

//! Objects of a bucket in S3, or in a store that speaks like it. Knows nothing of rows.

mod client;
#[cfg(test)]
mod tests;

use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};

pub use self::client::S3Access;
pub(crate) use self::client::{client, explain};
use super::object::{Object, Opened, Opening, Rows, Stat};
use super::remote::{Answer, Remote, RemoteObject};
use super::retry::Failure;
use super::{Format, decode};

/// The keys of `type: s3`.
///
/// Objects are read in the order of their keys. Credentials come from the AWS chain alone; see [`S3Access`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3Config {
    /// The bucket's name.
    pub bucket: String,
    /// What the keys of the objects begin with, such as `corpus/hi/`. With `format: auto` those whose names tell no
    /// format are passed over. Neither this nor `keys` means the whole bucket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Or the objects themselves, in the order to read them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// See [`S3Access::region`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// See [`S3Access::endpoint_url`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_url: Option<String>,
    /// See [`S3Access::force_path_style`].
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force_path_style: bool,
}

impl S3Config {
    pub(super) fn check(&self) -> Result<(), String> {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
        if self.bucket.is_empty() {
            return Err("bucket is missing; name the bucket without s3:// and without a path".into());
        }
        if self.bucket.len() > 255 || !self.bucket.bytes().all(fits) {
            return Err(format!(
                "bucket: '{}' is no name of a bucket; write it without s3:// and without a path",
                self.bucket
            ));
        }
        if self.prefix.is_some() && !self.keys.is_empty() {
            return Err("give either prefix or keys, not both".into());
        }
        if self.keys.iter().any(String::is_empty) {
            return Err("keys: one is empty; name objects, as in corpus/part-0.jsonl.gz".into());
        }
        self.access().check()
    }

    fn access(&self) -> S3Access {
        S3Access {
            region: self.region.clone(),
            endpoint_url: self.endpoint_url.clone(),
            force_path_style: self.force_path_style,
        }
    }

    pub(super) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        let access = self.access();
        let client = opening.wait(client(&access))?;
        Ok(Opened { rows: self.rows(client, access, opening), pin: None })
    }

    fn rows(&self, client: Client, access: S3Access, opening: &Opening) -> Rows {
        let bucket = Bucket { client, access, name: self.bucket.clone() };
        if self.keys.is_empty() {
            let prefix = self.prefix.clone().unwrap_or_default();
            return Rows::Files(Box::new(Listing::new(bucket, prefix, opening.clone())));
        }
        let opening = opening.clone();
        let keys = self.keys.clone().into_iter();
        Rows::Files(Box::new(keys.map(move |key| Ok(bucket.object(key, None, &opening)))))
    }
}

#[derive(Clone)]
struct Bucket {
    client: Client,
    access: S3Access,
    name: String,
}

impl Bucket {
    fn object(&self, key: String, stat: Option<Stat>, opening: &Opening) -> Box<dyn Object> {
        let shown = format!("s3://{}/{key}", self.name);
        Box::new(RemoteObject::new(Key { bucket: self.clone(), key, shown, stat }, opening.clone()))
    }
}

/// The objects under a prefix, a page of the listing at a time.
struct Listing {
    bucket: Bucket,
    prefix: String,
    opening: Opening,
    page: std::vec::IntoIter<(String, Stat)>,
    /// Where the next page begins; `None` before the first.
    token: Option<String>,
    ended: bool,
    /// Objects so far, and those that were passed over.
    found: u64,
    passed: u64,
}

impl Listing {
    fn new(bucket: Bucket, prefix: String, opening: Opening) -> Self {
        Self {
            bucket,
            prefix,
            opening,
            page: Vec::new().into_iter(),
            token: None,
            ended: false,
            found: 0,
            passed: 0,
        }
    }

    /// Whether an object is data, as far as its name tells.
    fn fits(&self, key: &str) -> bool {
        // What consoles make to show a folder.
        if key.ends_with('/') {
            return false;
        }
        self.opening.format != Format::Auto || decode::format_of_name(key).is_some()
    }

    fn turn(&mut self) -> Result<(), String> {
        let what = format!("s3://{}/{}", self.bucket.name, self.prefix);
        let request = self.bucket.client.list_objects_v2().bucket(&self.bucket.name);
        let request = request.prefix(&self.prefix).set_continuation_token(self.token.take());
        let access = &self.bucket.access;
        let answer = self
            .opening
            .wait(async { request.send().await.map_err(|error| explain(&error, &what, access).message) })?;
        self.token = answer.next_continuation_token;
        self.ended = self.token.is_none() || answer.is_truncated != Some(true);
        let mut page = Vec::new();
        for object in answer.contents.unwrap_or_default() {
            let Some(key) = object.key else { continue };
            if !self.fits(&key) {
                self.passed += 1;
                continue;
            }
            self.found += 1;
            let length = object.size.and_then(|size| u64::try_from(size).ok());
            page.push((key, Stat { length, version: object.e_tag }));
        }
        self.page = page.into_iter();
        Ok(())
    }
}

impl Iterator for Listing {
    type Item = Result<Box<dyn Object>, String>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((key, stat)) = self.page.next() {
                // Without a tag nothing would hold the object to this version.
                let stat = Some(stat).filter(|stat| stat.version.is_some() && stat.length.is_some());
                return Some(Ok(self.bucket.object(key, stat, &self.opening)));
            }
            if self.ended {
                let (bucket, prefix) = (&self.bucket.name, &self.prefix);
                return (std::mem::replace(&mut self.found, 1) == 0).then(|| {
                    Err(match self.passed {
                        0 => format!("s3://{bucket}/{prefix}: there is no object; correct prefix"),
                        n => format!(
                            "s3://{bucket}/{prefix}: none of the {n} objects has a name that tells its format; set \
                             format, or correct prefix"
                        ),
                    })
                });
            }
            if let Err(message) = self.turn() {
                self.ended = true;
                self.found = 1;
                return Some(Err(message));
            }
        }
    }
}

/// One object.
struct Key {
    bucket: Bucket,
    key: String,
    shown: String,
    /// As the listing had it.
    stat: Option<Stat>,
}

impl Remote for Key {
    fn shown(&self) -> &str {
        &self.shown
    }

    async fn stat(&mut self) -> Result<(Stat, Option<Answer>), Failure> {
        if let Some(stat) = &self.stat {
            return Ok((stat.clone(), None));
        }
        let request = self.bucket.client.head_object().bucket(&self.bucket.name).key(&self.key);
        match request.send().await {
            Ok(head) => {
                let length = head.content_length.and_then(|length| u64::try_from(length).ok());
                Ok((Stat { length, version: head.e_tag }, None))
            }
            Err(error) => {
                let failure = explain(&error, &self.shown, &self.bucket.access);
                if failure.code.is_some() || failure.status.is_none() {
                    return Err(Failure::Final(failure.message));
                }
                // The answer to a HEAD has no body, in which the reason would stand; the whole has one.
                let answer = self.get(0, None, None).await?;
                Ok((answer.stat.clone(), Some(answer)))
            }
        }
    }

    async fn get(&mut self, start: u64, end: Option<u64>, version: Option<&str>) -> Result<Answer, Failure> {
        let range = match (start, end) {
            (0, None) => None,
            (start, None) => Some(format!("bytes={start}-")),
            (start, Some(end)) => Some(format!("bytes={start}-{}", end.saturating_sub(1))),
        };
        let request = self.bucket.client.get_object().bucket(&self.bucket.name).key(&self.key);
        let request = request.set_range(range.clone()).set_if_match(version.map(str::to_owned));
        // The client has tried again as often as it makes sense.
        let output = request.send().await.map_err(|error| {
            let failure = explain(&error, &self.shown, &self.bucket.access);
            match failure.status {
                Some(412) => Failure::changed(),
                _ => Failure::Final(failure.message),
            }
        })?;
        let (first, length) = bytes_of(&output);
        let stat = Stat { length, version: output.e_tag };
        let ranged = range.is_none() || output.content_range.is_some();
        Ok(Answer { start: first, ranged, stat, body: chunks(output.body) })
    }
}

/// The first byte of an answer and the length of the whole object.
fn bytes_of(output: &GetObjectOutput) -> (u64, Option<u64>) {
    let range = output.content_range.as_deref().and_then(|text| {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
    });
    range.unwrap_or((0, output.content_length.and_then(|length| u64::try_from(length).ok())))
}

fn chunks(body: ByteStream) -> futures::stream::BoxStream<'static, Result<tokio_util::bytes::Bytes, String>> {
    let next = |mut body: ByteStream| async move {
        let next = body.next().await?;
        Some((next.map_err(|error| super::web::chain(&error)), body))
    };
    futures::stream::unfold(body, next).boxed()
}

//! A file of a hub, brought to the disk: goes on where an earlier attempt stopped, and checks size and hash.

use std::io::{self, Read as _};
use std::path::Path;

use indicatif::ProgressBar;
use reqwest::{Method, Response, StatusCode, Url};
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

use super::{ATTEMPTS, Asked, Client, Failure, FetchError, Metadata, Repo};
use crate::data::web;

impl Client {
    /// Brings a file to `partial`, going on where an earlier attempt stopped, and checks it. On success `partial`
    /// holds exactly what `meta` promises; it is not synced yet.
    pub(in crate::data::hub) async fn download(
        &self,
        repo: &Repo,
        commit: &str,
        name: &str,
        meta: &Metadata,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), FetchError> {
        let url = self.file_url(repo, commit, name);
        let what = Asked { repo, revision: commit, file: Some(name) };
        let mut had = length(partial);
        // Bytes that this call did not bring may be of another file: then the check fails, and one more try from
        // the first byte is due.
        let mut inherited = had > 0;
        loop {
            self.bring(&url, &what, meta, partial, bar).await?;
            let (path, etag, size) = (partial.to_owned(), meta.etag.clone(), meta.size);
            let sound = tokio::task::spawn_blocking(move || has_content(&path, &etag, size))
                .await
                .expect("hashing does not panic")
                .map_err(|e| FetchError::local(partial, e))?;
            if sound {
                return Ok(());
            }
            std::fs::remove_file(partial).map_err(|e| FetchError::local(partial, e))?;
            if !inherited {
                let etag = &meta.etag;
                return Err(FetchError::Unusable(format!(
                    "{url}: what arrived does not have the hash {etag} that the hub promised; try again, and if it \
                     stays so, the hub or something on the way to it changes the file"
                )));
            }
            tracing::warn!(
                file = name,
                bytes = had,
                "an earlier partial download was damaged; starting over"
            );
            (inherited, had) = (false, 0);
        }
    }

    /// Requests until `partial` has `meta.size` bytes.
    async fn bring(
        &self,
        url: &Url,
        what: &Asked<'_>,
        meta: &Metadata,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), FetchError> {
        let mut failures = 0;
        loop {
            let before = length(partial);
            if before == meta.size && partial.exists() {
                return Ok(());
            }
            match self.bring_once(url, what, meta, partial, bar).await {
                Ok(()) => {}
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transient(failure)) => {
                    failures = if length(partial) > before { 1 } else { failures + 1 };
                    self.wait_or_give_up(url, failures, ATTEMPTS, failure).await?;
                }
            }
        }
    }

    async fn bring_once(
        &self,
        url: &Url,
        what: &Asked<'_>,
        meta: &Metadata,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let local = |e| FetchError::local(partial, e);
        let mut file = tokio::fs::File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(partial)
            .await
            .map_err(local)?;
        let mut position = file.metadata().await.map_err(local)?.len();
        if position > meta.size {
            file.set_len(0).await.map_err(local)?;
            position = 0;
        }
        let range = (position > 0).then(|| format!("bytes={position}-"));
        let mut response = self.send(Method::GET, url, range.as_deref(), what).await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_at(&response, position, meta.size) => {}
            // The whole file, although a part was asked for: the server does not know ranges.
            StatusCode::OK => {
                let announced = web::content_length(&response);
                if announced.is_some_and(|bytes| bytes != meta.size) {
                    return Err(wrong_size(url, meta.size, announced.unwrap_or_default()).into());
                }
                if position > 0 {
                    tracing::info!(url = %url, "the server ignores ranges; starting over");
                    file.set_len(0).await.map_err(local)?;
                    position = 0;
                }
            }
            status => {
                if position > 0 {
                    file.set_len(0).await.map_err(local)?;
                }
                return Err(Failure::transient(format!("answered a range with {status} and another range")));
            }
        }
        file.seek(io::SeekFrom::Start(position)).await.map_err(local)?;
        bar.set_position(position);
        let cut = loop {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    position += chunk.len() as u64;
                    if position > meta.size {
                        drop(file);
                        std::fs::remove_file(partial).map_err(local)?;
                        return Err(wrong_size(url, meta.size, position).into());
                    }
                    file.write_all(&chunk).await.map_err(local)?;
                    bar.set_position(position);
                }
                Ok(None) => break None,
                Err(error) => break Some(web::words(error)),
            }
        };
        // tokio's file writes in the background: what failed there is reported here.
        file.flush().await.map_err(local)?;
        if position < meta.size {
            let reason = cut.unwrap_or_else(|| "the connection ended".into());
            return Err(Failure::transient(format!("{reason} (after {position} of {} bytes)", meta.size)));
        }
        Ok(())
    }
}

fn wrong_size(url: &Url, promised: u64, sent: u64) -> FetchError {
    FetchError::Unusable(format!("{url}: the hub promised {promised} bytes and {sent} came; try again"))
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}

/// Whether a 206 answer is the rest of a file of `size` bytes from `position` on.
fn starts_at(response: &Response, position: u64, size: u64) -> bool {
    web::content_range(response)
        .is_some_and(|(start, _, total)| start == position && total.is_none_or(|total| total == size))
}

/// Whether a file has the size and the hash: SHA-256 for an ETag of 64 hexadecimal digits, git's blob hash for
/// one of 40. Other ETags are no hash of the content, and then the size alone is checked.
fn has_content(path: &Path, etag: &str, size: u64) -> io::Result<bool> {
    let mut file = std::fs::File::open(path)?;
    if file.metadata()?.len() != size {
        return Ok(false);
    }
    let hexadecimal = etag.bytes().all(|b| b.is_ascii_hexdigit());
    let mut hash = match etag.len() {
        64 if hexadecimal => ring::digest::Context::new(&ring::digest::SHA256),
        40 if hexadecimal => {
            let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
            hash.update(format!("blob {size}\0").as_bytes());
            hash
        }
        _ => return Ok(true),
    };
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let found: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(found.eq_ignore_ascii_case(etag))
}

//! Amazon S3 and what speaks its language. Knows nothing of what objects hold.

pub(crate) mod client;

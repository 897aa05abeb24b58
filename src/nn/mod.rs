//! Tensors only: layers, kernels, adapters' low-rank products, the KV cache. Imports nothing of ours.

pub mod attention;
#[cfg(test)]
mod gradient_tests;
pub mod kv_cache;
pub mod linear;
pub mod lora;
pub mod loss;
pub mod norm;
pub(crate) mod ops;
pub(crate) mod optim;
pub mod policy;
pub mod quant;
pub mod rope;

pub use ops::activation::Activation;
pub(crate) use ops::activation::add_scaled;
pub(crate) use ops::dropout::{Dropout, mix64};
pub(crate) use ops::gemm::TrainScratch;

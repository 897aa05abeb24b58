//! Tensors only: layers, kernels, adapters' low-rank products, the KV cache. Imports nothing of ours.

pub mod lora;
pub mod quant;

//! Weights in GGML blocks.

/// How linear weights are quantized while loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantization {
    /// Dense, as `DtypeChoice` says.
    #[default]
    None,
    /// 8-bit, blocks of 32 with one f16 scale.
    Q8_0,
    /// 4-bit, blocks of 32 with one f16 scale.
    Q4_0,
    /// 4-bit, blocks of 256 with 6-bit scales and minima.
    Q4K,
}

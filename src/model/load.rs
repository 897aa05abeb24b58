//! From a model folder to weights on a device.

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA when this build has it and a card is there, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA card of this number.
    Cuda(usize),
}

/// How dense weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DtypeChoice {
    /// As on disk on the CPU; bf16, or f16 below compute capability 8.0, on CUDA.
    #[default]
    Auto,
    /// 32-bit.
    F32,
    /// 16-bit, 10 bits of mantissa.
    F16,
    /// 16-bit, 7 bits of mantissa.
    Bf16,
}

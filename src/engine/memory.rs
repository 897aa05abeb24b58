//! Memory is planned before it is taken: how much there is, and how large the KV cache becomes.

use anyhow::{Result, bail};
use candle_core::Device;

use super::EngineConfig;
use crate::model::decoder::Decoder;
use crate::model::load::Folder;
use crate::nn::kv_cache::PAGE_TOKENS;

/// Context that the default cache keeps for every slot, where the model has that much.
const DEFAULT_TOKENS_PER_SLOT: usize = 2048;

/// Compares the bytes that the weights will take with what is free, before the first is read.
///
/// # Errors
/// Weights that do not fit, with the figures.
pub(super) fn check_weights(folder: &Folder, config: &EngineConfig, device: &Device) -> Result<()> {
    let Some(free) = free_bytes(device) else { return Ok(()) };
    let needed = folder.held_bytes(config.dtype, config.quantize, device);
    if needed > free {
        bail!(
            "the weights need {} MiB and {} MiB are free; choose a smaller --dtype, --quantize q8_0 or q4_0, or a \
             smaller model",
            needed >> 20,
            free >> 20
        );
    }
    Ok(())
}

/// Pages of the KV cache.
///
/// # Errors
/// A cache that does not fit what is free, or that holds too little to be of use; with the figures.
pub(super) fn plan_pages(config: &EngineConfig, model: &Decoder) -> Result<usize> {
    let page_bytes = model.kv_shape().page_bytes(model.activations());
    let free = free_bytes(model.device());
    let context = model.spec().max_positions;
    let mib = |bytes: u64| bytes / (1 << 20);
    let pages = match config.kv_cache_bytes {
        Some(bytes) => {
            if let Some(free) = free
                && bytes > free
            {
                bail!(
                    "--kv-cache {} MiB is more than the {} MiB that are free beside the weights",
                    mib(bytes),
                    mib(free)
                );
            }
            bytes / page_bytes
        }
        None => {
            let wanted = default_pages(config.max_batch, context);
            free.map_or(wanted, |free| wanted.min(free / 3 / page_bytes))
        }
    };
    let least = context.min(8 * PAGE_TOKENS).div_ceil(PAGE_TOKENS) as u64;
    if pages < least {
        bail!(
            "the KV cache would hold {} tokens; at least {} are needed, which take {} KiB: raise --kv-cache or \
             free some memory",
            pages as usize * PAGE_TOKENS,
            least as usize * PAGE_TOKENS,
            (least * page_bytes).div_ceil(1024)
        );
    }
    // More than every slot's full context is never used.
    Ok(pages.min((config.max_batch * context.div_ceil(PAGE_TOKENS)) as u64) as usize)
}

/// Pages that `--kv-cache auto` takes where there is room for them.
pub(super) fn default_pages(max_batch: usize, context: usize) -> u64 {
    let tokens = max_batch * context.min(DEFAULT_TOKENS_PER_SLOT);
    tokens.div_ceil(PAGE_TOKENS) as u64
}

/// Bytes free on the device; `None` where the system does not say.
pub(super) fn free_bytes(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        return candle_core::cuda_backend::cudarc::driver::result::mem_get_info()
            .ok()
            .map(|(free, _)| free as u64);
    }
    let _ = device;
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let available = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    Some(container_free().map_or(available, |limit| limit.min(available)))
}

/// What a container's limit leaves (cgroup 2).
fn container_free() -> Option<u64> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    Some(read("memory.max")?.saturating_sub(read("memory.current")?))
}

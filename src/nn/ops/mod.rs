//! Kernels, one file each. On the CPU they are written here; elsewhere (CUDA) each is composed of candle's
//! operations, and that composition also runs on the CPU, which is how it is tested without a card.
//!
//! Two rules hold for every CPU kernel. A row's result depends on that row alone, never on how many other rows
//! are in the batch: each output element has one fixed order of summation. And the same bits come out on every
//! instruction set: the order is that of 16 lanes, added as a fixed tree, with fused multiply-add throughout.

pub(crate) mod activation;
pub(crate) mod attend;
pub(crate) mod attend_rows;
pub(crate) mod dot;
pub(crate) mod dot_packed;
pub(crate) mod dropout;
pub(crate) mod gemm;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod product;
pub(crate) mod rotary;
pub(crate) mod unpack;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Result, Storage, Tensor};

/// Instruction sets that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2, FMA, F16C.
    Avx2,
    /// What the target guarantees.
    Portable,
}

/// The widest instruction set of this machine; `GURUKUL_ISA=avx2|portable` lowers it, for tests and comparisons.
pub(crate) fn isa() -> Isa {
    static ISA: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
    *ISA.get_or_init(|| {
        let wanted = std::env::var("GURUKUL_ISA").unwrap_or_default();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 && wanted.is_empty() {
                return Isa::Avx512;
            }
            if avx2 && wanted != "portable" {
                return Isa::Avx2;
            }
        }
        let _ = wanted;
        Isa::Portable
    })
}

/// Compiles one function body for each instruction set and calls the widest. The body is plain Rust over slices,
/// which the compiler vectorises.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[expect(unsafe_code, reason = "calling a function compiled for instructions that were just detected")]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::nn::ops::isa() {
                    // SAFETY: `isa` names only what this processor was seen to have.
                    $crate::nn::ops::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::nn::ops::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::nn::ops::Isa::Portable => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Multiply-adds below which waking other threads costs more than it saves.
const PARALLEL_FROM: usize = 40_000;

/// The same for training, whose passes are many small sections: each costs a wait for the slowest thread, which is
/// long where other programs want the cores too.
const PARALLEL_TRAINING_FROM: usize = 1_000_000;

/// [`parallel`] for the many rows of training.
pub(crate) fn parallel_rows(items: usize, work: usize, f: impl Fn(Range<usize>) + Sync) {
    if work < PARALLEL_TRAINING_FROM { f(0..items) } else { parallel(items, work, f) }
}

/// Runs `f` over `0..items` on all threads, or on this one when `work` (multiply-adds, about) is small. The
/// pool is candle's own, so that the two never fight for the cores; no candle operation may be called inside.
pub(crate) fn parallel(items: usize, work: usize, f: impl Fn(Range<usize>) + Sync) {
    if work < PARALLEL_FROM || items < 2 {
        f(0..items);
    } else {
        candle_core::utils::barrier_pool().execute_chunked(items, f);
    }
}

/// A mutable slice that several threads write to, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T, usize);

#[expect(unsafe_code, reason = "one buffer, disjoint parts written by several threads")]
// SAFETY: `part` hands out disjoint parts (its callers' duty), and the borrow it came from outlives the parallel
// section because `parallel` returns only when all threads are done.
unsafe impl<T: Send> Sync for Shared<T> {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// The room of an empty vector, of which nothing is written yet: for `pointer`, and for `part` once it is.
    pub(crate) fn unwritten(room: &mut Vec<T>) -> Self {
        Self(room.as_mut_ptr(), room.capacity())
    }

    /// Where element `at` lies, for kernels that write with a stride; what they write is for them to keep apart.
    #[expect(unsafe_code, reason = "see the type")]
    pub(crate) fn pointer(&self, at: usize) -> *mut T {
        assert!(at <= self.1, "inside the slice");
        // SAFETY: inside the slice by the assertion.
        unsafe { self.0.add(at) }
    }

    /// # Safety
    /// No two threads may hold overlapping parts at the same time.
    #[expect(unsafe_code, reason = "see the type")]
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's duty")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.1, "a part inside the slice");
        // SAFETY: inside the slice by the assertion; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.end - range.start) }
    }
}

/// The elements of a contiguous f32 tensor on the CPU, borrowed for as long as the view lives.
pub(crate) struct F32View<G> {
    storage: G,
    range: Range<usize>,
}

impl<G: Deref<Target = Storage>> Deref for F32View<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(all)) => &all[self.range.clone()],
            _ => unreachable!("checked when the view was made"),
        }
    }
}

/// Looks into a contiguous f32 tensor on the CPU.
///
/// # Errors
/// A tensor that carries a gradient graph: these kernels have no backward, and cutting the graph silently is
/// the one mistake that nothing would show.
pub(crate) fn f32_view(tensor: &Tensor) -> Result<F32View<impl Deref<Target = Storage> + '_>> {
    if tensor.track_op() {
        candle_core::bail!("a serving kernel was given a tensor that is being differentiated");
    }
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(F32View { storage, range: start..end }),
        _ => candle_core::bail!("expected a contiguous f32 tensor on the CPU, found {tensor:?}"),
    }
}

#[cfg(test)]
thread_local! {
    static COMPOSED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `f` with every operation composed of candle's, as on CUDA.
#[cfg(test)]
pub(crate) fn composed<R>(f: impl FnOnce() -> R) -> R {
    COMPOSED.set(true);
    let result = f();
    COMPOSED.set(false);
    result
}

/// Whether this device runs our kernels; if not, operations are composed of candle's.
pub(crate) fn has_kernels(device: &candle_core::Device) -> bool {
    #[cfg(test)]
    if COMPOSED.get() {
        return false;
    }
    device.is_cpu()
}

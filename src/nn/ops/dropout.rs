//! Dropout (Srivastava et al. 2014) whose mask is a function of a key, row and column: nothing is stored for the
//! backward pass, and a pass that is computed again leaves out the same elements.

use candle_core::{Result, Tensor};

use super::{Shared, f32_view, has_kernels, multiversion, parallel_rows};

/// What to leave out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Dropout {
    /// Share of the elements, 0 to below 1.
    pub(crate) share: f32,
    /// Names the mask.
    pub(crate) key: u64,
}

impl Dropout {
    /// x with elements left out and the others scaled up, `[rows, d]`.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, d) = x.dims2()?;
        if has_kernels(x.device()) {
            let view = f32_view(x)?;
            let y = self.by_rows(rows, d, |row, y, key| masked(&view[row * d..(row + 1) * d], key, self, y));
            return Tensor::from_vec(y, (rows, d), x.device());
        }
        let mask = self.by_rows(rows, d, |_, y, key| {
            y.fill(1.0);
            let ones = y.to_vec();
            masked(&ones, key, self, y);
        });
        x * Tensor::from_vec(mask, (rows, d), x.device())?.to_dtype(x.dtype())?
    }

    #[expect(unsafe_code, reason = "threads write disjoint rows")]
    fn by_rows(&self, rows: usize, d: usize, f: impl Fn(usize, &mut [f32], u32) + Sync) -> Vec<f32> {
        let mut y = vec![0f32; rows * d];
        let out = Shared::new(&mut y);
        parallel_rows(rows, 8 * rows * d, |some| {
            for row in some {
                // SAFETY: each thread has its own rows.
                let y = unsafe { out.part(row * d..(row + 1) * d) };
                f(row, y, mix64(self.key ^ (row as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)) as u32);
            }
        });
        y
    }
}

/// The finaliser of SplitMix64 (Steele et al. 2014).
pub(crate) fn mix64(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

multiversion! {
    fn masked(x: &[f32], key: u32, dropout: &Dropout, y: &mut [f32]) {
        let limit = (dropout.share as f64 * 4_294_967_296.0) as u32;
        let scale = 1.0 / (1.0 - dropout.share);
        for (column, (y, &x)) in y.iter_mut().zip(x).enumerate() {
            // MurmurHash3's finaliser over the column.
            let h = (column as u32).wrapping_mul(0x9E37_79B1) ^ key;
            let h = (h ^ (h >> 16)).wrapping_mul(0x85EB_CA6B);
            let h = (h ^ (h >> 13)).wrapping_mul(0xC2B2_AE35);
            let h = h ^ (h >> 16);
            *y = if h < limit { 0.0 } else { x * scale };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_share_is_left_out_and_the_mean_stays() -> Result<()> {
        let ones = Tensor::ones((400, 300), candle_core::DType::F32, &Device::Cpu)?;
        for share in [0.0, 0.05, 0.5] {
            let dropout = Dropout { share, key: 7 };
            let y = dropout.apply(&ones)?.flatten_all()?.to_vec1::<f32>()?;
            let zeros = y.iter().filter(|&&y| y == 0.0).count() as f32 / y.len() as f32;
            assert!((zeros - share).abs() < 0.004, "{zeros} of {share}");
            let mean = y.iter().sum::<f32>() / y.len() as f32;
            assert!((mean - 1.0).abs() < 0.01, "{mean}");
            assert_eq!(y, dropout.apply(&ones)?.flatten_all()?.to_vec1::<f32>()?);
            if share > 0.0 {
                let other = Dropout { share, key: 8 }.apply(&ones)?.flatten_all()?.to_vec1::<f32>()?;
                assert_ne!(y, other);
            }
        }
        Ok(())
    }

    #[test]
    fn candle_operations_give_the_same() -> Result<()> {
        let x = Tensor::randn(0f32, 1.0, (9, 33), &Device::Cpu)?;
        let dropout = Dropout { share: 0.3, key: 3 };
        let composed = super::super::composed(|| dropout.apply(&x))?;
        assert_eq!(dropout.apply(&x)?.to_vec2::<f32>()?, composed.to_vec2::<f32>()?);
        Ok(())
    }
}

//! Scalar functions that the compiler can vectorise: no branches, no calls.

/// e^x, relative error below 2e-7, 0 below -87. Range reduction by Cody and Waite, then a polynomial.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, clamped));
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { p * scale }
}

/// x * sigmoid(x).
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// GELU in its tanh form (Hendrycks and Gimpel 2016), as BLOOM, GPT-2 and Gemma use it.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let inner = SQRT_2_OVER_PI * x * (0.044_715 * x).mul_add(x, 1.0);
    // 0.5 (1 + tanh y) is the logistic function of 2y.
    x / (1.0 + exp(-2.0 * inner))
}

/// Adds 16 lanes as a fixed tree: the order that every kernel's sums end with.
#[inline(always)]
pub(crate) fn tree_sum(lanes: [f32; 16]) -> f32 {
    let mut s = lanes;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            s[i] += s[i + half];
        }
    }
    s[0]
}

/// Sum over `f(i)` for `i` in `0..n`, in 16 lanes.
#[inline(always)]
pub(crate) fn lane_sum(n: usize, f: impl Fn(usize, f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let whole = n / 16 * 16;
    for start in (0..whole).step_by(16) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = f(start + i, *lane);
        }
    }
    for i in whole..n {
        lanes[i - whole] = f(i, lanes[i - whole]);
    }
    tree_sum(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_real_one() {
        let mut worst = 0f64;
        for i in -870_000..880_000 {
            let x = i as f32 / 10_000.0;
            let real = (x as f64).exp();
            worst = worst.max((exp(x) as f64 - real).abs() / real);
        }
        assert!(worst < 2e-7, "relative error {worst}");
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn activations_match_their_definitions() {
        for i in -1000..1000 {
            let x = i as f64 / 50.0;
            let silu_real = x / (1.0 + (-x).exp());
            let gelu_real =
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            assert!((silu(x as f32) as f64 - silu_real).abs() < 3e-6, "silu({x})");
            assert!((gelu_tanh(x as f32) as f64 - gelu_real).abs() < 3e-6, "gelu({x})");
        }
    }
}

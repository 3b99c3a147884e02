//! What is known of a row of logits that was changed after the device looked at it.

use kernels::LogitStats;

/// Largest entry and log-sum-exp of one row, for rows that were changed after the device looked at them.
pub(crate) fn stats(logits: &[f32]) -> LogitStats {
    let (mut argmax, mut max) = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return LogitStats { argmax: token as u32, max: f32::NAN, log_sum_exp: f32::NAN };
        }
        if logit > max {
            (argmax, max) = (token as u32, logit);
        }
    }
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    LogitStats { argmax, max, log_sum_exp: sum.ln() as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_the_largest_counts_and_nan_passes_for_the_largest() {
        let of = stats(&[1.0, 3.0, f32::NEG_INFINITY, 3.0]);
        assert_eq!((of.argmax, of.max), (1, 3.0));
        // e^-2 + 1 + 0 + 1.
        assert!((of.log_sum_exp - 2.135_335_3f32.ln()).abs() < 1e-6);
        let of = stats(&[1.0, f32::NAN, 3.0]);
        assert!(of.argmax == 1 && of.max.is_nan());
    }
}

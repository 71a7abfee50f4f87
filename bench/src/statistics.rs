//! Medians, paired differences and ratios, and how sure one can be of them. Pure.

use serde::{Deserialize, Serialize};
// The crate, not the module below.
use ::tests::random::Random;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 4000;

/// A figure over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Middle of the rounds.
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// A figure with the interval in which it lies in 95 of 100 repetitions of the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Of the rounds as they were.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// `None`: there is nothing.
pub fn summary(values: &[f64]) -> Option<Summary> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Summary { median: median(&sorted)?, min: *sorted.first()?, max: *sorted.last()? })
}

/// The bootstrap of a statistic over rounds: rounds are drawn with replacement, each with all that
/// was measured in it, so that what is paired stays paired.
///
/// The generator is seeded with a constant: the same rounds always give the same interval.
pub fn bootstrap<R: Copy>(rounds: &[R], statistic: impl Fn(&[R]) -> Option<f64>) -> Option<Estimate> {
    let value = statistic(rounds)?;
    let mut random = Random(0x5eed);
    let mut drawn = Vec::with_capacity(rounds.len());
    let mut values: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            drawn.clear();
            drawn.extend((0..rounds.len()).map(|_| rounds[random.below(rounds.len())]));
            statistic(&drawn)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    let at = |quantile: f64| values[((values.len() - 1) as f64 * quantile).round() as usize];
    Some(Estimate { value, low: at(0.025), high: at(0.975) })
}

/// The median of `a − b`, pair by pair.
pub fn difference(pairs: &[(f64, f64)]) -> Option<Estimate> {
    bootstrap(pairs, |drawn| median_of(drawn.iter().map(|(a, b)| a - b)))
}

/// The median of `a / b`, pair by pair.
pub fn ratio(pairs: &[(f64, f64)]) -> Option<Estimate> {
    bootstrap(pairs, |drawn| median_of(drawn.iter().map(|(a, b)| a / b)))
}

/// What `a` costs beyond `base`, over what `b` does: the ratio of the two medians. Not the median
/// of ratios, in which one small difference in a denominator decides.
pub fn attributable_ratio(rounds: &[(f64, f64, f64)]) -> Option<Estimate> {
    bootstrap(rounds, |drawn| {
        let a = median_of(drawn.iter().map(|(a, _, base)| a - base))?;
        let b = median_of(drawn.iter().map(|(_, b, base)| b - base))?;
        Some(a / b)
    })
}

/// The median of values in any order.
pub fn median_of(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    median(&values)
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], upper) } else { upper })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_does_not_depend_on_the_order() {
        assert_eq!(summary(&[3.0, 1.0, 2.0]), Some(Summary { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(summary(&[4.0, 1.0]), Some(Summary { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn differences_are_taken_pair_by_pair() {
        // The rounds differ by far more than the two subjects do.
        let pairs = [(11.0, 10.0), (102.0, 100.0), (53.0, 50.0), (21.0, 20.0), (32.0, 30.0)];
        let estimate = difference(&pairs).expect("five pairs");
        assert!((estimate.value - 2.0).abs() < 1e-9, "{estimate:?}");
        assert!(estimate.low >= 1.0 && estimate.high <= 3.0, "{estimate:?}");
    }

    #[test]
    fn an_interval_holds_its_value_and_shrinks_without_noise() {
        let same = [(9.0, 10.0); 5];
        let estimate = ratio(&same).expect("five pairs");
        assert!((estimate.low - 0.9).abs() < 1e-9 && (estimate.high - 0.9).abs() < 1e-9);
        let noisy: Vec<_> = (0..7).map(|i| (8.0 + f64::from(i), 10.0)).collect();
        let estimate = ratio(&noisy).expect("seven pairs");
        assert!(estimate.low < estimate.value && estimate.value < estimate.high, "{estimate:?}");
    }

    #[test]
    fn the_same_rounds_give_the_same_interval() {
        let pairs: Vec<_> = (1..8).map(|i| (f64::from(i * i), f64::from(i))).collect();
        assert_eq!(ratio(&pairs), ratio(&pairs));
    }

    #[test]
    fn an_attributable_ratio_ignores_what_both_have_in_common() {
        let rounds = [(12.0, 14.0, 10.0), (22.0, 24.0, 20.0), (32.0, 34.0, 30.0)];
        let estimate = attributable_ratio(&rounds).expect("three rounds");
        assert!((estimate.value - 0.5).abs() < 1e-9, "{estimate:?}");
    }

    #[test]
    fn nothing_gives_nothing() {
        assert_eq!(ratio(&[]), None);
    }
}

//! Numbers that look random and are the same in each run.

/// Distance between the states of two numbers.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Number `n`, from 0, of SplitMix64 (Steele, Lea, Flood 2014) with seed 0.
pub fn splitmix64(n: u64) -> u64 {
    mixed(n.wrapping_add(1).wrapping_mul(STEP))
}

fn mixed(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The same numbers one after the other, with any seed.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number below a limit that is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(STEP);
        (mixed(self.0) % limit as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_give_the_published_numbers() {
        // The first ones of java.util.SplittableRandom's algorithm with seed 0.
        let first = [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f];
        assert_eq!([0, 1, 2].map(splitmix64), first);
        let mut random = Random(0);
        assert_eq!(first.map(|number| (number % 1000) as usize), [0; 3].map(|_| random.below(1000)));
    }
}

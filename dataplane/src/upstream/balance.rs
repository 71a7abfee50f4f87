//! Which target a connection gets: a pure function of what is known of the targets.
//!
//! It must not know why a target is up or down, nor what a connection is for.

use std::net::IpAddr;

use sha2::{Digest, Sha256};

use crate::config::Balance;

/// How gladly a target is used; the first of these that has room gets the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Up, and nothing speaks against it.
    Good,
    /// Up, but the tailnet reaches it through a relay only.
    Relayed,
    /// Up, but a dial has waited for its answer longer than `hedge_delay`.
    Overdue,
    /// Down by the word of connections that it reset, and by no other. A client can bring that
    /// about, so it comes before those of which nothing is known to answer.
    Resetting,
    /// Down.
    Down,
}

impl Standing {
    /// Used only when nothing else is left.
    pub fn is_down(self) -> bool {
        self >= Self::Resetting
    }
}

/// What the choice is made from.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Connections that it has.
    pub active: u32,
    /// Neither drained nor tried for this connection already.
    pub allowed: bool,
    /// At its cap.
    pub full: bool,
    /// How gladly it is used.
    pub standing: Standing,
    /// Rank for this client, for `hash`.
    pub weight: u64,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Dial this one.
    Target(usize),
    /// Wait: those that are worth a try have no room.
    Full,
    /// There is none left to try.
    Nothing,
}

/// Picks a target. Those that are down are tried when no other is left, because a wrong verdict
/// must not make an outage; but none is tried because others are merely full.
pub fn choose(balance: Balance, turn: usize, candidates: &[Candidate]) -> Choice {
    let pick = |standing: Standing| {
        let eligible = candidates.iter().enumerate().filter(|(_, c)| c.allowed && !c.full && c.standing == standing);
        match balance {
            Balance::LeastConnections => {
                let least = eligible.clone().map(|(_, c)| c.active).min()?;
                in_turn(turn, eligible.filter(|(_, c)| c.active == least))
            }
            Balance::RoundRobin => in_turn(turn, eligible),
            Balance::Hash => eligible.max_by_key(|(_, c)| c.weight),
            Balance::First => eligible.min_by_key(|(i, _)| *i),
        }
    };
    let any = |down: bool| candidates.iter().any(|c| c.allowed && c.standing.is_down() == down);
    let up = [Standing::Good, Standing::Relayed, Standing::Overdue].into_iter().find_map(pick);
    let down = || [Standing::Resetting, Standing::Down].into_iter().find_map(pick);
    match up.or_else(|| if any(false) { None } else { down() }) {
        Some((index, _)) => Choice::Target(index),
        None if any(false) || any(true) => Choice::Full,
        None => Choice::Nothing,
    }
}

/// Among those that are eligible now, so that those that are left share what the others do not get.
fn in_turn<T>(turn: usize, mut eligible: impl Iterator<Item = T> + Clone) -> Option<T> {
    let position = turn.checked_rem(eligible.clone().count())?;
    eligible.nth(position)
}

/// Rendezvous hashing: each client ranks the targets; a target that leaves moves only its own
/// clients. A fixed function, so that every entrance node with the same configuration agrees,
/// whatever it was built with.
pub fn weight(client: IpAddr, target: &str) -> u64 {
    let mut hash = Sha256::new();
    match client.to_canonical() {
        IpAddr::V4(ip) => hash.update(ip.octets()),
        IpAddr::V6(ip) => hash.update(ip.octets()),
    }
    hash.update(target.as_bytes());
    let digest = hash.finalize();
    digest[..8].iter().fold(0, |weight, byte| weight << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Candidate = Candidate { active: 0, allowed: true, full: false, standing: Standing::Good, weight: 0 };
    const DOWN: Candidate = Candidate { standing: Standing::Down, ..GOOD };
    const ALL: [Balance; 4] = [Balance::LeastConnections, Balance::RoundRobin, Balance::Hash, Balance::First];

    fn chosen(balance: Balance, candidates: &[Candidate]) -> Choice {
        choose(balance, 0, candidates)
    }

    #[test]
    fn the_target_with_the_fewest_connections_is_chosen() {
        let candidates = [3, 1, 2].map(|active| Candidate { active, ..GOOD });
        assert_eq!(chosen(Balance::LeastConnections, &candidates), Choice::Target(1));
    }

    #[test]
    fn equals_take_turns() {
        for balance in [Balance::LeastConnections, Balance::RoundRobin] {
            let chosen = [0, 1, 2, 3, 4, 5].map(|turn| choose(balance, turn, &[GOOD; 3]));
            assert_eq!(chosen, [0, 1, 2, 0, 1, 2].map(Choice::Target));
        }
    }

    #[test]
    fn those_that_are_left_share_what_one_had_that_went_down() {
        for balance in [Balance::LeastConnections, Balance::RoundRobin] {
            for gone in 0..3 {
                let mut candidates = [GOOD; 3];
                candidates[gone] = DOWN;
                let mut counts = [0; 3];
                for turn in 0..12 {
                    match choose(balance, turn, &candidates) {
                        Choice::Target(index) => counts[index] += 1,
                        other => panic!("{other:?}"),
                    }
                }
                counts.sort_unstable();
                assert_eq!(counts, [0, 6, 6]);
            }
        }
    }

    #[test]
    fn a_target_that_is_down_is_chosen_only_when_no_other_is_left() {
        for balance in ALL {
            assert_eq!(chosen(balance, &[DOWN, Candidate { active: 9, ..GOOD }]), Choice::Target(1));
            assert_eq!(chosen(balance, &[DOWN, Candidate { allowed: false, ..GOOD }]), Choice::Target(0));
        }
    }

    #[test]
    fn direct_before_relayed_before_overdue_before_resetting_before_down() {
        let of = |standing| Candidate { standing, ..GOOD };
        for balance in ALL {
            let order =
                [Standing::Down, Standing::Resetting, Standing::Overdue, Standing::Relayed, Standing::Good].map(of);
            for best in (0..5).rev() {
                assert_eq!(chosen(balance, &order[..=best]), Choice::Target(best));
            }
        }
    }

    #[test]
    fn full_targets_are_waited_for_unless_another_that_is_up_has_room() {
        let full = Candidate { full: true, ..GOOD };
        let relayed = Candidate { standing: Standing::Relayed, ..GOOD };
        for balance in ALL {
            assert_eq!(chosen(balance, &[full, full]), Choice::Full);
            assert_eq!(chosen(balance, &[full, DOWN]), Choice::Full, "a target that is down is not the better one");
            assert_eq!(chosen(balance, &[full, relayed]), Choice::Target(1));
            assert_eq!(chosen(balance, &[Candidate { full: true, ..DOWN }]), Choice::Full);
        }
    }

    #[test]
    fn nothing_is_chosen_when_nothing_is_allowed() {
        let drained = Candidate { allowed: false, ..GOOD };
        assert_eq!(chosen(Balance::RoundRobin, &[drained, Candidate { full: true, ..drained }]), Choice::Nothing);
        assert_eq!(chosen(Balance::RoundRobin, &[]), Choice::Nothing);
    }

    #[test]
    fn a_target_that_leaves_moves_only_its_own_clients() {
        let targets = ["node-1:443", "node-2:443", "node-3:443", "node-4:443"];
        let pick = |client: IpAddr, without: Option<usize>| {
            let candidates = [0, 1, 2, 3].map(|i| Candidate {
                allowed: Some(i) != without,
                weight: weight(client, targets[i]),
                ..GOOD
            });
            match choose(Balance::Hash, 0, &candidates) {
                Choice::Target(index) => index,
                other => panic!("{other:?}"),
            }
        };
        let mut counts = [0; 4];
        for n in 0..1000u32 {
            let client = IpAddr::V4((0xC000_0200 + n).into());
            let before = pick(client, None);
            counts[before] += 1;
            let after = pick(client, Some(2));
            assert!(before == 2 || before == after);
        }
        assert!(counts.iter().all(|c| *c > 150), "uneven: {counts:?}");
    }

    #[test]
    fn every_build_ranks_alike() {
        // printf '\xc0\x00\x02\x07node-1:443' | sha256sum
        assert_eq!(weight([192, 0, 2, 7].into(), "node-1:443"), NODE_1_FOR_192_0_2_7);
        assert_eq!(weight("::ffff:192.0.2.7".parse().unwrap(), "node-1:443"), NODE_1_FOR_192_0_2_7);
    }
    const NODE_1_FOR_192_0_2_7: u64 = 0x7018_0efc_bf7b_26a4;
}

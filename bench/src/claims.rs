//! What this project claims against its peers, as data, and whether a run bears it out. Pure.
//!
//! A claim stands only if the bad end of the bootstrap interval is within the bound: a median that
//! happens to be on the right side is not enough.

use serde::{Deserialize, Serialize};

use crate::figures::{Cell, Figure};
use crate::network::Kind;
use crate::statistics::{self, Estimate};
use crate::subjects::{PEERS, Subject};

/// Subject against the best of its rivals, in one figure.
pub struct Claim {
    /// In words, without the numbers.
    pub text: &'static str,
    /// Where it is claimed; `None`: everywhere.
    pub network: Option<Kind>,
    /// On each of these.
    pub workloads: &'static [&'static str],
    pub subject: Subject,
    /// The best of these in the same run is what counts.
    pub rivals: &'static [Subject],
    pub figure: Figure,
    /// Whether `direct` is subtracted from both sides first.
    pub attributable: bool,
    /// Of the ratio subject / rival.
    pub bound: Bound,
}

/// A limit of a ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// For what costs.
    AtMost(f64),
    /// For what is good.
    AtLeast(f64),
}

/// How a claim fared on one workload.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// The claim's words.
    pub claim: String,
    /// By name.
    pub workload: String,
    /// By name.
    pub subject: String,
    /// The best of the rivals; `None`: nothing to compare with was measured.
    pub rival: Option<String>,
    /// subject / rival, paired by round.
    pub ratio: Option<Estimate>,
    /// What it had to be.
    pub bound: Bound,
    pub outcome: Outcome,
}

/// What came of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The whole interval is within the bound.
    Met,
    /// It is not.
    Missed,
    /// Subject or rivals were not part of the run, or there were too few rounds to tell.
    Undecided,
}

impl Outcome {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "missed",
            Self::Undecided => "undecided",
        }
    }
}

/// Fewer rounds have no interval worth the name.
const ENOUGH: usize = 3;

const NGINX_AND_HAPROXY: &[Subject] = &[Subject::Nginx, Subject::Haproxy];
const OWN: &[Subject] = &[Subject::Engine("copy"), Subject::Engine("splice"), Subject::Engine("sockmap")];
const AUTO: Subject = Subject::Engine("auto");
const BULK: &[&str] = &["bulk-down-1", "bulk-down-16", "bulk-up-1", "bulk-up-16"];

/// All claims.
pub const ALL: &[Claim] = &[
    Claim {
        text: "tailnet: total CPU for a 200-byte exchange",
        network: Some(Kind::Tailnet),
        workloads: &["exchange-16"],
        subject: AUTO,
        rivals: NGINX_AND_HAPROXY,
        figure: Figure::Cpu,
        attributable: false,
        bound: Bound::AtMost(0.92),
    },
    Claim {
        text: "tailnet: throughput of bulk no lower",
        network: Some(Kind::Tailnet),
        workloads: BULK,
        subject: AUTO,
        rivals: NGINX_AND_HAPROXY,
        figure: Figure::Throughput,
        attributable: false,
        bound: Bound::AtLeast(1.0),
    },
    Claim {
        text: "tailnet: median latency of an exchange no higher",
        network: Some(Kind::Tailnet),
        workloads: &["exchange-16"],
        subject: AUTO,
        rivals: NGINX_AND_HAPROXY,
        figure: Figure::P50,
        attributable: false,
        bound: Bound::AtMost(1.0),
    },
    Claim {
        text: "splice: attributable CPU for bulk, one flow",
        network: Some(Kind::Veth),
        workloads: &["bulk-down-1", "bulk-up-1"],
        subject: Subject::Engine("splice"),
        rivals: &PEERS,
        figure: Figure::Cpu,
        attributable: true,
        bound: Bound::AtMost(1.0),
    },
    Claim {
        text: "splice: attributable CPU for bulk, 16 flows",
        network: Some(Kind::Veth),
        workloads: &["bulk-down-16", "bulk-up-16"],
        subject: Subject::Engine("splice"),
        rivals: &PEERS,
        figure: Figure::Cpu,
        attributable: true,
        bound: Bound::AtMost(0.9),
    },
    Claim {
        text: "sockmap: total CPU for a 200-byte exchange",
        network: Some(Kind::Veth),
        workloads: &["exchange-16", "exchange-200"],
        subject: Subject::Engine("sockmap"),
        rivals: &PEERS,
        figure: Figure::Cpu,
        attributable: false,
        bound: Bound::AtMost(0.85),
    },
    Claim {
        text: "sockmap: median latency of an exchange",
        network: Some(Kind::Veth),
        workloads: &["exchange-16", "exchange-200"],
        subject: Subject::Engine("sockmap"),
        rivals: &PEERS,
        figure: Figure::P50,
        attributable: false,
        bound: Bound::AtMost(0.8),
    },
    Claim {
        text: "auto: total CPU against the best of our engines",
        network: None,
        workloads: &[
            "bulk-down-1",
            "bulk-down-16",
            "bulk-up-1",
            "bulk-up-16",
            "exchange-1",
            "exchange-16",
            "exchange-200",
            "exchange-2000",
            "connect-1",
            "connect-64",
            "small-then-bulk",
            "mix",
        ],
        subject: AUTO,
        rivals: OWN,
        figure: Figure::Cpu,
        attributable: false,
        bound: Bound::AtMost(1.15),
    },
    Claim {
        text: "auto: attributable CPU for a new connection",
        network: Some(Kind::Veth),
        workloads: &["connect-1", "connect-64"],
        subject: AUTO,
        rivals: &PEERS,
        figure: Figure::Cpu,
        attributable: true,
        bound: Bound::AtMost(0.8),
    },
    Claim {
        text: "auto: connections a second no fewer",
        network: Some(Kind::Veth),
        workloads: &["connect-1", "connect-64"],
        subject: AUTO,
        rivals: &PEERS,
        figure: Figure::Rate,
        attributable: false,
        bound: Bound::AtLeast(1.0),
    },
    Claim {
        text: "auto: PSS of an idle connection below the best peer's",
        network: None,
        workloads: &["idle-8000"],
        subject: AUTO,
        rivals: &PEERS,
        figure: Figure::Pss,
        attributable: false,
        bound: Bound::AtMost(1.0),
    },
];

/// Judges all claims that are made for this network.
pub fn judge(network: Kind, cells: &[Cell]) -> Vec<Verdict> {
    ALL.iter()
        .filter(|claim| claim.network.is_none_or(|there| there == network))
        .flat_map(|claim| claim.workloads.iter().map(|workload| claim.judge(workload, cells)))
        .collect()
}

impl Claim {
    fn judge(&self, workload: &str, cells: &[Cell]) -> Verdict {
        let best = self
            .rivals
            .iter()
            .filter_map(|rival| Some((rival, self.level(rival.name(), workload, cells)?)))
            .min_by(|(_, a), (_, b)| if self.figure.is_cost() { a.total_cmp(b) } else { b.total_cmp(a) });
        let ratio = best.and_then(|(rival, _)| self.ratio(rival.name(), workload, cells));
        let rounds = cells.iter().map(|cell| cell.round + 1).max().unwrap_or(0);
        Verdict {
            claim: self.text.to_owned(),
            workload: workload.to_owned(),
            subject: self.subject.name().to_owned(),
            rival: best.map(|(rival, _)| rival.name().to_owned()),
            ratio,
            bound: self.bound,
            outcome: match ratio {
                _ if rounds < ENOUGH => Outcome::Undecided,
                None => Outcome::Undecided,
                Some(ratio) if self.bound.holds(ratio) => Outcome::Met,
                Some(_) => Outcome::Missed,
            },
        }
    }

    /// What tells the best rival: the median of its figure.
    fn level(&self, rival: &str, workload: &str, cells: &[Cell]) -> Option<f64> {
        let base = Subject::Direct.name();
        if self.attributable {
            let pairs = paired(self.figure, [rival, base], workload, cells);
            return statistics::median_of(pairs.iter().map(|[a, b]| a - b));
        }
        statistics::median_of(paired(self.figure, [rival], workload, cells).iter().map(|[a]| *a))
    }

    fn ratio(&self, rival: &str, workload: &str, cells: &[Cell]) -> Option<Estimate> {
        let (own, base) = (self.subject.name(), Subject::Direct.name());
        if self.attributable {
            let rounds = paired(self.figure, [own, rival, base], workload, cells);
            return statistics::attributable_ratio(&rounds.iter().map(|[a, b, c]| (*a, *b, *c)).collect::<Vec<_>>());
        }
        let rounds = paired(self.figure, [own, rival], workload, cells);
        statistics::ratio(&rounds.iter().map(|[a, b]| (*a, *b)).collect::<Vec<_>>())
    }
}

impl Bound {
    /// The bad end decides.
    fn holds(self, ratio: Estimate) -> bool {
        match self {
            Self::AtMost(limit) => ratio.high <= limit,
            Self::AtLeast(limit) => ratio.low >= limit,
        }
    }
}

/// A figure of several subjects, round by round; rounds in which one of them has none are left out.
pub fn paired<const N: usize>(figure: Figure, subjects: [&str; N], workload: &str, cells: &[Cell]) -> Vec<[f64; N]> {
    let rounds = cells.iter().map(|cell| cell.round + 1).max().unwrap_or(0);
    let value = |subject: &str, round: usize| {
        let here = |cell: &&Cell| cell.round == round && cell.subject == subject && cell.workload == workload;
        figure.of(cells.iter().find(here)?)
    };
    (0..rounds)
        .filter_map(|round| {
            let mut values = [0.0; N];
            for (slot, subject) in values.iter_mut().zip(subjects) {
                *slot = value(subject, round)?;
            }
            Some(values)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::tests::bulk;
    use crate::workloads::Workload;

    fn splice_at_one_flow(cells: &[Cell]) -> Verdict {
        let verdicts = judge(Kind::Veth, cells);
        let found = verdicts.iter().find(|v| v.subject == "splice" && v.workload == "bulk-down-1");
        found.expect("it is claimed").clone()
    }

    fn rounds(splice: f64, nginx: f64, haproxy: f64) -> Vec<Cell> {
        (0..5)
            .flat_map(|round| {
                let noise = 1.0 + 0.01 * round as f64;
                [("direct", 1.0), ("splice", splice), ("nginx", nginx), ("haproxy", haproxy)]
                    .map(|(subject, cpu)| bulk(subject, round, cpu * noise))
            })
            .collect()
    }

    #[test]
    fn the_best_rival_counts_and_direct_is_subtracted() {
        let verdict = splice_at_one_flow(&rounds(1.8, 3.0, 2.0));
        assert_eq!(verdict.rival.as_deref(), Some("haproxy"));
        let ratio = verdict.ratio.expect("measured");
        assert!((ratio.value - 0.8).abs() < 1e-6, "{ratio:?}");
        assert_eq!(verdict.outcome, Outcome::Met);
        assert_eq!(splice_at_one_flow(&rounds(2.1, 3.0, 2.0)).outcome, Outcome::Missed);
    }

    #[test]
    fn the_bad_end_of_the_interval_decides() {
        let mut cells = rounds(1.9, 3.0, 2.0);
        for cell in cells.iter_mut().filter(|c| c.subject == "splice" && c.round >= 3) {
            cell.usage.cpu = 2.5;
        }
        let verdict = splice_at_one_flow(&cells);
        assert!(verdict.ratio.expect("measured").value < 1.0);
        assert_eq!(verdict.outcome, Outcome::Missed);
    }

    #[test]
    fn without_a_rival_nothing_is_claimed_to_be_met() {
        let cells: Vec<_> = rounds(1.0, 2.0, 2.0).into_iter().filter(|c| c.subject == "splice").collect();
        assert_eq!(splice_at_one_flow(&cells).outcome, Outcome::Undecided);
    }

    #[test]
    fn claims_name_workloads_that_exist() {
        let names = ALL.iter().flat_map(|claim| claim.workloads);
        assert!(names.into_iter().all(|name| Workload::named(name).is_some()));
    }
}

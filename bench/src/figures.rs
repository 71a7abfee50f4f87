//! What one cell gave, and the figures that are made of it. Pure.

use serde::{Deserialize, Serialize};

use crate::load::Tally;
use crate::measure::Usage;
use crate::workloads::{Unit, Workload};

/// One subject under one workload in one round: what was counted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// By name.
    pub subject: String,
    /// By name.
    pub workload: String,
    /// From 0.
    pub round: usize,
    /// Of the client.
    pub tally: Tally,
    /// Payload that reached the server in the window.
    pub uploaded: u64,
    /// Of the machine.
    pub usage: Usage,
    /// Bytes that the subject's processes grew by (PSS) while the connections were opened.
    pub pss: i64,
    /// Bytes by which MemAvailable shrank meanwhile: the kernel's memory and that of client and
    /// server are in it.
    pub memory: i64,
    /// Why this cell is not to be trusted, if so.
    pub disturbed: Option<String>,
}

/// A figure of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Figure {
    /// CPU of the whole machine for each unit: s/GB or µs/op.
    Cpu,
    /// Of the subject's processes alone.
    SubjectCpu,
    /// Of tailscaled, both nodes.
    TunnelCpu,
    /// Gbit/s of payload.
    Throughput,
    /// Operations a second.
    Rate,
    /// Median latency, µs.
    P50,
    /// µs
    P99,
    /// µs
    P999,
    /// Context switches of the whole machine for each unit.
    Switches,
    /// KiB of PSS for each connection.
    Pss,
    /// KiB of the machine's memory for each connection.
    Memory,
}

impl Figure {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 11] = [
        Self::Cpu,
        Self::SubjectCpu,
        Self::TunnelCpu,
        Self::Throughput,
        Self::Rate,
        Self::P50,
        Self::P99,
        Self::P999,
        Self::Switches,
        Self::Pss,
        Self::Memory,
    ];

    /// Heading of its column.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Cpu => "CPU, machine",
            Self::SubjectCpu => "CPU, subject",
            Self::TunnelCpu => "CPU, tailscaled",
            Self::Throughput => "throughput",
            Self::Rate => "rate",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::P999 => "p99.9",
            Self::Switches => "context switches",
            Self::Pss => "PSS",
            Self::Memory => "memory, machine",
        }
    }

    /// What its numbers are in.
    pub const fn unit(self, per: Unit) -> &'static str {
        match (self, per) {
            (Self::Cpu | Self::SubjectCpu | Self::TunnelCpu, Unit::Gigabyte) => "s/GB",
            (Self::Cpu | Self::SubjectCpu | Self::TunnelCpu, _) => "µs/op",
            (Self::Throughput, _) => "Gbit/s",
            (Self::Rate, _) => "op/s",
            (Self::P50 | Self::P99 | Self::P999, _) => "µs",
            (Self::Switches, Unit::Gigabyte) => "/GB",
            (Self::Switches, _) => "/op",
            (Self::Pss | Self::Memory, _) => "KiB/conn",
        }
    }

    /// Whether less is better.
    pub const fn is_cost(self) -> bool {
        !matches!(self, Self::Throughput | Self::Rate)
    }

    /// Whether what `direct` costs is part of it: then there is an attributable rest.
    pub const fn has_base(self) -> bool {
        matches!(self, Self::Cpu | Self::Switches | Self::Memory)
    }

    /// Its value; `None`: this workload has no such figure.
    pub fn of(self, cell: &Cell) -> Option<f64> {
        let workload = Workload::named(&cell.workload)?;
        let payload = (cell.tally.received + cell.uploaded) as f64;
        // How many units the window had, and how CPU seconds are told for one.
        let (units, scale) = match workload.unit {
            Unit::Gigabyte => (payload / 1e9, 1.0),
            Unit::Operation => (cell.tally.operations as f64, 1e6),
            Unit::Connection => (0.0, 0.0),
        };
        let per_unit = |total: f64| (units > 0.0).then(|| total / units);
        let per_connection = |bytes: i64| {
            (workload.unit == Unit::Connection).then(|| bytes as f64 / 1024.0 / cell.tally.connections as f64)
        };
        match self {
            Self::Cpu => per_unit(cell.usage.cpu * scale),
            Self::SubjectCpu => per_unit(cell.usage.subject_cpu * scale),
            Self::TunnelCpu => per_unit(cell.usage.tunnel_cpu * scale),
            Self::Throughput => (workload.unit == Unit::Gigabyte).then(|| payload * 8.0 / 1e9 / cell.tally.seconds),
            Self::Rate => (workload.unit == Unit::Operation).then(|| units / cell.tally.seconds),
            Self::P50 => cell.tally.latency.map(|l| l[0]),
            Self::P99 => cell.tally.latency.map(|l| l[1]),
            Self::P999 => cell.tally.latency.map(|l| l[2]),
            Self::Switches => per_unit(cell.usage.switches as f64),
            Self::Pss => per_connection(cell.pss),
            Self::Memory => per_connection(cell.memory),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A cell of a bulk workload that moved 2 GB in 2 s at this cost in CPU seconds.
    pub fn bulk(subject: &str, round: usize, cpu: f64) -> Cell {
        Cell {
            subject: subject.to_owned(),
            workload: "bulk-down-1".to_owned(),
            round,
            tally: Tally { connections: 1, seconds: 2.0, operations: 0, received: 2_000_000_000, latency: None },
            uploaded: 0,
            usage: Usage { seconds: 2.0, cpu, switches: 1000, ..Usage::default() },
            pss: 0,
            memory: 0,
            disturbed: None,
        }
    }

    #[test]
    fn costs_are_told_for_a_gigabyte_or_for_an_operation() {
        let mut cell = bulk("auto", 0, 3.0);
        assert_eq!(Figure::Cpu.of(&cell), Some(1.5));
        assert_eq!(Figure::Throughput.of(&cell), Some(8.0));
        assert_eq!(Figure::Switches.of(&cell), Some(500.0));
        assert_eq!((Figure::Rate.of(&cell), Figure::P50.of(&cell), Figure::Pss.of(&cell)), (None, None, None));
        cell.workload = "exchange-16".to_owned();
        cell.tally.operations = 60_000;
        assert_eq!(Figure::Cpu.of(&cell), Some(50.0));
        assert_eq!(Figure::Rate.of(&cell), Some(30_000.0));
    }

    #[test]
    fn memory_is_told_for_a_connection_and_only_where_it_is_the_question() {
        let mut cell = bulk("auto", 0, 0.1);
        cell.pss = 8000 * 3072;
        assert_eq!(Figure::Pss.of(&cell), None);
        cell.workload = "idle-8000".to_owned();
        cell.tally.connections = 8000;
        assert_eq!(Figure::Pss.of(&cell), Some(3.0));
        assert_eq!(Figure::Cpu.of(&cell), None);
    }
}

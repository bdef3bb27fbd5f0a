//! What the slices cost, and what that says.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::world::World;
use crate::report::{Report, Row, Unit};
use crate::stats::Samples;

/// What one connection, round trip or block cost, in microseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) wall: f64,
    pub(super) cpu: f64,
}

/// A kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Connect,
    ConnectDirect,
    /// For the noise.
    ConnectDirectAgain,
    NodePort,
    Tcp,
    TcpDirect,
    Udp,
    UdpDirect,
    Bulk,
    BulkDirect,
}

impl Kind {
    /// Those that are compared are neighbours.
    pub(super) const ALL: [Kind; 10] = [
        Kind::Connect,
        Kind::ConnectDirect,
        Kind::ConnectDirectAgain,
        Kind::NodePort,
        Kind::Tcp,
        Kind::TcpDirect,
        Kind::Udp,
        Kind::UdpDirect,
        Kind::Bulk,
        Kind::BulkDirect,
    ];

    pub(super) fn needs_service(self) -> bool {
        matches!(self, Kind::Connect | Kind::NodePort | Kind::Tcp | Kind::Udp | Kind::Bulk)
    }
}

/// All slices, in the order in which they were made.
#[derive(Debug, Default)]
pub(super) struct Tally {
    slices: BTreeMap<(String, Kind), Vec<Sample>>,
    /// Slices that came to nothing, by world.
    failed: BTreeMap<String, u32>,
}

/// More than that of one world is not worth a comparison.
const MAY_FAIL: u32 = 5;

/// A figure of a sample.
type Figure = fn(&Sample) -> f64;
const WALL: Figure = |sample| sample.wall;
const CPU: Figure = |sample| sample.cpu;

impl Tally {
    pub(super) fn push(&mut self, world: &str, kind: Kind, sample: Sample) {
        self.slices.entry((world.to_owned(), kind)).or_default().push(sample);
    }

    /// A connection was lost, and its slice with it.
    ///
    /// # Errors
    /// When that is too much.
    pub(super) fn fail(&mut self, world: &str, error: &anyhow::Error) -> Result<()> {
        eprintln!("{error:#}");
        let failed = self.failed.entry(world.to_owned()).or_default();
        *failed += 1;
        if *failed > MAY_FAIL { bail!("{world}: {failed} slices failed") } else { Ok(()) }
    }

    /// The rows of the report.
    pub(super) fn enter(&self, report: &mut Report, worlds: &[World]) {
        for world in worlds {
            self.enter_world(report, &world.label);
        }
        for (world, failed) in &self.failed {
            report.notes.push(format!(
                "{world}: {failed} slices were lost, each by a connection that timed out"
            ));
        }
        // The first one beside each of the others.
        let Some((first, others)) = worlds.split_first() else { return };
        for other in others {
            for (what, kind, goal) in [
                ("connection through a ClusterIP", Kind::Connect, 0.8),
                ("connection to the pod", Kind::ConnectDirect, 1.0),
                ("connection from outside to a node port", Kind::NodePort, 1.0 / 1.5),
                ("TCP round trip through a ClusterIP", Kind::Tcp, 1.0),
                ("UDP round trip through a ClusterIP", Kind::Udp, 1.0),
                ("block of an established connection", Kind::Bulk, 1.0),
            ] {
                let ratios = self.ratios(CPU, (&first.label, kind), (&other.label, kind));
                let name = format!("{what}: CPU over that of {}", other.label);
                enter_median(report, &first.label, Row::new(name, Unit::Ratio).goal(goal), ratios);
            }
        }
    }

    fn enter_world(&self, report: &mut Report, world: &str) {
        for (what, kind, figure) in [
            ("connection through a ClusterIP, CPU", Kind::Connect, CPU),
            ("connection to the pod, CPU", Kind::ConnectDirect, CPU),
            ("connection from outside to a node port, CPU", Kind::NodePort, CPU),
            ("TCP round trip through a ClusterIP, CPU", Kind::Tcp, CPU),
            ("UDP round trip through a ClusterIP, CPU", Kind::Udp, CPU),
            ("block of 64 KiB through a ClusterIP, CPU", Kind::Bulk, CPU),
        ] {
            let samples = self.of(world, kind).iter().map(figure).collect();
            enter_median(report, world, Row::new(what, Unit::Micros), samples);
        }
        for (what, kind, base, figure, goal) in [
            ("connection: CPU over direct", Kind::Connect, Kind::ConnectDirect, CPU, 1.02),
            ("connection: time over direct", Kind::Connect, Kind::ConnectDirect, WALL, 1.01),
            ("direct over direct, CPU", Kind::ConnectDirectAgain, Kind::ConnectDirect, CPU, 1.0),
            ("TCP round trip: time over direct", Kind::Tcp, Kind::TcpDirect, WALL, 1.0),
            ("UDP round trip: time over direct", Kind::Udp, Kind::UdpDirect, WALL, 1.0),
            ("bulk: time over direct", Kind::Bulk, Kind::BulkDirect, WALL, 1.0),
        ] {
            let ratios = self.ratios(figure, (world, kind), (world, base));
            enter_median(report, world, Row::new(what, Unit::Ratio).goal(goal), ratios);
        }
    }

    fn of(&self, world: &str, kind: Kind) -> &[Sample] {
        self.slices.get(&(world.to_owned(), kind)).map_or(&[], Vec::as_slice)
    }

    /// Of slices that were neighbours.
    fn ratios(&self, figure: Figure, one: (&str, Kind), base: (&str, Kind)) -> Vec<f64> {
        let slices = self.of(one.0, one.1).iter().zip(self.of(base.0, base.1));
        slices.map(|(one, base)| figure(one) / figure(base)).collect()
    }
}

fn enter_median(report: &mut Report, subject: &str, row: Row, samples: Vec<f64>) {
    if let Some(median) = Samples::from(&samples[..]).median() {
        report.enter(subject, &row, median, &samples);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_the_median_of_neighbours() {
        let mut tally = Tally::default();
        for (service, direct) in [(2.0, 1.0), (30.0, 10.0), (9.0, 2.0)] {
            for (kind, cpu) in [(Kind::Connect, service), (Kind::ConnectDirect, direct)] {
                tally.push("a", kind, Sample { wall: 1.0, cpu });
            }
        }
        let mut report = Report::new("datapath");
        tally.enter_world(&mut report, "a");
        assert_eq!(report.figure("a", "connection: CPU over direct"), Some(3.0));
        assert_eq!(report.figure("a", "connection: time over direct"), Some(1.0));
        assert_eq!(report.figure("a", "TCP round trip: time over direct"), None);
    }
}

//! What a run found: one figure per measure and subject, as a table, JSON or a chart.

mod svg;
mod table;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::machine::Machine;
use crate::stats::Samples;

/// All figures of one run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) bench: &'static str,
    pub(crate) machine: Machine,
    /// Who was measured, keelson first.
    pub(crate) subjects: Vec<String>,
    pub(crate) measures: Vec<Measure>,
    /// What a reader must know to judge the figures: settings, disturbances, what could not be measured.
    pub(crate) notes: Vec<String>,
}

/// One row: the same work, for every subject.
#[derive(Debug, Serialize)]
pub(crate) struct Measure {
    pub(crate) name: String,
    pub(crate) unit: Unit,
    /// What keelson wants to stay below.
    pub(crate) goal: Option<f64>,
    pub(crate) values: BTreeMap<String, Value>,
}

/// A figure and what it was made of.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Value {
    pub(crate) figure: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) samples: Vec<f64>,
}

/// In which unit figures are kept and printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    #[serde(rename = "s")]
    Seconds,
    #[serde(rename = "ms")]
    Millis,
    #[serde(rename = "us")]
    Micros,
    #[serde(rename = "CPU s")]
    CpuSeconds,
    #[serde(rename = "MiB")]
    Mebibytes,
    #[serde(rename = "% of a core")]
    PercentOfCore,
    #[serde(rename = "ratio")]
    Ratio,
}

impl Unit {
    /// `figure` as a person reads it.
    pub(crate) fn text(self, figure: f64) -> String {
        match self {
            Unit::Seconds => format!("{figure:.3} s"),
            Unit::Millis => format!("{figure:.1} ms"),
            Unit::Micros => format!("{figure:.2} us"),
            Unit::CpuSeconds => format!("{figure:.2} CPU s"),
            Unit::Mebibytes => format!("{figure:.1} MiB"),
            Unit::PercentOfCore => format!("{figure:.2} %"),
            Unit::Ratio => format!("{figure:.3}"),
        }
    }
}

impl Report {
    pub(crate) fn new(bench: &'static str) -> Report {
        let machine = Machine::look();
        Report { bench, machine, subjects: Vec::new(), measures: Vec::new(), notes: Vec::new() }
    }

    /// Enters one figure. Rows and columns come in the order of their first figure.
    pub(crate) fn enter(&mut self, subject: &str, row: &Row, figure: f64, samples: &[f64]) {
        if !self.subjects.iter().any(|s| s == subject) {
            self.subjects.push(subject.to_owned());
        }
        let value = Value { figure, samples: samples.to_vec() };
        let known = self.measures.iter().position(|m| m.name == row.name);
        let index = known.unwrap_or_else(|| {
            self.measures.push(Measure {
                name: row.name.clone(),
                unit: row.unit,
                goal: row.goal,
                values: BTreeMap::new(),
            });
            self.measures.len() - 1
        });
        self.measures[index].values.insert(subject.to_owned(), value);
    }

    /// What was entered.
    pub(crate) fn figure(&self, subject: &str, row: &str) -> Option<f64> {
        let measure = self.measures.iter().find(|m| m.name == row)?;
        Some(measure.values.get(subject)?.figure)
    }

    /// Enters p50, p90 and maximum of `samples`; `goal` is that of the p50.
    pub(crate) fn enter_spread(&mut self, subject: &str, row: &Row, samples: &Samples) {
        let all = samples.as_slice();
        for (label, percent, samples) in [("p50", 50, all), ("p90", 90, &[][..]), ("max", 100, &[])]
        {
            let goal = row.goal.filter(|_| percent == 50);
            let part = Row { name: format!("{}, {label}", row.name), unit: row.unit, goal };
            if let Some(figure) = Samples::percentile(&Samples::from(all), percent) {
                self.enter(subject, &part, figure, samples);
            }
        }
    }

    /// The table for the terminal.
    pub(crate) fn table(&self) -> String {
        table::render(self)
    }

    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write_json(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write_svg(&self, path: &Path) -> Result<()> {
        std::fs::write(path, svg::render(self))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Which row a figure belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: Unit,
    pub(crate) goal: Option<f64>,
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, unit: Unit) -> Row {
        Row { name: name.into(), unit, goal: None }
    }

    pub(crate) fn goal(mut self, goal: f64) -> Row {
        self.goal = Some(goal);
        self
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two subjects, one of which lacks a figure.
    pub(crate) fn example() -> Report {
        let machine = Machine { cores: 2, kernel: "6.1.0".into(), memory_mib: 4096 };
        let mut report = Report {
            bench: "pods",
            machine,
            subjects: Vec::new(),
            measures: Vec::new(),
            notes: vec!["the machine was busy <otherwise>".into()],
        };
        let start = Row::new("pod start", Unit::Seconds).goal(0.12);
        report.enter_spread("keelson", &start, &Samples::from(&[0.1, 0.11, 0.13][..]));
        report.enter_spread("kubelet v1.36.2", &start, &Samples::from(&[0.2][..]));
        let memory = Row::new("memory & more", Unit::Mebibytes);
        report.enter("keelson", &memory, 17.0, &[]);
        report
    }

    #[test]
    fn rows_and_columns_keep_the_order_of_their_first_figure() {
        let report = example();
        let rows: Vec<&str> = report.measures.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(rows, ["pod start, p50", "pod start, p90", "pod start, max", "memory & more"]);
        assert_eq!(report.subjects, ["keelson", "kubelet v1.36.2"]);
        assert_eq!(report.measures[0].goal, Some(0.12));
        assert_eq!(report.measures[1].goal, None);
        assert_eq!(report.measures[0].values["keelson"].samples.len(), 3);
    }

    #[test]
    fn json_names_units_and_keeps_the_samples() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        example().write_json(&path).unwrap();
        let json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(json["measures"][0]["unit"], "s");
        assert_eq!(json["measures"][0]["values"]["keelson"]["samples"][2], 0.13);
        assert_eq!(json["measures"][3]["values"]["keelson"]["figure"], 17.0);
    }
}

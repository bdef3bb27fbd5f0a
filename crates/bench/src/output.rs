//! Where a report goes.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::report::Report;

/// Files to write besides the table.
#[derive(Debug, Clone, Args)]
pub(crate) struct OutputOptions {
    /// Also write all figures with their samples as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also draw the figures as a bar chart
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

impl OutputOptions {
    /// Prints the table and writes the files.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn write(&self, report: &Report) -> Result<()> {
        println!("\n{}", report.table());
        if let Some(path) = &self.json {
            report.write_json(path)?;
        }
        if let Some(path) = &self.svg {
            report.write_svg(path)?;
        }
        Ok(())
    }
}

//! `keelson logd`: the log writer, which the agent starts by itself.

use std::path::PathBuf;

use clap::Args;

/// Write what containers print to their logs (started by the agent).
#[derive(Debug, Args)]
pub struct LogdArgs {
    /// The agent's --run-dir
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
}

impl LogdArgs {
    /// Runs until it is told to stop.
    ///
    /// # Errors
    /// When its socket cannot be made.
    pub fn run(self) -> anyhow::Result<()> {
        crate::logd::serve(&self.run_dir)
    }
}
